"""How well scores tell better from worse and safe from unsafe: ranks, correlations, calibration, rates; in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import scipy
import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """(N,) ranks from 1, equal values sharing the mean of theirs."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[place]


def pearson(x: Tensor, y: Tensor) -> float:
    """Linear correlation of (N,) values; nan where one of them does not vary."""
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():  # not a spread of 0: rounding can make that positive
        return math.nan
    a, b = x.double() - x.double().mean(), y.double() - y.double().mean()
    return ((a @ b) / (a.norm() * b.norm())).item()


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of the ranks; nan where one does not vary."""
    return pearson(ranks(x), ranks(y))


def auc(score: Tensor, label: Tensor) -> float:
    """How often a (N,) score of the True ones is above that of the others, ties counting half; nan without either.

    Source: the Mann-Whitney statistic is the area under the ROC curve, Hanley and McNeil 1982, Radiology 143:29.
    """
    positives, negatives = int(label.sum()), int((~label).sum())
    if not positives or not negatives:
        return math.nan
    above = ranks(score)[label].sum().item() - positives * (positives + 1) / 2
    return above / (positives * negatives)


def wins(lead: Tensor) -> Tensor:
    """(N,) leads -> 1 where positive, 0 where negative, a half where there is none."""
    return (lead.double().sign() + 1) / 2


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One group of cases: of `count`, what was predicted on the average and what share came true."""

    predicted: float
    observed: float
    count: int


def reliability(probability: Tensor, outcome: Tensor, edges: Sequence[float]) -> list[Bin]:
    """Predicted against observed frequencies in bins (edge, next edge], the first closed; empty ones are left out.

    Args:
        probability: (N,) in [first edge, last edge].
        outcome: (N,) in [0, 1].

    Raises:
        ValueError: a probability is outside the edges.
    """
    if len(probability) and (probability.min() < edges[0] or probability.max() > edges[-1]):
        raise ValueError(
            f"probabilities from {probability.min():.3g} to {probability.max():.3g} do not lie in the bins from "
            f"{edges[0]} to {edges[-1]}"
        )
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    place = torch.bucketize(probability.double(), inner)
    found: list[Bin] = []
    for k in range(len(edges) - 1):
        members = place == k
        if members.any():
            found.append(
                Bin(
                    predicted=probability[members].double().mean().item(),
                    observed=outcome[members].double().mean().item(),
                    count=int(members.sum()),
                )
            )
    return found


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of predicted and observed frequency, weighed by the cases of each bin.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.predicted - each.observed) for each in bins) / total


def brier(probability: Tensor, outcome: Tensor) -> float:
    """Mean squared distance of (N,) probabilities from outcomes; 0.25 for always saying a half.

    Source: Brier 1950, Monthly Weather Review 78:1.
    """
    return (probability.double() - outcome.double()).square().mean().item()


def wilson(rate: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a proportion seen in n independent cases; n may be an effective size.

    Source: Wilson 1927, JASA 22:209, without continuity correction.
    """
    z = float(scipy.stats.norm.ppf(0.975))
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, min(rate, centre - reach)), min(1.0, max(rate, centre + reach))  # 0 and 1 are their own ends


def effective_size(outcome: Tensor, cluster: Tensor) -> float:
    """How many independent cases (N,) outcomes in clusters are worth: their number over the design effect.

    That effect is the variance of the mean as the clusters' sums show it over that of independent cases; it is 1 where
    every case is a cluster of its own, and taken as 1 where it is below. Where all outcomes agree nothing shows how
    alike a cluster's are, so that each is then worth one case.

    Args:
        cluster: (N,) int64; equal values are one cluster (the answers to one prompt).

    Source: Kish 1965, Survey Sampling, section 8.2; in Wilson's interval, Korn and Graubard 1998.
    """
    n, x = len(outcome), outcome.double()
    _, place = cluster.unique(return_inverse=True)
    clusters = int(place.max()) + 1
    independent = x.var(correction=0).item() / n
    if clusters in (1, n) or independent == 0:
        return float(clusters)
    sums = torch.zeros(clusters, dtype=torch.float64).index_add_(0, place, x - x.mean())
    variance = clusters / (clusters - 1) * sums.square().sum().item() / n**2
    return n / max(1.0, variance / independent)


def coverage(residual: Tensor, deviation: Tensor, freedom: float, levels: Sequence[float]) -> list[float]:
    """For each level, the share of (N,) residuals within the central Student interval of that probability.

    Args:
        deviation: (N,) predicted standard deviation of each residual.
        freedom: degrees of freedom; infinite for a normal law.
    """
    t = (residual / deviation).abs().double()
    law = scipy.stats.norm if math.isinf(freedom) else scipy.stats.t(freedom)
    return [(t <= float(law.ppf((1 + level) / 2))).double().mean().item() for level in levels]
