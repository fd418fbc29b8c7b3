"""Rewards to ask for: what preference weights mean in rewards, what to ask while exploring, and what of it to keep.

Shapes: N responses, K rewards, Q quantiles. A `scale` is (Q, K): for each reward its values at evenly spaced levels,
ascending, so that its first row is the least that may be asked for and its last row the most.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

TargetMap = Literal["linf", "l2", "linear", "quantile"]
KeepRule = Literal["any", "all"]


def empirical_scale(scores: Tensor, low: float, high: float, points: int) -> Tensor:
    """(N, K) scores -> (Q, K): their quantiles at `points` levels from `low` to `high`.

    Levels 0 and 1 are the least and the greatest score; levels inside keep single outliers from setting the range.
    """
    return torch.quantile(scores.double(), torch.linspace(low, high, points, dtype=torch.float64), dim=0)


def gaussian_scale(num_rewards: int, points: int, draws: int = 50_000, seed: int = 8888) -> Tensor:
    """(Q, K): quantiles of standard normal draws, from the least to the greatest, whatever the data are.

    As released with Rewards-in-Context, for its evaluation. The extremes of 50,000 draws lie about four standard
    deviations out, where data are rare, so what is asked for is seldom what was learnt from.
    """
    source = np.random.RandomState(seed)  # the released generator, so that the ranges are the released ones
    drawn = np.stack([source.randn(draws) for _ in range(num_rewards)], axis=1)
    return empirical_scale(torch.from_numpy(drawn), 0.0, 1.0, points)


def targets(weights: Tensor, scale: Tensor, method: TargetMap) -> Tensor:
    """The rewards to ask for on behalf of a preference.

        linf:      lo_k + min(K w_k, 1) (hi_k - lo_k), which is hi_k for the greatest weight
        l2:        lo_k + w_k / |w| (hi_k - lo_k)
        linear:    lo_k + w_k (hi_k - lo_k)
        quantile:  as linf, but in ranks: the score at level min(K w_k, 1)

    Args:
        weights: (K,), 0 or more, summing to 1.
        scale: (Q, K).

    Returns:
        (K,) float64, in the units of the scale, not rounded.

    Source: Yang et al. 2024, arXiv:2402.10207, as released; "quantile" as in its text-to-image part.
    """
    w = weights.double()
    lo, hi = scale[0].double(), scale[-1].double()
    level = (len(w) * w).clamp(max=1)  # 1 for the greatest weight, which is at least 1 / K
    if method == "quantile":
        place = level * (len(scale) - 1)
        below = place.floor().long().clamp(max=len(scale) - 2)
        at = torch.arange(len(w))
        return torch.lerp(scale[below, at].double(), scale[below + 1, at].double(), place - below)
    share = {"linf": level, "l2": w / w.norm(), "linear": w}[method]
    return lo + share * (hi - lo)


def sample_goals(scale: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Rewards to ask for while exploring: every reward at its most but one, which is drawn from its range.

    The one that gives way is the least of K independent uniform draws, which it keeps.

    Args:
        scale: (Q, K).

    Returns:
        (N, K) float64.

    Source: Yang et al. 2024, arXiv:2402.10207, as released.
    """
    lo, hi = scale[0].double(), scale[-1].double()
    u = lo + torch.rand(count, len(lo), dtype=torch.float64, generator=source) * (hi - lo)
    least = torch.zeros_like(u, dtype=torch.bool).scatter(1, u.argmin(1, keepdim=True), True)
    return torch.where(least, u, hi)


def keep(scores: Tensor, quantile: float, rule: KeepRule) -> Tensor:
    """Which responses to learn from: those that reach the quantile in any reward, or in all.

    Args:
        scores: (N, K); the quantiles are theirs, reward by reward, interpolated between neighbours.

    Returns:
        (N,) bool.

    Source: multi-objective rejection sampling, Yang et al. 2024, arXiv:2402.10207; "any" as released.
    """
    reached = scores >= torch.quantile(scores, quantile, dim=0)
    return reached.any(1) if rule == "any" else reached.all(1)
