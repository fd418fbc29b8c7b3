"""Rewards written into prompts: read back exactly, for any names and numbers of them; and kept beside the policy."""

import itertools
import json
import statistics

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.data.reward_conditions import CONTEXT_FILE, RewardContext, RewardNotation, TradeOffs, moments
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Prompt

NAMES = ("helpful", "humour", "cost of (a+b) / c", "s>=1", "ends in s")
PROMPTS = [Prompt.from_text(f"give me {n} steps") for n in range(3)]
NUMBERS = RewardNotation(style="numbers", step=0.1, largest=5.0)
TOKENS = RewardNotation(style="tokens", step=0.25, largest=1.0)


def context(**changes) -> RewardContext:
    settings = {
        "names": ("helpful", "humour"),
        "notation": TOKENS,
        "mean": torch.tensor([1.0, -2.0], dtype=torch.float64),
        "sd": torch.tensor([2.0, 0.5], dtype=torch.float64),
        "scale": torch.tensor([[-1.0, -0.5], [0.0, 0.1], [0.9, 1.0]], dtype=torch.float64),
        "method": "linear",
    }
    return RewardContext(**settings | changes)


def test_the_released_wording():
    assert NUMBERS.write(["harmless", "helpful"], [1.3, -0.2]) == "<rm1_score> 1.3 <rm2_score> -0.2"
    assert NUMBERS.write(["harmless"], [-0.04]) == "<rm1_score> 0.0"
    assert NUMBERS.new_tokens(["harmless"]) == []


@pytest.mark.parametrize("style", ["numbers", "tokens"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("step", [0.1, 0.25, 1.0])
def test_what_is_written_is_read_back(style, count, step):
    notation = RewardNotation(style=style, step=step, largest=3.0)
    source = torch.Generator().manual_seed(0)
    for row in (torch.randint(-12, 13, (200, count), generator=source) * step).clamp(-3, 3):
        levels = notation.at_levels(row).tolist()
        text = notation.write(NAMES[:count], levels)
        assert notation.read(NAMES[:count], text) == pytest.approx(levels)
        assert levels == pytest.approx(row.tolist())  # they stand on the grid already
        assert "-0.0 " not in f"{text} "


def test_rewards_go_to_the_nearest_level_and_no_further_than_the_largest():
    notation = RewardNotation(style="numbers", step=0.1, largest=0.3)
    found = notation.at_levels(torch.tensor([[0.04, 0.06], [-9.0, 0.31], [0.29, -0.26]]))
    assert_close(found, torch.tensor([[0.0, 0.1], [-0.3, 0.3], [0.3, -0.3]], dtype=torch.float64))


def test_every_level_is_one_word_of_the_policy_and_known_by_it():
    names = ("helpful", "humour")
    words = TOKENS.new_tokens(names)
    assert len(words) == len(set(words)) == 2 * 9  # -1, -0.75 … 1
    template = Template(load_tokenizer("embedded:tiny", words), "auto")
    before = len(template.prompt_tokens(PROMPTS[0]))
    for rewards in itertools.product([level / 4 for level in range(-4, 5)], repeat=2):
        told = PROMPTS[0].conditioned(TOKENS.write(names, rewards), {})
        tokens = template.prompt_tokens(told)
        assert len(tokens) == before + 2
        assert TOKENS.read(names, str(template.tokenizer.decode(tokens[-4:-2]))) == pytest.approx(rewards)


@pytest.mark.parametrize(
    "text", ["", "<rm1_score> 1.3", "<rm2_score> 1.3 <rm1_score> 0.1", "<rm1_score> x <rm2_score> 1.0"]
)
def test_a_text_that_tells_something_else_is_refused(text):
    with pytest.raises(ValueError, match=r"does not tell the rewards \['helpful', 'humour'\]"):
        NUMBERS.read(["helpful", "humour"], text)


def test_a_step_that_leaves_only_zero_is_refused():
    with pytest.raises(ValueError, match=r"notation\.step=2\.0 exceeds notation\.largest=1\.0"):
        RewardNotation(style="numbers", step=2.0, largest=1.0)


def test_moments_are_the_populations():
    raw = torch.randn(50, 2, generator=torch.Generator().manual_seed(2)) * 3 + 1
    mean, sd = moments(raw, ("helpful", "humour"))
    for k in range(2):
        assert mean[k].item() == pytest.approx(statistics.fmean(raw[:, k].tolist()))
        assert sd[k].item() == pytest.approx(statistics.pstdev(raw[:, k].tolist()))
    told = context(mean=mean, sd=sd).standardised(raw)
    assert_close(told.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(told.square().mean(0), torch.ones(2, dtype=torch.float64))


def test_a_reward_that_is_always_the_same_is_refused():
    with pytest.raises(ValueError, match="the reward humour is the same for all 4 responses"):
        moments(torch.tensor([[1.0, 2.0], [2.0, 2.0], [3.0, 2.0], [0.0, 2.0]]), ("helpful", "humour"))


def test_a_saved_context_tells_the_same(tmp_path):
    first = context()
    first.save(tmp_path)
    again = RewardContext.load(tmp_path)
    assert again.under_trade_offs(PROMPTS, 4) == first.under_trade_offs(PROMPTS, 4)
    raw = torch.randn(5, 2)
    assert_close(again.standardised(raw), first.standardised(raw))
    assert_close(again.goals(9, 1), first.goals(9, 1))
    json.loads((tmp_path / CONTEXT_FILE).read_text())


@pytest.mark.parametrize("steps", [1, 6, 9, 10, 21, 24])
def test_a_grid_has_one_trade_off_per_step_and_one_more(steps):
    grid = context().under_trade_offs(PROMPTS, steps)
    assert len(grid) == steps + 1
    for told in grid.values():
        assert sum(told[0].weights.values()) == pytest.approx(1.0)
        assert [prompt.plain for prompt in told] == PROMPTS


def test_a_trade_off_is_told_as_the_rewards_that_it_asks_for():
    told = context().under_trade_offs(PROMPTS, 2)
    # linear: lo + w (hi - lo), on steps of a quarter: helpful from -1 to .9, humour from -.5 to 1
    assert told["helpful=0.5,humour=0.5"][1].condition == "<helpful=0.00> <humour=0.25>"
    assert told["helpful=1,humour=0"][1].condition == "<helpful=1.00> <humour=-0.50>"
    assert told["helpful=0,humour=1"][1].weights == {"helpful": 0.0, "humour": 1.0}


def test_goals_are_told_to_each_prompt_for_all_rewards(tmp_path):
    context().save(tmp_path)
    conditions = TradeOffs(str(tmp_path), steps=4)
    told = conditions.drawn(PROMPTS, 7)
    read = [TOKENS.read(("helpful", "humour"), prompt.condition) for prompt in told]
    assert read == context().goals(3, 7).tolist()
    assert all(prompt.weights == {"helpful": 1.0, "humour": 1.0} for prompt in told)
    assert conditions.evaluated(PROMPTS) == context().under_trade_offs(PROMPTS, 4)
    words = TOKENS.new_tokens(conditions.streams)
    conditions.check(Template(load_tokenizer("embedded:tiny", words), "auto"))
    with pytest.raises(ValueError, match=r"does not know '<humour=1\.00>' and 0 other words"):
        conditions.check(Template(load_tokenizer("embedded:tiny", words[:-1]), "auto"))


def test_a_folder_without_a_context_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no rewards_in_context\.json in .* algorithm=ric"):
        _ = TradeOffs(str(tmp_path), steps=4).context
