"""Means and moments over the valid entries of padded tensors."""

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the entries of `x` where `mask` is True, all weighing the same.

    Raises:
        ValueError: the mask has no True entry.
    """
    if not mask.any():
        raise ValueError("mean over an empty mask: no entry is valid")
    return x.where(mask, 0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale the valid entries of `x` to mean 0 and variance 1 (population variance); 0 elsewhere.

    One scale for the whole tensor, whatever the lengths of its rows. Entries that are all equal become 0.
    """
    centred = x - masked_mean(x, mask)
    # again: among entries that are all equal, the rounding of one mean would pass for spread
    centred = centred - masked_mean(centred, mask)
    variance = masked_mean(centred.square(), mask)
    return (centred * torch.rsqrt(variance + 1e-8)).where(mask, 0)
