"""Best of n: the expected value of the best of n samples, from the N >= n samples that were drawn, and its KL."""

import math

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


def expected_best(selector: Tensor, value: Tensor, n: int) -> Tensor:
    """Unbiased estimate, per prompt, of the value of the best of n samples, best by the selector.

    Args:
        selector: (P, N) what the best is chosen by: of an ensemble its aggregate, never a member's. Among equal ones
            the later column counts as better (a stable order).
        value: (P, N) what is measured of the chosen one, in any units; with `selector` itself the proxy's own curve.
        n: 1 gives the mean, N the value of the best.

    Returns:
        (P,) float64.

    Raises:
        ValueError: n is not one of 1 … N, or the shapes differ.
    """
    if selector.shape != value.shape:
        raise ValueError(f"the selector has shape {tuple(selector.shape)}, what it selects {tuple(value.shape)}")
    order = selector.argsort(dim=1, stable=True)
    return value.double().gather(1, order) @ weights(selector.shape[1], n)


def kl_of_best_of_n(n: int) -> float:
    """KL(best of n || the policy that is sampled), nats per response: ln n - (n - 1) / n.

    Exact where no two samples tie, an upper bound otherwise (Beirami et al. 2024, arXiv:2401.01879).

    Source: Coste et al. 2024, arXiv:2310.02743, eq. 1.
    """
    return math.log(n) - (n - 1) / n
