"""Per-token estimators of KL(policy || reference) from the log-probabilities of sampled tokens.

Source: Schulman 2020, "Approximating KL divergence". With r = pi_ref / pi and samples from pi:
k1 = -log r (unbiased, noisy, may be negative), k2 = (log r)^2 / 2 (biased, low variance, its *gradient* is that of
the KL on policy), k3 = r - 1 - log r (unbiased, never negative).
"""

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate the KL of each token, in nats; same shape as the inputs.

    Args:
        logprobs: of the sampled tokens under the policy that sampled them.
        ref_logprobs: of the same tokens under the reference; entries equal to `logprobs` (padding: both 0) give 0.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio
