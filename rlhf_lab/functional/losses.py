"""Losses per token or per row, unaveraged and to be minimised."""

import torch
import torch.nn.functional as F
from torch import Tensor


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's policy loss of each token: -min(q A, clamp(q, 1 - clip, 1 + clip) A), q = pi / pi_old.

    All arguments (B, T). Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7, negated: we minimise.
    """
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, clip: float) -> Tensor:
    """(B, T): 1.0 where the ratio pi / pi_old lies outside [1 - clip, 1 + clip]; a diagnostic."""
    return ((logprobs - old_logprobs).exp() - 1).abs().gt(clip).float()


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each value, the worse of it and of the value kept within `clip` of the old one.

    All arguments (B, T), in the units of the stream's return. Source: the value loss of PPO's released code.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def bradley_terry(preferred: Tensor, other: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Negative log-likelihood that `preferred` beats `other`: -log sigmoid(preferred - other - margin); (B,)."""
    return -F.logsigmoid(preferred - other - margin)


def probit(mean_w: Tensor, mean_l: Tensor, log_variance_w: Tensor, log_variance_l: Tensor) -> Tensor:
    """Negative log-likelihood that one normal variable beats another, -log Phi((m_w - m_l) / sqrt(v_w + v_l)); (B,).

    Source: Thurstone 1927, case III (independent, unequal variances).
    """
    deviation = torch.logaddexp(log_variance_w, log_variance_l).mul(0.5).exp()
    return -torch.special.log_ndtr((mean_w - mean_l) / deviation)
