"""The arena against a hand case, its own mirror, and a loop over random pairs."""

from statistics import fmean

import pytest
import torch
from scipy import stats

from rlhf_lab.evaluation.arena import OUTCOMES, SAFETY, clusters, standing

REWARD = torch.tensor([[1.0, 2.0], [1.0, 1.0], [3.0, 2.0], [0.0, 5.0], [2.0, 4.0], [1.0, 0.0]])
COST = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [-1.0, 2.0], [0.5, -0.5], [-1.0, -2.0], [-1.0, -1.0]])
NAMES = ("old", "new")


def test_the_table_by_hand():
    found = standing(NAMES, REWARD, COST, torch.arange(6), 0.0)
    # new: better 3 times (all safe; a cost of exactly 0 is safe), ties once (unsafe), worse twice
    assert found.counts.tolist() == [[3, 0], [0, 1], [1, 1]]
    assert found.win_rate.value == pytest.approx(3.5 / 6)
    assert found.cells.tolist() == [[3, 1], [1, 1]]
    values = {key: each.value for key, each in found.win_rates.items()}
    assert values == pytest.approx(
        {("safe", "safe"): 2 / 3, ("safe", "unsafe"): 0, ("unsafe", "safe"): 1, ("unsafe", "unsafe"): 0.5}
    )
    assert found.means["safe", "old"].value == pytest.approx(4 / 6)
    assert found.means["cost", "new"].value == pytest.approx(-0.5 / 6)
    gaps = [1.0, 0, -1, 5, 2, -1]
    test = stats.ttest_1samp(gaps, 0).confidence_interval()
    gap = found.differences["reward"]
    assert (gap.value, gap.low, gap.high) == pytest.approx((1.0, test.low, test.high))
    assert found.differences["safe"].value == pytest.approx(0)


def test_the_threshold_is_what_it_is_set_to():
    found = standing(NAMES, REWARD, COST, torch.arange(6), -1.0)
    assert found.cells.tolist() == [[2, 2], [0, 2]]
    assert ("unsafe", "safe") not in found.win_rates
    assert found.metrics("arena")["arena/baseline_unsafe/challenger_safe/count"] == 0
    assert "arena/baseline_unsafe/challenger_safe/win_rate/mean" not in found.metrics("arena")


def test_exchanging_the_sides_mirrors_everything():
    reward, cost = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(4)).round(decimals=1)
    prompt = torch.arange(50) // 2
    one = standing(("a", "b"), reward, cost, prompt, 0.1)
    other = standing(("b", "a"), reward.flip(1), cost.flip(1), prompt, 0.1)
    assert one.cells.tolist() == other.cells.T.tolist()
    ours, theirs = one.win_rate, other.win_rate
    assert (ours.value, ours.low, ours.high) == pytest.approx((1 - theirs.value, 1 - theirs.high, 1 - theirs.low))
    for (first, second), each in one.win_rates.items():
        assert each.value == pytest.approx(1 - other.win_rates[second, first].value)
    for name in ("a", "b"):
        assert one.means["reward", name] == other.means["reward", name]
    for measure, each in one.differences.items():
        assert each.low == pytest.approx(-other.differences[measure].high)
    assert int(one.counts.sum()) == int(one.cells.sum()) == 50


def test_counts_are_those_of_a_loop():
    reward, cost = torch.randint(-1, 2, (2, 200, 2), generator=torch.Generator().manual_seed(7)).float()
    found = standing(NAMES, reward, cost, torch.arange(200), 0.0)
    seen = dict.fromkeys(((outcome, safety) for outcome in OUTCOMES for safety in SAFETY), 0)
    for (r0, r1), (_, c1) in zip(reward.tolist(), cost.tolist(), strict=True):
        outcome = "better" if r1 > r0 else "worse" if r1 < r0 else "tie"
        seen[outcome, "safe" if c1 <= 0 else "unsafe"] += 1
    metrics = found.metrics("x")
    assert {key: metrics[f"x/count/{key[0]}_{key[1]}"] for key in seen} == seen
    wins = [0.5 * (1 + (r1 > r0) - (r1 < r0)) for r0, r1 in reward.tolist()]
    assert metrics["x/win_rate/mean"] == pytest.approx(fmean(wins))


def test_samples_of_one_prompt_do_not_make_it_surer():
    once = standing(NAMES, REWARD, COST, torch.arange(6), 0.0)
    thrice = standing(NAMES, REWARD.repeat(3, 1), COST.repeat(3, 1), torch.arange(6).repeat(3), 0.0)
    assert thrice.num_prompts == 6
    assert thrice.differences["reward"].high == pytest.approx(once.differences["reward"].high)
    width, thrice_width = (each.win_rate.high - each.win_rate.low for each in (once, thrice))
    assert thrice_width > 0.85 * width  # three times the independent pairs would be 0.6 of it


def test_refusals_and_clusters():
    with pytest.raises(ValueError, match="old and new have no responses"):
        standing(NAMES, REWARD[:0], COST[:0], torch.arange(0), 0.0)
    broken = COST.clone()
    broken[3, 1] = float("nan")
    with pytest.raises(ValueError, match="cost of 1 of 6 pairs is not finite, first pair 3"):
        standing(NAMES, REWARD, broken, torch.arange(6), 0.0)
    assert clusters([("a", ""), ("b", ""), ("a", ""), ("a", "terse")]).tolist() == [0, 1, 0, 2]
