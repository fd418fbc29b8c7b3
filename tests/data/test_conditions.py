"""Prompts that say which preferences count: drawn by seed, weighed, readable, and evaluated one by one and together."""

from collections import Counter

import pytest

from rlhf_lab.data.conditions import NoConditions, PerPrompt, Preferences
from rlhf_lab.data.preferences import Registry
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Prompt

PROMPTS = [Prompt.from_text(f"give me {n} steps") for n in range(2000)]


WORDS = {"helpful": "<helpful>", "humour": "<humour>", "brief": "be brief", "long": "be long"}
DIMENSIONS = {"length": ["brief", "long"], "help": ["helpful"], "fun": ["humour"]}


def preferences(words: dict[str, str] = WORDS, per_prompt: PerPrompt = "subset") -> Preferences:
    registry = Registry(
        dimensions=DIMENSIONS if words is WORDS else {name: [name] for name in words},
        weights={name: {"helpful": 1.0, "humour": 2.0}.get(name, 0.5) for name in words},
        policy=words,
        reward_model=words,
        judge=words,
        new_tokens=[],
    )
    return Preferences(registry, per_prompt)


def test_every_prompt_is_told_a_preference_and_weighed_by_it():
    for prompt, before in zip(preferences().drawn(PROMPTS, 3), PROMPTS, strict=True):
        assert prompt.weights
        assert prompt.condition == " ".join(WORDS[stream] for stream in prompt.weights)
        assert all(prompt.weights[s] == {"helpful": 1.0, "humour": 2.0}.get(s, 0.5) for s in prompt.weights)
        assert not {"brief", "long"} <= prompt.weights.keys()
        assert prompt.id == before.id
        assert prompt.plain == before


def test_numbers_of_preferences_and_rivals_are_drawn_evenly():
    told = preferences().drawn(PROMPTS, 3)
    counts = Counter(len(prompt.weights) for prompt in told)
    assert {n: pytest.approx(2000 / 3, abs=90) for n in (1, 2, 3)} == counts  # sd 21
    rivals = Counter(stream for prompt in told for stream in prompt.weights if stream in ("brief", "long"))
    assert rivals["brief"] / rivals.total() == pytest.approx(0.5, abs=0.06)  # sd .014


@pytest.mark.parametrize(("per_prompt", "size"), [("one", 1), ("all", 3)])
def test_one_preference_or_one_of_each_dimension(per_prompt: PerPrompt, size: int):
    told = preferences(per_prompt=per_prompt).drawn(PROMPTS[:200], 0)
    assert {len(prompt.weights) for prompt in told} == {size}
    assert len({prompt.condition for prompt in told}) == (4 if size == 1 else 2)


def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else():
    first, again, other = (preferences().drawn(PROMPTS[:50], seed) for seed in (1, 1, 2))
    assert first == again != other
    assert preferences().drawn(PROMPTS[:20], 1) == first[:20]


def test_evaluated_are_each_preference_alone_and_all_that_go_together():
    told = preferences().evaluated(PROMPTS[:2])
    assert list(told) == ["helpful", "humour", "brief", "long", "brief+helpful+humour", "long+helpful+humour"]
    assert [prompt.condition for prompt in told["brief+helpful+humour"]] == ["be brief <helpful> <humour>"] * 2
    assert told["humour"][1].weights == {"humour": 2.0}
    assert list(preferences({"a": "b"}).evaluated(PROMPTS[:1])) == ["a"]


def test_without_conditions_prompts_stay_as_they_are():
    assert NoConditions().drawn(PROMPTS[:3], 0) == PROMPTS[:3]
    assert NoConditions().evaluated(PROMPTS[:3]) == {"": PROMPTS[:3]}


def test_words_that_the_tokenizer_cannot_read_are_refused_with_what_to_add():
    conditions = preferences({"a": "<helpful> please", "b": "<humour>"})
    with pytest.raises(
        ValueError, match=r"does not know \['<helpful>', '<humour>'\].*new_tokens=\[<helpful>,<humour>\]"
    ):
        conditions.check(Template(load_tokenizer("embedded:tiny"), "auto"))
    template = Template(load_tokenizer("embedded:tiny", ["<helpful>", "<humour>"]), "auto")
    conditions.check(template)
    told = conditions.evaluated(PROMPTS[:1])["a+b"][0]
    text = template.tokenizer.decode(template.prompt_tokens(told))
    assert "<helpful> please <humour> bot :" in text
