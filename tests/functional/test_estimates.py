"""Intervals hold what they promise: against scipy, by simulation with clusters, and in a published case."""

import math

import pytest
import scipy
import torch

from rlhf_lab.functional.classification import pearson
from rlhf_lab.functional.estimates import (
    Estimate,
    bootstrapped,
    cluster_means,
    difference,
    difference_of_shares,
    mean,
    rate,
)


def test_the_interval_of_a_mean_is_students_over_clusters():
    values = torch.tensor([1.0, 3.0, 5.0, 6.0, 0.0, 2.5])
    cluster = torch.tensor([7, 7, 2, 2, 9, 4])
    assert cluster_means(values, cluster).tolist() == [5.5, 2.5, 2.0, 0.0]
    low, high = scipy.stats.t.interval(0.95, 3, 2.5, scipy.stats.sem([5.5, 2.5, 2.0, 0.0]))
    found = mean(values, cluster)
    assert (found.value, found.low, found.high) == pytest.approx((2.5, low, high))
    assert mean(values, torch.zeros(6)).high == math.inf


def test_a_rate_of_clustered_outcomes_covers_the_truth_where_one_of_independent_rows_does_not():
    draw = torch.Generator().manual_seed(0)
    cluster = torch.arange(150).repeat_interleave(4)
    held, naive = 0, 0
    for _ in range(300):
        outcome = (torch.rand(150, generator=draw) < 0.8).double().repeat_interleave(4)
        for alike in (True, False):
            found = rate(outcome, cluster if alike else torch.arange(600))
            covered = found.low <= 0.8 <= found.high
            held, naive = held + (alike and covered), naive + (not alike and covered)
    assert 0.91 <= held / 300 <= 0.98
    assert naive / 300 < 0.8


def test_the_bootstrap_draws_whole_clusters():
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(200, generator=draw).double().repeat_interleave(6)[torch.randperm(1200, generator=draw)]
    cluster = values.unique(return_inverse=True)[1]
    found = bootstrapped(lambda rows: values[rows].mean().item(), cluster, 2000, 0)
    error = cluster_means(values, cluster).std(correction=0).item() / math.sqrt(200)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)  # six times the rows do not narrow it
    assert bootstrapped(lambda rows: values[rows].mean().item(), cluster, 50, 0) == bootstrapped(
        lambda rows: values[rows].mean().item(), cluster, 50, 0
    )


def test_the_bootstrap_draws_clusters_of_any_size():
    cluster = torch.tensor([5, 5, 5, 1, 9, 9])
    sizes = {1: 1, 5: 3, 9: 2}
    seen: set[int] = set()

    def count(rows):
        drawn = cluster[rows].bincount(minlength=10)
        assert all(int(drawn[k]) % size == 0 for k, size in sizes.items())  # whole, each as often as it was drawn
        assert sum(int(drawn[k]) // size for k, size in sizes.items()) == 3
        seen.add(len(rows))
        return float(len(rows))

    bootstrapped(count, cluster, 100, 0)
    assert {3, 6, 9} <= seen


def test_the_bootstrap_of_a_correlation_is_near_fishers_interval():
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(500, generator=draw)
    y = 0.6 * x + 0.8 * torch.randn(500, generator=draw)
    found = bootstrapped(lambda rows: pearson(x[rows], y[rows]), torch.arange(500), 1000, 0)
    theirs = scipy.stats.pearsonr(x.numpy(), y.numpy()).confidence_interval()
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_one_cluster_says_nothing_of_others():
    found = bootstrapped(lambda rows: float(len(rows)), torch.zeros(5, dtype=torch.int64), 10, 0)
    assert (found.value, found.low, found.high) == (5.0, -math.inf, math.inf)


def test_shares_of_the_same_cases_are_compared_case_by_case_unless_none_differs():
    one, other = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    found = difference_of_shares(one, other, torch.arange(4))
    low, high = scipy.stats.t.interval(0.95, 3, 0.25, scipy.stats.sem([1.0, 0, 0, 0]))
    assert (found.value, found.low, found.high) == pytest.approx((0.25, low, high))
    same = difference_of_shares(one, one, torch.arange(4))
    assert same.value == 0.0
    wilson = scipy.stats.binomtest(3, 4).proportion_ci(method="wilson")
    assert same.high == pytest.approx(math.hypot(wilson.high - 0.75, 0.75 - wilson.low))


def test_a_statistic_that_is_seldom_defined_has_no_interval():
    rows = torch.tensor([0.0, 0.0, 0.0, 1.0])
    found = bootstrapped(lambda drawn: pearson(rows[drawn], rows[drawn]), torch.arange(4), 200, 0)
    assert found.value == pytest.approx(1.0)
    assert math.isnan(found.low)


def test_the_difference_of_two_rates_is_newcombes_method_10():
    # 56/70 against 48/80: 0.0524 to 0.3339 (Newcombe 1998, Statistics in Medicine 17:873, table II, case a)
    one, other = (rate(torch.arange(n) < k, torch.arange(n)) for k, n in ((56, 70), (48, 80)))
    found = difference(one, other)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_metrics_of_an_estimate():
    assert Estimate(value=1.0, low=0.0, high=3.0).named("x") == {
        "x/mean": 1.0,
        "x/low": 0.0,
        "x/high": 3.0,
        "x/ci95": 1.5,
    }
