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


LEAST_SPREAD = 1e-4  # reward units: what equal responses may differ by, scored in different batches


def leave_one_out(returns: Tensor, group: Tensor) -> Tensor:
    """Subtract from each return the mean return of the other responses to its prompt.

    Args:
        returns: (B,) in reward units, after the KL penalty and the priced cost.
        group: (B,) int64; equal values answer the same prompt. Order and group sizes are free.

    Returns:
        (B,) advantages; they sum to zero within each group.

    Raises:
        ValueError: a group has one response, so it has no others.

    Source: REINFORCE leave-one-out, Ahmadian et al. 2024, arXiv:2402.14740.
    Note: subtracting the whole group's mean instead, a plain group baseline, gives (n - 1) / n times this.
    """
    place, size, total = _grouped(returns, group)
    others = (total[place] - returns) / (size[place] - 1)
    return returns - others


def group_relative(returns: Tensor, group: Tensor, *, scale_by_sd: bool) -> Tensor:
    """Subtract from each return the mean of its group, and divide by the group's standard deviation.

    Args:
        returns, group: (B,) each, as in `leave_one_out`.
        scale_by_sd: whether to divide. A group that spreads less than LEAST_SPREAD is divided by that instead: its
            advantages stay near zero, and equal returns give exactly zero.

    Returns:
        (B,) advantages; they sum to zero within each group.

    Raises:
        ValueError: a group has one response, so it has nothing to be compared with.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; the deviation divides by the group's size.
    """
    place, size, total = _grouped(returns, group)
    centred = returns - (total / size)[place]
    if not scale_by_sd:
        return centred
    variance = torch.zeros_like(total).index_add(0, place, centred.square()) / size
    return centred / variance.sqrt().clamp(min=LEAST_SPREAD)[place]


def _grouped(returns: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) place of each row's group among the groups, and of each of these the size and the sum of returns."""
    _, place, size = group.unique(return_inverse=True, return_counts=True)
    if size.min() < 2:
        raise ValueError(
            f"{int((size < 2).sum())} of {len(size)} prompts have one response, which has no siblings to be compared "
            "with; set stage.samples_per_prompt to 2 or more"
        )
    return place, size, torch.zeros(len(size), dtype=returns.dtype).index_add(0, place, returns)
