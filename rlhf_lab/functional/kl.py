"""Per-token estimators of how far the policy is from the reference, from the log-probabilities of sampled tokens.

With r = pi_ref / pi and samples from pi, three of KL(pi || ref), in nats:
k1 = -log r (unbiased, noisy, may be negative), k2 = (log r)^2 / 2 (biased, low variance), k3 = r - 1 - log r (unbiased,
never negative). Source: Schulman 2020, "Approximating KL divergence".

And one of the chi-squared divergence, D = E_pi[pi / ref] - 1 of whole responses: chi2 sums to pi(y) / ref(y) - 1.
Source: Laidlaw et al. 2024, arXiv:2403.03185; Huang et al. 2024, arXiv:2407.13399.
"""

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
Divergence = Literal["k1", "k2", "k3", "chi2"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Divergence) -> Tensor:
    """Estimate the divergence that each token adds; same shape as the inputs.

    Args:
        logprobs: of the sampled tokens under the policy that sampled them, (..., T).
        ref_logprobs: of the same tokens under the reference; entries equal to `logprobs` (padding: both 0) give 0.

    Returns:
        Nats per token; for chi2 by how much a token raises the ratio of the response so far.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    so_far = log_ratio.cumsum(-1)
    return so_far.exp() - (so_far - log_ratio).exp()
