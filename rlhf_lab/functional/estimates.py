"""A number with its 95 % interval, of rows that come in clusters: the responses to one prompt are not independent."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lab.functional.classification import effective_size, wilson
from rlhf_lab.functional.resampling import mean_interval
from rlhf_lab.types import Metrics


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What was measured, and where it may lie."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> Metrics:
        """As metrics: its mean, its interval, and half the width of that, by which pictures draw it."""
        return {
            f"{name}/mean": self.value,
            f"{name}/low": self.low,
            f"{name}/high": self.high,
            f"{name}/ci95": (self.high - self.low) / 2,
        }


def mean(values: Tensor, cluster: Tensor) -> Estimate:
    """The mean over clusters of their means, with its Student-t interval; unbounded for a single cluster.

    Args:
        values: (N,).
        cluster: (N,) int64; equal values are one cluster.
    """
    value, reach = mean_interval(cluster_means(values, cluster))
    return Estimate(value=value, low=value - reach, high=value + reach)


def cluster_means(values: Tensor, cluster: Tensor) -> Tensor:
    """(C,) means, float64, of the clusters in ascending order."""
    found, place, count = cluster.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(found), dtype=torch.float64).index_add_(0, place, values.double())
    return sums / count


def rate(outcome: Tensor, cluster: Tensor) -> Estimate:
    """The mean of (N,) outcomes in [0, 1], with Wilson's interval at their effective number."""
    value = outcome.double().mean().item()
    low, high = wilson(value, effective_size(outcome, cluster))
    return Estimate(value=value, low=low, high=high)


def bootstrapped(statistic: Callable[[Tensor], float], cluster: Tensor, draws: int, seed: int) -> Estimate:
    """A statistic of rows with its percentile interval, whole clusters drawn again.

    Args:
        statistic: row indices (int64, with repetitions) -> number; draws in which it is nan are left out, and if every
            tenth is, the interval is nan. A single cluster, which says nothing of others, has an unbounded one.
        cluster: (N,) int64; equal values are drawn together.

    Source: Efron 1979, Annals of Statistics 7:1; with clusters, Davison and Hinkley 1997, section 3.8.
    """
    value = statistic(torch.arange(len(cluster)))
    _, place, count = cluster.unique(return_inverse=True, return_counts=True)
    clusters = len(count)
    if clusters < 2:
        return Estimate(value=value, low=-math.inf, high=math.inf)
    order = place.argsort(stable=True)
    padded = torch.full((clusters, int(count.max())), -1, dtype=torch.int64)  # (C, largest) row indices
    starts = count.cumsum(0) - count
    padded[place[order], torch.arange(len(order)) - starts[place[order]]] = order
    draw = torch.Generator().manual_seed(seed)
    found: list[float] = []
    for _ in range(draws):
        rows = padded[torch.randint(clusters, (clusters,), generator=draw)].flatten()
        found.append(statistic(rows[rows >= 0]))
    known = torch.tensor([each for each in found if not math.isnan(each)], dtype=torch.float64)
    if len(known) <= 0.9 * draws:
        return Estimate(value=value, low=math.nan, high=math.nan)
    low, high = known.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value=value, low=low, high=high)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """One less the other, of independent estimates, from their intervals; these may be lopsided.

    Source: Zou and Donner 2008, Statistics in Medicine 27:1693; of Wilson's intervals, method 10 of Newcombe 1998.
    """
    value = one.value - other.value
    low = math.hypot(one.value - one.low, other.high - other.value)
    high = math.hypot(one.high - one.value, other.value - other.low)
    return Estimate(value=value, low=value - low, high=value + high)


def difference_of_shares(one: Tensor, other: Tensor, cluster: Tensor) -> Estimate:
    """One less the other, of (N,) outcomes in [0, 1] of the same cases, with Student's interval over clusters.

    Where no cluster differs from another there is no spread, which is no reason to be sure: the interval is then that
    of independent shares.
    """
    within = one.double() - other.double()
    means = cluster_means(within, cluster)
    if means.min() == means.max():
        return difference(rate(one, cluster), rate(other, cluster))
    return mean(within, cluster)
