"""Rates, ranks and calibration against scipy, slow loops and cases worked by hand."""

import math

import pytest
import scipy
import torch

from rlhf_lab.functional.classification import (
    Bin,
    auc,
    brier,
    coverage,
    effective_size,
    expected_calibration_error,
    pearson,
    ranks,
    reliability,
    spearman,
    wilson,
    wins,
)

DRAW = torch.Generator().manual_seed(0)


def coarse(n):
    """Values with many ties."""
    return torch.randint(0, 7, (n,), generator=DRAW).double()


def test_ranks_share_the_mean_of_ties_as_scipy_has_it():
    x = coarse(60)
    assert ranks(x).tolist() == scipy.stats.rankdata(x.numpy()).tolist()


def test_correlations_are_those_of_scipy():
    x, y = coarse(50), coarse(50)
    y += x
    assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x.numpy(), y.numpy()).statistic, abs=1e-12)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-12)
    assert math.isnan(pearson(x, torch.full_like(x, 0.1)))


def test_auc_is_the_share_of_pairs_in_order():
    score, label = coarse(40), torch.rand(40, generator=DRAW) > 0.6
    pairs = [(a, b) for a in score[label].tolist() for b in score[~label].tolist()]
    slow = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert auc(score, label) == pytest.approx(slow, abs=1e-12)
    assert math.isnan(auc(score, torch.ones(40, dtype=torch.bool)))


def test_a_tie_is_half_a_win():
    assert wins(torch.tensor([0.3, -2.0, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_reliability_by_hand():
    p = torch.tensor([0.5, 0.6, 0.75, 0.9, 1.0])
    bins = reliability(p, torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]), [0.5, 0.75, 0.95, 1.0])
    assert [each.count for each in bins] == [3, 1, 1]  # 0.75 belongs to the bin that ends there
    assert bins[0].predicted == pytest.approx(1.85 / 3)
    assert bins[0].observed == pytest.approx(2 / 3)
    ece = (3 * abs(1.85 / 3 - 2 / 3) + abs(0.9 - 1) + 0) / 5
    assert expected_calibration_error(bins) == pytest.approx(ece, abs=1e-7)
    with pytest.raises(ValueError, match="do not lie in the bins"):
        reliability(p, p, [0.6, 1.0])


def test_an_empty_bin_is_left_out():
    found = reliability(torch.tensor([0.125]), torch.tensor([1.0]), [0.0, 0.5, 1.0])
    assert found == [Bin(predicted=0.125, observed=1.0, count=1)]


def test_probabilities_that_are_true_have_no_calibration_error_and_the_least_brier_score():
    p = torch.rand(200_000, generator=DRAW).double()
    outcome = (torch.rand(200_000, generator=DRAW) < p).double()
    bins = reliability(p, outcome, torch.linspace(0, 1, 11).tolist())
    assert expected_calibration_error(bins) < 0.005
    assert brier(p, outcome) == pytest.approx(1 / 6, abs=0.003)  # the mean of p (1 - p) for a uniform p
    assert brier(p.clamp(0.3, 0.7), outcome) > brier(p, outcome) + 0.01


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (7, 10), (130, 200), (10, 10)])
def test_wilson_is_scipys(successes, n):
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_none_and_all_lie_in_their_intervals_in_spite_of_rounding():
    assert all(wilson(0.0, n)[0] == 0 and wilson(1.0, n)[1] == 1 for n in range(1, 100))


def test_effective_size_is_the_number_of_prompts_if_answers_to_one_agree_and_of_answers_if_independent():
    per_prompt = (torch.rand(400, generator=DRAW) < 0.7).double()
    cluster = torch.arange(400).repeat_interleave(5)
    assert effective_size(per_prompt.repeat_interleave(5), cluster) == pytest.approx(400, rel=0.01)
    assert effective_size((torch.rand(2000, generator=DRAW) < 0.7).double(), cluster) == pytest.approx(2000, rel=0.15)
    assert effective_size(per_prompt, torch.arange(400)) == 400
    assert effective_size(torch.ones(10), torch.arange(10) // 2) == 5


@pytest.mark.parametrize("freedom", [3.0, math.inf])
def test_coverage_of_draws_from_the_law_is_nominal(freedom):
    law = scipy.stats.t(freedom) if math.isfinite(freedom) else scipy.stats.norm()
    spread = torch.rand(40_000, generator=DRAW).double() + 0.5
    residual = torch.from_numpy(law.rvs(40_000, random_state=1)) * spread
    levels = [0.5, 0.8, 0.95]
    assert coverage(residual, spread, freedom, levels) == pytest.approx(levels, abs=0.01)
    assert coverage(residual, spread / 2, freedom, levels)[1] < 0.7  # too sure by a factor of two: seen
