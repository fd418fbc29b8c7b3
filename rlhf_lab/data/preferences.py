"""The registry of preferences: what a person may wish of a response, in the words of each of those who read it."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

Role = Literal["policy", "reward_model", "judge"]
JOINT = "+"  # between the names of preferences that are held together: P1A+P2B


class Registry:
    """Every preference once, by name, so that policies, reward models and judges mean the same by it.

    Preferences of one dimension exclude each other, such as short and long; those of different ones do not.

    Args:
        dimensions: dimension -> its preferences, the poles. A dimension may have one.
        weights: preference -> what it weighs when it counts, beside the others that count.
        policy: preference -> what a policy is told after the request.
        reward_model: preference -> what a reward model of several preferences is told after the request.
        judge: preference -> the criterion by which a judge is to choose between two responses.
        new_tokens: words of these that the models' tokenizers lack and are to be given; see `model.new_tokens`.

    Raises:
        ValueError: a part lacks a preference or has one that is in no dimension, two have the same words in one role, a
            wording says nothing, a weight is not positive, or a name holds a `+`.

    Source: three dimensions of two and of four poles, Jang et al. 2023, arXiv:2310.11564. Its code has the wordings
        several times, and they differ; see conf/preferences/personalized_soups.yaml for ours.
    """

    def __init__(
        self,
        *,
        dimensions: Mapping[str, Sequence[str]],
        weights: Mapping[str, float],
        policy: Mapping[str, str],
        reward_model: Mapping[str, str],
        judge: Mapping[str, str],
        new_tokens: Sequence[str],
    ) -> None:
        listed = [name for poles in dimensions.values() for name in poles]
        if not listed or len(set(listed)) < len(listed) or not all(dimensions.values()):
            raise ValueError(
                f"preferences.dimensions is {dict(dimensions)}; expected a preference in each, and each in one only"
            )
        if joint := [name for name in listed if JOINT in name]:
            raise ValueError(f"a preference is called {joint[0]!r}, but {JOINT} stands between preferences; rename it")
        parts = {"weights": weights, "policy": policy, "reward_model": reward_model, "judge": judge}
        for key, part in parts.items():
            if part.keys() != set(listed):
                raise ValueError(
                    f"preferences.{key} has {sorted(part)}, but the preferences of preferences.dimensions are "
                    f"{sorted(listed)}; each needs one"
                )
        for key, words in (("policy", policy), ("reward_model", reward_model), ("judge", judge)):
            if len(set(words.values())) < len(words) or not all(map(str.strip, words.values())):
                raise ValueError(f"preferences.{key} has {list(words.values())}; they must differ, and say something")
        if wrong := [name for name, weight in weights.items() if weight <= 0]:
            raise ValueError(
                f"preferences.weights.{wrong[0]}={weights[wrong[0]]}; a preference that counts weighs more than 0"
            )
        self.dimensions = {name: tuple(poles) for name, poles in dimensions.items()}
        self.weights = dict(weights)
        self.wordings: dict[Role, dict[str, str]] = {
            "policy": dict(policy),
            "reward_model": dict(reward_model),
            "judge": dict(judge),
        }
        self.new_tokens = tuple(new_tokens)

    @property
    def names(self) -> tuple[str, ...]:
        """Every preference."""
        return tuple(self.weights)

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """One preference of every dimension, in all ways: 8 for three dimensions of two poles."""
        return list(itertools.product(*self.dimensions.values()))

    @property
    def subsets(self) -> list[tuple[str, ...]]:
        """Whatever a person may hold together: at least one preference, and at most one of a dimension."""
        choices = itertools.product(*[(None, *poles) for poles in self.dimensions.values()])
        held = [tuple(name for name in chosen if name is not None) for chosen in choices]
        return sorted(filter(None, held), key=len)

    def words(self, held: Sequence[str], role: Role) -> str:
        """What those who read the preferences in this role read, in the order given."""
        return " ".join(self.wordings[role][name] for name in held)

    def held(self, named: str) -> tuple[str, ...]:
        """The preferences that a joint name stands for: P1A+P2B, or one alone.

        Raises:
            ValueError: there is no such preference, or two exclude each other.
        """
        held = tuple(named.split(JOINT))
        self.check(held)
        for dimension, poles in self.dimensions.items():
            if len(chosen := [name for name in held if name in poles]) > 1:
                raise ValueError(f"{named!r} holds {chosen}, but of the dimension {dimension} one can be held")
        return held

    def check(self, names: Collection[str]) -> None:
        """Raises ValueError unless each is a preference."""
        if unknown := [name for name in names if name not in self.weights]:
            raise ValueError(f"{unknown[0]!r} is no preference; preferences.dimensions has {list(self.weights)}")
