"""How far raters agree beyond chance: kappas for two and for many, alpha for gaps and for ordered values."""

from typing import Literal

import torch
from torch import Tensor

MISSING = -1  # no rating of this item by this rater


def _counts(ratings: Tensor, num_values: int) -> Tensor:
    """(items, raters) values 0 … V - 1 or MISSING -> (items, V) how many raters gave each."""
    values = torch.arange(num_values)
    return (ratings[:, :, None] == values).sum(1).double()


def cohen_kappa(first: Tensor, second: Tensor, num_values: int) -> float:
    """Agreement of two raters on (B,) values 0 … V - 1, over what their own shares of the values make by chance.

    Returns:
        1 for full agreement, 0 for chance; NaN if both always give one and the same value.

    Source: Cohen 1960, Educational and Psychological Measurement 20(1).
    """
    observed = (first == second).double().mean()
    shares = [torch.bincount(each, minlength=num_values).double() / len(each) for each in (first, second)]
    expected = (shares[0] * shares[1]).sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def fleiss_kappa(ratings: Tensor, num_values: int) -> float:
    """Agreement of equally many raters on every item, over what the shares of the values make by chance.

    Args:
        ratings: (items, raters) values 0 … V - 1; who a rater is does not count.

    Returns:
        1 for full agreement, 0 for chance; NaN if only one value was ever given.

    Raises:
        ValueError: an item lacks a rating, or has only one.

    Source: Fleiss 1971, Psychological Bulletin 76(5).
    """
    raters = ratings.shape[1]
    if raters < 2 or bool((ratings == MISSING).any()):
        raise ValueError(
            "Fleiss' kappa needs two or more ratings of every item, equally many; use Krippendorff's alpha"
        )
    counts = _counts(ratings, num_values)
    observed = ((counts.square().sum(1) - raters) / (raters * (raters - 1))).mean()
    expected = (counts.sum(0) / counts.sum()).square().sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def krippendorff_alpha(ratings: Tensor, num_values: int, level: Literal["nominal", "ordinal"]) -> float:
    """One minus observed over expected disagreement, of any number of raters with any gaps.

    Args:
        ratings: (items, raters) values 0 … V - 1, in their order, or MISSING.
        level: whether two values differ more the more ratings lie between them ("ordinal"), or are merely two.

    Returns:
        1 for full agreement, 0 for chance, below 0 for less; NaN if no item has two ratings, or all are equal.

    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability".
    """
    counts = _counts(ratings, num_values)
    counts = counts[counts.sum(1) > 1]
    per_item = counts.sum(1, keepdim=True)
    pairs = counts[:, :, None] * counts[:, None, :] - torch.diag_embed(counts)
    coincidences = (pairs / (per_item[:, :, None] - 1)).sum(0)  # (V, V)
    total = coincidences.sum(0)
    if level == "ordinal":
        reach = total.cumsum(0) - total / 2  # the middle of each value's ranks
        distance = (reach[:, None] - reach[None, :]).square()
    else:
        distance = 1 - torch.eye(num_values, dtype=torch.float64)
    expected = (total[:, None] * total[None, :] * distance).sum() / (total.sum() - 1)
    return float(1 - (coincidences * distance).sum() / expected) if expected > 0 else float("nan")
