"""From scores to advantages."""

import torch
from torch import Tensor


def token_rewards(score: Tensor, penalty: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Spread a response's reward over its tokens: minus the penalty at each, plus the score at the last.

    Args:
        score: (B,) of the whole response.
        penalty: (B, T) per token, e.g. beta times the KL estimate.
        mask: (B, T) bool, True on response tokens.
        clip: bound on the absolute value of each token's *sum*; `inf` for none (Safe RLHF: 50).

    Returns:
        (B, T) rewards, 0 where masked.

    Raises:
        ValueError: a response has no token, so its score has no place.
    """
    if not mask.any(1).all():
        raise ValueError(f"{int((~mask.any(1)).sum())} responses are empty; a response has at least its EOS token")
    rewards = -penalty
    rewards = rewards.scatter_add(1, last_index(mask)[:, None], score[:, None])
    return rewards.clamp(-clip, clip).where(mask, 0)


def last_index(mask: Tensor) -> Tensor:
    """(B,) int64: the column of the last True entry of each row of a (B, T) mask that has one."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over response tokens; the value past the last token is 0.

        delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lam A_{t+1}          R_t = A_t + V_t

    Args:
        rewards, values: (B, T); `values` are those of the state before each token.
        mask: (B, T) bool, True on response tokens, which are contiguous from column 0.

    Returns:
        Advantages and returns (the critic's targets), (B, T) each, 0 where masked.

    Source: Schulman et al. 2016, arXiv:1506.02438, eqs. 11-16.
    """
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    advantages = advantages.where(mask, 0)
    return advantages, (advantages + values).where(mask, 0)
