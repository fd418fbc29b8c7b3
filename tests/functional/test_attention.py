"""Attention against a loop over rows, heads and queries."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_lab.functional.attention import attention


def looped(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """One query at a time, as it is written."""
    n, heads, length, _ = q.shape
    group = heads // k.shape[1]
    out = []
    for row in range(n):
        for t in range(length):
            for head in range(heads):
                keys, values = k[row, head // group], v[row, head // group]
                scores = [scale * float(q[row, head, t] @ key) for key in keys]
                seen = [bool(x) for x in allowed[row if len(allowed) > 1 else 0, t]]
                largest = max(score for score, there in zip(scores, seen, strict=True) if there)
                weights = [
                    math.exp(score - largest) if there else 0.0 for score, there in zip(scores, seen, strict=True)
                ]
                read = sum(
                    (weight * value for weight, value in zip(weights, values, strict=True)), torch.zeros_like(values[0])
                )
                out.append(read / sum(weights))
    return torch.stack(out).view(n, length, -1)


@pytest.mark.parametrize("width", [8, 32])  # narrow heads are computed otherwise than wide ones
@pytest.mark.parametrize(("heads", "read"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("mask", ["none", "added", "bool", "of each row"])
def test_attention_is_the_loop_over_its_definition(width: int, heads: int, read: int, length: int, mask: str):
    source = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64).transpose(1, 2)  # not contiguous

    keys = length if mask == "none" and length > 1 else 5
    q, k, v = drawn(2, length, heads, width), drawn(2, keys, read, width), drawn(2, keys, read, width)
    allowed = torch.rand(2 if mask == "of each row" else 1, length, keys, generator=source) < 0.6
    allowed[..., 0] = True
    if mask == "none":
        allowed = torch.ones(1, length, keys, dtype=torch.bool)
        allowed = allowed.tril() if length > 1 else allowed
    given = {
        "none": None,
        "bool": allowed[:, None],
        "added": torch.zeros(allowed.shape, dtype=q.dtype).masked_fill(~allowed, -torch.inf)[:, None],
    }
    found = attention(q, k, v, given.get(mask, allowed[:, None]), 0.7)
    assert_close(found, looped(q, k, v, allowed, 0.7), atol=1e-12, rtol=1e-12)
    if length > 1:  # and without a scale, the usual one
        assert_close(
            attention(q, k, v, given.get(mask, allowed[:, None])), looped(q, k, v, allowed, width**-0.5),
            atol=1e-12, rtol=1e-12,
        )  # fmt: skip


def test_weights_are_in_float32_whatever_the_heads_are():
    q, k, v = (torch.randn(1, 1, 40, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    exact = attention(q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float(), None)
    found = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), None)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), exact, atol=0.02, rtol=0.02)


def test_dropout_leaves_weights_out():
    q = k = v = torch.ones(1, 1, 6, 8)
    torch.manual_seed(0)
    assert_close(attention(q, k, v, None), torch.ones(1, 6, 8))
    assert attention(q, k, v, None, dropout=0.5).unique().numel() > 1
