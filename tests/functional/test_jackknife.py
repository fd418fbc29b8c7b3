"""Of a mean the interval is Student's; copies do not shrink it, and prompts stay whole."""

import math

import numpy as np
import pytest
from scipy import stats

from rlhf_lab.functional.jackknife import delete_a_group


def test_leaving_out_one_at_a_time_gives_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=30)
    found = delete_a_group(lambda places: float(values[places].mean()), range(30), groups=30, seed=0)
    reach = stats.t.ppf(0.975, 29) * values.std(ddof=1) / 30**0.5
    assert (found.value, found.low, found.high) == pytest.approx(
        (values.mean(), values.mean() - reach, values.mean() + reach)
    )


def test_rows_of_one_cluster_are_left_out_together():
    values = np.repeat(np.random.default_rng(1).normal(size=20), 5)
    cluster = np.repeat(np.arange(20), 5).tolist()
    whole = delete_a_group(lambda places: float(values[places].mean()), cluster, groups=20, seed=0)
    single = delete_a_group(lambda places: float(values[::5][places].mean()), range(20), groups=20, seed=0)
    assert (whole.low, whole.high) == pytest.approx((single.low, single.high))


def test_coverage_of_a_statistic_that_repeats_would_bend():
    # the share of values that differ: of draws with replacement it would be about .63 times as large
    draws, inside = np.random.default_rng(2), 0
    truth = float(np.mean([len(set(draws.integers(0, 500, 100).tolist())) / 100 for _ in range(400)]))
    for seed in range(200):
        values = draws.integers(0, 500, 100)
        found = delete_a_group(
            lambda places, v=values: len(set(v[places].tolist())) / len(places), range(100), 20, seed
        )
        inside += found.low <= truth <= found.high
    assert 0.9 <= inside / 200 <= 1  # conservative, as the jackknife is


def test_one_cluster_says_nothing_of_others():
    found = delete_a_group(lambda places: 1.0, ["a", "a"], groups=20, seed=0)
    assert (found.low, found.high) == (-math.inf, math.inf)
    found = delete_a_group(lambda places: math.nan if len(places) < 3 else 1.0, range(3), groups=3, seed=0)
    assert math.isnan(found.low)
