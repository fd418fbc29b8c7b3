"""One registry of preferences: what can be held together, and what does not add up."""

import itertools
from typing import Any

import pytest

from rlhf_lab.data.preferences import Registry

POLES = {"size": ["short", "long"], "tone": ["kind", "blunt", "wry"], "lone": ["true"]}
NAMES = [name for poles in POLES.values() for name in poles]


def registry(**changes: Any) -> Registry:
    settings: dict[str, Any] = {
        "dimensions": POLES,
        "weights": dict.fromkeys(NAMES, 1.0),
        "policy": {name: f"Be {name}." for name in NAMES},
        "reward_model": {name: f"It is {name}." for name in NAMES},
        "judge": {name: f"Which is more {name}?" for name in NAMES},
        "new_tokens": [],
    }
    return Registry(**settings | changes)


def test_what_can_be_held_together_is_every_set_without_rivals():
    rivals = [set(pair) for poles in POLES.values() for pair in itertools.combinations(poles, 2)]
    sets = [set(some) for n in range(1, len(NAMES) + 1) for some in itertools.combinations(NAMES, n)]
    expected = [some for some in sets if not any(pair <= some for pair in rivals)]
    found = [set(held) for held in registry().subsets]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    assert sorted(map(sorted, registry().combinations)) == sorted(sorted(some) for some in expected if len(some) == 3)


def test_a_joint_name_is_read_back_and_rivals_are_refused():
    assert registry().held("long+wry") == ("long", "wry")
    assert registry().words(("long", "wry"), "judge") == "Which is more long? Which is more wry?"
    with pytest.raises(ValueError, match=r"'long\+short' holds \['long', 'short'\], but of the dimension size one"):
        registry().held("long+short")
    with pytest.raises(ValueError, match="'quick' is no preference"):
        registry().held("long+quick")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dimensions": {}}, "expected a preference in each"),
        ({"dimensions": {**POLES, "empty": []}}, "expected a preference in each"),
        ({"dimensions": {**POLES, "other": ["kind"]}}, "each in one only"),
        ({"dimensions": {"a": ["x+y"]}}, "rename it"),
        ({"judge": {"short": "Which is more short?"}}, r"preferences.judge has \['short'\]"),
        ({"policy": dict.fromkeys(NAMES, "Be good.")}, "preferences.policy .* must differ"),
        ({"reward_model": {name: " " * i for i, name in enumerate(NAMES)}}, "say something"),
        ({"weights": {**dict.fromkeys(NAMES, 1.0), "wry": 0.0}}, "preferences.weights.wry=0.0"),
    ],
)
def test_a_registry_that_does_not_add_up_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        registry(**changes)
