"""Preference weights -> rewards to ask for: the released vectors, slow loops, and what the maps share."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.functional.targets import empirical_scale, gaussian_scale, keep, sample_goals, targets

# the extremes of the released evaluation's draws
RELEASED = torch.tensor([[-3.86555933, -4.03800553], [4.05652721, 4.16566347]], dtype=torch.float64)
SCORES = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("method", "asked"), [("l2", [1.7, 1.8]), ("linf", [4.1, 4.2]), ("linear", [0.1, 0.1]), ("quantile", [4.1, 4.2])]
)
def test_released_vectors(method, asked):
    assert_close(gaussian_scale(2, 3)[[0, -1]], RELEASED, atol=1e-8, rtol=0)
    said = targets(torch.tensor([0.5, 0.5]), RELEASED, method)
    assert [round(value, 1) for value in said.tolist()] == asked


def slow_targets(weights, lo, hi, method):
    norm = math.sqrt(sum(w * w for w in weights))
    asked = []
    for k, w in enumerate(weights):
        share = {"l2": w / norm, "linear": w, "linf": min(len(weights) * w, 1.0)}[method]
        if method == "linf" and k == weights.index(max(weights)):
            share = 1.0
        asked.append(lo[k] + share * (hi[k] - lo[k]))
    return asked


@pytest.mark.parametrize("method", ["linf", "l2", "linear"])
@pytest.mark.parametrize("weights", [[1.0], [0.3, 0.7], [0.2, 0.5, 0.3], [0.1, 0.1, 0.2, 0.35, 0.25]])
def test_any_number_of_rewards(method, weights):
    lo = [-1.0 - 0.1 * k for k in range(len(weights))]
    hi = [2.0 + 0.3 * k for k in range(len(weights))]
    scale = torch.tensor([lo, hi], dtype=torch.float64)
    said = targets(torch.tensor(weights, dtype=torch.float64), scale, method)
    assert said.tolist() == pytest.approx(slow_targets(weights, lo, hi, method))


@pytest.mark.parametrize("method", ["linf", "l2", "linear", "quantile"])
def test_who_wants_one_reward_only_asks_for_its_most_and_the_least_of_the_others(method):
    scale = empirical_scale(SCORES, 0.1, 0.9, 11)
    for k in range(3):
        said = targets(torch.eye(3)[k], scale, method)
        assert_close(said, torch.stack([scale[-1, j] if j == k else scale[0, j] for j in range(3)]))


def test_quantile_asks_for_the_score_that_the_share_of_the_data_lies_below():
    scores = torch.tensor([[float(i), float(i * i)] for i in range(101)])
    said = targets(torch.tensor([0.3, 0.7]), empirical_scale(scores, 0.0, 1.0, 101), "quantile")
    assert_close(said, torch.tensor([60.0, 10000.0], dtype=torch.float64))  # 0.6 of 0 … 100; the greatest


def test_a_scale_is_the_quantiles_of_each_reward():
    scale = empirical_scale(SCORES, 0.0, 1.0, 5)
    for k in range(3):
        ordered = sorted(SCORES[:, k].tolist())
        for level, value in zip((0, 0.25, 0.5, 0.75, 1), scale[:, k].tolist(), strict=True):
            place = level * 39
            low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
            assert value == pytest.approx(low + (place - math.floor(place)) * (high - low))


def test_goals_give_way_in_exactly_one_reward_each_as_often_as_any_other():
    scale = torch.tensor([[-1.0, -1.0, -1.0], [2.0, 2.0, 2.0]])
    goals = sample_goals(scale, 3000, torch.Generator().manual_seed(0))
    below = goals < 2.0
    assert (below.sum(1) == 1).all()
    assert (goals >= -1.0).all()
    assert_close(below.double().mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.04, rtol=0)  # sd .009
    # the least of three uniform draws on [-1, 2] averages -1 + 3 / 4
    assert goals[below].mean().item() == pytest.approx(-0.25, abs=0.05)  # sd .011


def test_goals_are_those_of_the_seed():
    first, again, other = (sample_goals(RELEASED, 8, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert_close(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("rule", ["any", "all"])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.7, 1.0])
def test_what_is_kept_reaches_the_quantile_in_any_or_in_all(rule, quantile):
    kept = keep(SCORES, quantile, rule)
    rows = SCORES.tolist()
    for i, row in enumerate(rows):
        reached = []
        for k in range(3):
            ordered = sorted(other[k] for other in rows)
            place = quantile * (len(rows) - 1)
            low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
            reached.append(row[k] >= low + (place - math.floor(place)) * (high - low) - 1e-6)
        assert kept[i].item() == (any(reached) if rule == "any" else all(reached))
