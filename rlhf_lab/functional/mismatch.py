"""How far the distribution that responses were sampled from is from the one that is learnt, and the weights for it."""

import torch
from torch import Tensor

from rlhf_lab.types import Metrics


def mismatch(sampled: Tensor, learner: Tensor, mask: Tensor) -> Metrics:
    """What an engine's samples say of KL(engine || learner), in nats per token, and of the ratio learner / engine.

    Args:
        sampled, learner: (B, T) log-probabilities of the sampled tokens.
        mask: (B, T) bool, True on them.
    """
    log_ratio = (learner - sampled)[mask].double()
    return {
        # k3 of Schulman 2020: unbiased, never negative
        "rollout/mismatch_kl": (torch.expm1(log_ratio) - log_ratio).mean().item(),
        "rollout/mismatch_ratio_max": log_ratio.max().exp().item(),
        "rollout/mismatch_logprob_max": log_ratio.abs().max().item(),
    }


def truncated_weights(log_ratio: Tensor, cap: float) -> Tensor:
    """min(pi_learner / pi_engine, cap), without gradient.

    Args:
        log_ratio: of tokens or of whole responses, any shape.

    Source: truncated importance sampling, Ionides 2008; for rollout engines, Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training".
    """
    return log_ratio.detach().exp().clamp(max=cap)
