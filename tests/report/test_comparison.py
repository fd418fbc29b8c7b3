import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlhf_lab.report.comparison import Mean, holm, mean_over_seeds, p_value, paired_difference


@pytest.mark.parametrize("num", [2, 3, 5, 40])
def test_the_interval_is_students(num: int):
    values = np.random.default_rng(num).normal(3, 2, num)
    low, high = stats.t.interval(0.95, num - 1, loc=values.mean(), scale=stats.sem(values))
    mean = mean_over_seeds(values.tolist())
    assert (mean.value, mean.low, mean.high, mean.num) == (
        pytest.approx(values.mean()),
        pytest.approx(low),
        pytest.approx(high),
        num,
    )


def test_one_value_has_no_interval_and_none_has_no_mean():
    one, none = mean_over_seeds([2.0]), mean_over_seeds([])
    assert (one.value, one.num) == (2.0, 1)
    assert math.isnan(one.half_width)
    assert math.isnan(none.value)
    assert none.num == 0


def test_values_that_are_not_finite_are_not_counted():
    assert mean_over_seeds([1.0, math.nan, 3.0, math.inf]) == mean_over_seeds([1.0, 3.0])


def test_the_interval_covers_what_it_says_where_a_bootstrap_of_three_seeds_does_not():
    noise, repeats = np.random.default_rng(0), 4000
    samples = noise.normal(1.0, 0.5, (repeats, 3))
    covered = np.mean([(mean := mean_over_seeds(row)).low <= 1.0 <= mean.high for row in samples.tolist()])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / repeats)
    drawn = samples[:1000, noise.integers(0, 3, (400, 3))].mean(2)  # (samples, resamples)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    assert np.mean((low <= 1.0) & (high >= 1.0)) < 0.85


def test_a_paired_difference_is_the_paired_t_test():
    noise = np.random.default_rng(1)
    before, after = noise.normal(0, 1, 6), noise.normal(0.4, 1, 6)
    keys = [((), (str(seed),)) for seed in range(6)]
    found = paired_difference(
        dict(zip(keys, after.tolist(), strict=True)), dict(zip(keys, before.tolist(), strict=True))
    )
    oracle: Any = stats.ttest_rel(after, before)
    interval = oracle.confidence_interval(0.95)
    assert found.p == pytest.approx(oracle.pvalue)
    assert (found.mean.low, found.mean.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.higher == int((after > before).sum())
    assert found.higher + found.lower == found.num_pairs == 6


def test_pairs_of_one_seed_are_averaged_before_seeds_are_counted():
    level = {((other,), (seed,)): value for other, seed, value in (("a", "0", 1.0), ("b", "0", 3.0), ("a", "1", 4.0))}
    found = paired_difference(level, {**dict.fromkeys(level, 0.5), (("c",), ("2",)): 9.0})
    assert (found.num_pairs, found.mean.num) == (3, 2)
    assert found.mean == mean_over_seeds([1.5, 3.5])


def test_averaging_within_seeds_keeps_its_level_where_runs_of_a_seed_go_together():
    """Four settings share what their seed does: taken as twelve independent pairs, they would err far too often."""
    noise, repeats, wrong, naive = np.random.default_rng(2), 2000, 0, 0
    for _ in range(repeats):
        gaps = noise.normal(0, 1, (3, 1)) + noise.normal(0, 0.3, (3, 4))
        level = {((str(k),), (str(seed),)): float(gaps[seed, k]) for seed in range(3) for k in range(4)}
        wrong += paired_difference(level, dict.fromkeys(level, 0.0)).p < 0.05
        oracle: Any = stats.ttest_1samp(gaps.ravel(), 0)
        naive += oracle.pvalue < 0.05
    assert abs(wrong / repeats - 0.05) < 4 * math.sqrt(0.05 * 0.95 / repeats)
    assert naive / repeats > 0.3


def test_what_only_one_side_has_or_is_not_finite_makes_no_pair():
    keys = [((), (str(seed),)) for seed in range(4)]
    found = paired_difference({keys[0]: 1.0, keys[1]: math.nan, keys[2]: 2.0}, dict.fromkeys(keys, 0.0))
    assert (found.num_pairs, found.mean.value) == (2, 1.5)
    nothing = paired_difference({}, dict.fromkeys(keys, 0.0))
    assert nothing.num_pairs == nothing.mean.num == 0
    assert math.isnan(nothing.p)


def test_p_of_one_seed_is_unknown_and_of_equal_seeds_certain():
    assert math.isnan(p_value(mean_over_seeds([1.0])))
    assert p_value(Mean(value=0.0, half_width=0.0, num=3)) == 1.0
    assert p_value(Mean(value=0.2, half_width=0.0, num=3)) == 0.0


def test_holm_is_the_step_down_of_the_definition():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # worked by hand
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    adjusted = holm([0.02, math.nan, 0.01])
    assert adjusted[::2] == pytest.approx([0.02, 0.02])
    assert math.isnan(adjusted[1])


def test_holm_keeps_the_chance_of_any_error_below_one_in_twenty():
    noise = np.random.default_rng(3)
    errors = [min(holm(row)) < 0.05 for row in noise.uniform(size=(4000, 8)).tolist()]
    assert np.mean(errors) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 4000)
    assert np.mean(errors) > 0.03  # and is not merely cautious
