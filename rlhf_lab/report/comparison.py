"""Means over seeds and paired differences, with what may be said of them: t intervals, and Holm's for many at once.

A percentile bootstrap over three or five seeds covers far less than it claims; the t interval covers 95% where seeds
scatter about normally, at any number of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
Pair = tuple[tuple[str, ...], tuple[str, ...]]  # (values of the other factors, values of the seeds)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds.

    Fields:
        value: NaN of no seed at all.
        half_width: of the 95% interval, in the same units; NaN where fewer than two seeds leave none.
        num: seeds that have a finite value.
    """

    value: float
    half_width: float
    num: int

    @property
    def low(self) -> float:
        return self.value - self.half_width

    @property
    def high(self) -> float:
        return self.value + self.half_width


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one level of a factor does beside another, by pairs that share the seed and every other factor.

    Fields:
        mean: of the differences, level minus baseline; its `num` counts seeds, over each of which pairs are averaged
            first: runs of one seed share its data and are not independent.
        p: two-sided, of the paired t test over seeds; NaN of fewer than two.
        higher, lower: pairs in which the level has the higher, the lower value.
        num_pairs: of which the difference is finite.
    """

    mean: Mean
    p: float
    higher: int
    lower: int
    num_pairs: int


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean and Student-t interval of independent values; those that are not finite are left out and not counted."""
    finite = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    num = len(finite)
    if num == 0:
        return Mean(value=math.nan, half_width=math.nan, num=0)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, num - 1)) if num > 1 else math.nan
    spread = float(finite.std(ddof=1)) if num > 1 else math.nan
    return Mean(value=float(finite.mean()), half_width=quantile * spread / math.sqrt(num), num=num)


def paired_difference(level: Mapping[Pair, float], baseline: Mapping[Pair, float]) -> Difference:
    """Level minus baseline, where both have a value.

    Args:
        level, baseline: the other factors and the seed -> value. What only one of them has is left out.
    """
    pairs = {
        key: level[key] - baseline[key]
        for key in level
        if key in baseline and math.isfinite(level[key]) and math.isfinite(baseline[key])
    }
    by_seed: dict[tuple[str, ...], list[float]] = {}
    for (_, seed), gap in pairs.items():
        by_seed.setdefault(seed, []).append(gap)
    mean = mean_over_seeds([float(np.mean(gaps)) for gaps in by_seed.values()])
    return Difference(
        mean=mean,
        p=p_value(mean),
        higher=sum(gap > 0 for gap in pairs.values()),
        lower=sum(gap < 0 for gap in pairs.values()),
        num_pairs=len(pairs),
    )


def p_value(mean: Mean) -> float:
    """Two-sided p of the t test that the mean is 0, from its interval; NaN where it has none."""
    if mean.num < 2:
        return math.nan
    if mean.half_width == 0:  # every seed says the same
        return 1.0 if mean.value == 0 else 0.0
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, mean.num - 1))
    return 2 * float(stats.t.sf(abs(mean.value) / mean.half_width * quantile, mean.num - 1))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values, so that all of them together err once in twenty at .05; a NaN stays and is not counted.

    Source: Holm 1979, Scandinavian Journal of Statistics 6(2).
    """
    adjusted, largest = list(p), 0.0
    ranked = sorted((value, place) for place, value in enumerate(p) if math.isfinite(value))
    for rank, (value, place) in enumerate(ranked):
        largest = max(largest, min(1.0, (len(ranked) - rank) * value))
        adjusted[place] = largest
    return adjusted
