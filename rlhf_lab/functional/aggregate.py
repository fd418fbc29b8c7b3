"""From the scores of an ensemble's members to one score. The same functions serve PPO, best-of-n and annotation.

Source: Coste et al. 2024, arXiv:2310.02743, section 3.3, eqs. 3-5.
"""

import torch
from torch import Tensor


def mean(members: Tensor) -> Tensor:
    """(B, M) -> (B,): the average member."""
    return members.mean(1)


def worst_case(members: Tensor) -> Tensor:
    """(B, M) -> (B,): the most pessimistic member (WCO)."""
    return members.amin(1)


def variance(members: Tensor, ddof: int) -> Tensor:
    """(B, M) -> (B,): variance within the ensemble, sum of squares over M - ddof.

    `ddof=0` is the paper's eq. 5 and its best-of-n code; its PPO code used 1, a 25 % larger penalty at M = 5.

    Raises:
        ValueError: M - ddof is not positive, so there is no such variance.
    """
    if members.shape[1] <= ddof:
        raise ValueError(
            f"a variance with ddof={ddof} needs more than {ddof} members, found {members.shape[1]}; "
            "set reward_ensemble.aggregate.ddof=0"
        )
    return torch.var(members, dim=1, correction=ddof)


def total_variance(members: Tensor, variances: Tensor) -> Tensor:
    """(B, M) means and (B, M) variances -> (B,): variance of a score that a member drawn at random would draw.

    What the members are unsure of on average, and what they disagree on (ddof 0): the law of total variance.
    """
    return variances.mean(1) + variance(members, 0)


def lower_confidence(members: Tensor, variances: Tensor, weight: float) -> Tensor:
    """(B, M) means and (B, M) variances -> (B,): mean - weight * standard deviation, of the total variance.

    The weight is in standard deviations; 0 is the mean.
    """
    return mean(members) - weight * total_variance(members, variances).sqrt()


def uncertainty_weighted(members: Tensor, weight: float, ddof: int) -> Tensor:
    """(B, M) -> (B,): mean - weight * variance (UWO, eq. 5); weight 0 is the mean."""
    return mean(members) - weight * variance(members, ddof)
