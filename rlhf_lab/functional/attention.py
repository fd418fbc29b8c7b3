"""Attention, computed in the way that is quickest for its shape."""

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW, SHORT = 32, 256  # head width below which, and keys up to which, products are quicker on a CPU


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ · scale + mask) v, heads side by side (Vaswani et al. 2017, eq. 1).

    On a CPU, one query at a time or narrow heads are computed as two products, and all else by the library's kernel.

    Args:
        q: (n, H, T, D).
        k, v: (n, H / G, S, D): a key is read by G heads of queries (Ainslie et al. 2023).
        mask: (n or 1, 1, T, S), added to the scores, or bool, True where a key is seen; None: causal, or all of S where
            T = 1.
        scale: None: one by the root of D.
        dropout: share of the weights that are left out.

    Returns:
        (n, T, H · D).
    """
    rows, heads, length, width = q.shape
    by_products = q.device.type == "cpu" and (length == 1 or (width < NARROW and k.shape[2] <= SHORT))
    if not by_products or dropout:
        causal, grouped = mask is None and length > 1, heads != k.shape[1]
        read = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)
        return read.transpose(1, 2).reshape(rows, length, heads * width)
    factor = width**-0.5 if scale is None else scale
    by_key = (q * factor).reshape(rows, k.shape[1], -1, width)  # (n, H / G, G · T, D)
    scores = (by_key @ k.transpose(-1, -2)).view(rows, heads, length, -1)
    if mask is None and length > 1:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    read = weights.view(rows, k.shape[1], -1, weights.shape[-1]) @ v
    return read.view(q.shape).transpose(1, 2).reshape(rows, length, heads * width)
