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


def uncertainty_weighted(members: Tensor, weight: float, ddof: int) -> Tensor:
    """(B, M) -> (B,): mean - weight * variance (UWO, eq. 5); weight 0 is the mean."""
    return mean(members) - weight * variance(members, ddof)
