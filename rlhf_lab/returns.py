"""What a whole response earns: its reward, less the price of its costs and of leaving the reference."""

from collections.abc import Mapping

from torch import Tensor

from rlhf_lab.interfaces import Constraint, Objective
from rlhf_lab.objectives import KLPenalty
from rlhf_lab.types import Metrics, ScoredRollout


def priced_returns(
    scored: ScoredRollout,
    *,
    objective: Objective,
    constraints: Mapping[str, Constraint],
    kl: KLPenalty,
    kl_coef: float,
    reward_clip: float,
    divide_by_prices: bool,
) -> tuple[Tensor, Metrics]:
    """The return of each response, for methods without critics; the multipliers take their step first.

        R = clip(r - beta sum_t k_t)          G = R - sum_j lambda_j c~_j

    c~ is the cost for a bound of the mean, else what makes the gradient that of the bound. Divided by prices,
    G = (r - sum_j lambda_j c~_j) / (1 + sum_j lambda_j) - beta sum_t k_t, as PPO-Lagrangian has it (where R is not
    clipped).

    Args:
        reward_clip: bound on |R|, reward units; `inf` for none.
        divide_by_prices: false as published, and then steps grow with the multipliers.

    Returns:
        (B,) returns in reward units, and what is reported of them.

    Source: HC-RLHF, arXiv:2506.08266.
    """
    columns = scored.columns
    reward = objective(columns, scored.rollout.prompts)  # (B,)
    estimate = kl.estimate(scored)  # (B, T)
    penalty = kl.in_reward(estimate, kl_coef).sum(1)  # (B,)
    returns = (reward - penalty).clamp(-reward_clip, reward_clip)

    metrics: Metrics = {}
    prices = 0.0
    for name, constraint in constraints.items():
        # dual ascent before the policy moves, on the raw costs, as in the reference implementation
        metrics |= {f"lagrange/{name}/{key}": value for key, value in constraint.step(columns[name]).items()}
        returns = returns - constraint.multiplier * constraint.surrogate(columns[name])
        prices += constraint.multiplier
    if divide_by_prices:
        # the penalty beside each cost: it leaves the quotient whole, so a nat costs beta whatever the prices
        returns = (returns - prices * penalty) / (1 + prices)

    distance = estimate.sum(1)
    return returns, metrics | {
        "objective/kl": distance.mean().item(),  # nats per response: the estimate that is penalised
        "objective/kl_coef": kl_coef,
        "objective/scores": reward.mean().item(),
        "objective/rlhf_reward": (reward - kl_coef * distance).mean().item(),
        "objective/return_std": returns.std().item() if len(returns) > 1 else 0.0,
    }


def spread(row_advantages: Tensor, mask: Tensor) -> Tensor:
    """(B,) advantages of whole responses -> (B, T), the same at each of a response's tokens, 0 where masked."""
    return row_advantages[:, None].where(mask, 0)
