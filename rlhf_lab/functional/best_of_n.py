"""Best of n: the expected value of the best of n samples, from the N >= n samples that were drawn, and its KL."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def weights(num_samples: int, n: int) -> Tensor:
    """(N,) float64: the chance that the i-th worst of N samples is the best of n that are drawn from them.

    C(i - 1, n - 1) / C(N, n) for i = 1 … N, by the recurrence w_N = n / N, w_{i-1} = w_i (i - n) / (i - 1): no
    factorial is formed, so N may be tens of thousands.

    Raises:
        ValueError: n is not one of 1 … N.

    Source: the unbiased estimator of Nakano et al. 2021, arXiv:2112.09332, appendix I.
    """
    if not 1 <= n <= num_samples:
        raise ValueError(f"the best of {n} cannot be told from {num_samples} samples; n must be 1 to {num_samples}")
    i = torch.arange(num_samples, 1, -1, dtype=torch.float64)
    factors = torch.cat([torch.tensor([n / num_samples], dtype=torch.float64), ((i - n) / (i - 1)).clamp(min=0)])
    return factors.cumprod(0).flip(0)


def ascending(selector: Tensor) -> Tensor:
    """(P, N) int64: the samples of each prompt from worst to best; of equal ones the later counts as better."""
    scores = selector.double().numpy()
    order = np.argsort(scores, axis=1)  # five times faster than a stable sort, and the same where nothing ties
    tied = np.flatnonzero((np.diff(np.take_along_axis(scores, order, axis=1), axis=1) == 0).any(axis=1))
    order[tied] = np.argsort(scores[tied], axis=1, kind="stable")
    return torch.from_numpy(order)


def curves(selector: Tensor, values: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    """Unbiased estimates, per prompt, of what the best of n samples has, best by the selector, for every n of a grid.

    Args:
        selector: (P, N) what the best is chosen by, all finite: of an ensemble its aggregate, never a member's. Among
            equal ones the later column counts as better (a stable order).
        values: K of (P, N), what is measured of the chosen one, in any units; `selector` itself is the proxy's curve.
        grid: 1 gives the mean, N the value of the best.

    Returns:
        (P, G, K) float64. The samples are sorted once; 1000 x 12,500 take a third of a second, and .1 for each value.

    Raises:
        ValueError: an n is not one of 1 … N, or the shapes differ.
    """
    if odd := [tuple(value.shape) for value in values if value.shape != selector.shape]:
        raise ValueError(f"the selector has shape {tuple(selector.shape)}, what it selects {odd[0]}")
    order = ascending(selector)
    by_n = torch.stack([weights(selector.shape[1], n) for n in grid], dim=1)  # (N, G)
    return torch.stack([value.double().gather(1, order) @ by_n for value in values], dim=2)


def expected_best(selector: Tensor, value: Tensor, n: int) -> Tensor:
    """(P,) `curves` of one value at one n."""
    return curves(selector, [value], [n])[:, 0, 0]


def kl_of_best_of_n(n: int) -> float:
    """KL(best of n || the policy that is sampled), nats per response: ln n - (n - 1) / n.

    Exact where no two samples tie, an upper bound otherwise (Beirami et al. 2024, arXiv:2401.01879).

    Source: Coste et al. 2024, arXiv:2310.02743, eq. 1.
    """
    return math.log(n) - (n - 1) / n
