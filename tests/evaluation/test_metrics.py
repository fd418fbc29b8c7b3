"""Names of the metrics are a contract, their values are worked by hand, and each warning has its one condition."""

import math
import statistics

import pytest
import torch
from scipy import stats
from torch import Tensor

from rlhf_lab.evaluation.metrics import (
    completion_metrics,
    group_metrics,
    half_width,
    kl_metrics,
    score_metrics,
    warnings,
)
from rlhf_lab.records import Prompt
from rlhf_lab.types import Rollout, Score, ScoredRollout, Sequences

MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()


def scored(logprobs: Tensor, ref_logprobs: Tensor, finished: list[bool]) -> ScoredRollout:
    ones = torch.ones(4, 1, dtype=torch.int64)
    attention = torch.cat([ones.bool(), MASK], dim=1)
    sequences = Sequences(
        tokens=attention.long(), attention_mask=attention, position_ids=attention.cumsum(1) - 1, response_mask=MASK
    )
    rollout = Rollout(
        prompts=[Prompt.from_text("hello")] * 4,
        sequences=sequences,
        group=torch.arange(4),
        finished=torch.tensor(finished),
        responses=[""] * 4,
        logprobs=logprobs,
    )
    return ScoredRollout(rollout=rollout, scores={}, ref_logprobs=ref_logprobs, values={})


def single(values: list[float]) -> Score:
    return Score(value=torch.tensor(values), members=torch.tensor(values)[:, None])


def test_half_width_is_that_of_scipys_interval_and_covers_the_mean_95_times_in_100():
    values = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 3 + 1
    sample = values.double().numpy()
    low, high = stats.t.interval(0.95, 11, loc=sample.mean(), scale=stats.sem(sample))
    assert half_width(values) == pytest.approx((high - low) / 2, rel=1e-9)
    draws = torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))
    covered = statistics.fmean(float(abs(draw.mean().item()) <= half_width(draw)) for draw in draws)
    assert covered == pytest.approx(0.95, abs=0.02)  # a normal interval covers 0.85 of four values


def test_half_width_of_one_value_is_infinite_and_of_equal_values_zero():
    assert half_width(torch.tensor([3.0])) == math.inf
    assert half_width(torch.tensor([3.0, 3.0, 3.0])) == 0


def test_rewards_costs_and_ensembles_are_reported_under_the_names_of_the_contract():
    members = torch.tensor([[1.0, 3.0], [2.0, 8.0]])
    metrics = score_metrics(
        {
            "helpful": Score(value=torch.tensor([1.5, 4.0]), members=members),
            "length": single([2.0, 6.0]),
            "cost": single([-1.0, 3.0]),
        },
        limits={"cost": 0.0},
    )
    assert metrics == pytest.approx(
        {
            "rewards/helpful/mean": 2.75,
            "rewards/helpful/std": 2.5 / math.sqrt(2),
            "ensemble/helpful/mean": 3.5,  # of member means 2 and 5
            "ensemble/helpful/std": 3 / math.sqrt(2),
            "ensemble/helpful/min": 1.5,  # of member minima 1 and 2
            "ensemble/helpful/penalty": 0.75,  # .5 and 1
            "ensemble/helpful/disagreement": (2 + 6) / math.sqrt(2) / 2,
            "rewards/length/mean": 4.0,
            "rewards/length/std": 4 / math.sqrt(2),
            "cost/cost/mean": 1.0,
            "cost/cost/std": 4 / math.sqrt(2),
            "cost/cost/frac_violating": 0.5,
        }
    )


@pytest.mark.parametrize(("limit", "fraction"), [(-0.5, 0.75), (0.0, 0.5), (0.5, 0.25), (2.0, 0.0)])
def test_a_violation_is_a_cost_above_its_limit_and_not_at_it(limit: float, fraction: float):
    metrics = score_metrics({"toxic": single([-1.0, 0.0, 0.5, 2.0])}, limits={"toxic": limit})
    assert metrics["cost/toxic/frac_violating"] == fraction


def test_kl_is_summed_over_tokens_and_averaged_over_responses():
    log_ratio = torch.tensor([[0.1, 0.1, 0.0], [0.1, 0.1, 0.1], [0.1, 0.0, 0.0], [0.1, 0.1, 0.1]])  # nine tokens
    metrics = kl_metrics(scored(log_ratio - 2, torch.full((4, 3), -2.0), [True] * 4))
    expected = {"kl/k1": 9 / 4 * 0.1, "kl/k2": 9 / 4 * 0.005, "kl/k3": 9 / 4 * 0.0048374}
    assert metrics == pytest.approx(expected, rel=1e-4)


def test_completions_count_tokens_cuts_and_ends():
    metrics = completion_metrics(scored(torch.zeros(4, 3), torch.zeros(4, 3), [True, False, True, True]))
    assert metrics == {
        "completions/mean_length": 2.25,
        "completions/truncated_ratio": 0.25,
        "val/num_eos_tokens": 3.0,
    }


def test_a_group_teaches_nothing_if_its_rewards_are_all_the_same():
    reward, group = torch.tensor([1.0, 2.0, 1.0, 2.0, 5.0, 5.0]), torch.tensor([7, 3, 7, 9, 9, 3])
    assert group_metrics(reward, group) == {"val/zero_variance_groups": pytest.approx(1 / 3)}
    assert group_metrics(reward, torch.arange(6)) == {}


HEALTHY = {
    "kl/k1": -0.05,
    "val/ratio": 1.1,
    "val/num_eos_tokens": 1.0,
    "val/zero_variance_groups": 0.5,
    "lagrange/cost/at_cap": 0.0,
    "lagrange/cost/lambda": 10.0,
    "lagrange/cost/trapped": 0.05,
}


@pytest.mark.parametrize(
    ("metric", "value", "about"),
    [
        ("kl/k1", -0.2, "mean KL is -0.20"),
        ("val/ratio", 1.3, "ratio averages 1.30"),
        ("val/ratio", 0.7, "ratio averages 0.70"),
        ("val/num_eos_tokens", 0.0, "no response ended"),
        ("val/zero_variance_groups", 0.95, "the same reward"),
        ("lagrange/cost/at_cap", 1.0, "multiplier cost is at its cap"),
        ("lagrange/cost/trapped", 0.2, "20% of the responses cost so little"),
    ],
)
def test_each_condition_gives_its_own_warning_and_only_that(metric: str, value: float, about: str):
    (line,) = warnings(HEALTHY | {metric: value})
    assert about in line


def test_nothing_is_said_of_a_healthy_run_or_of_what_was_not_measured():
    assert warnings(HEALTHY) == []
    assert warnings({}) == []
    assert warnings({"kl/k1": 50.0, "val/num_eos_tokens": 64.0}) == []


def test_every_unhealthy_thing_is_said():
    unhealthy = {"kl/k1": -9.0, "val/ratio": 9.0, "val/num_eos_tokens": 0.0, "val/zero_variance_groups": 1.0}
    assert len(warnings(unhealthy | {"lagrange/a/at_cap": 1.0, "lagrange/b/at_cap": 1.0})) == 6
