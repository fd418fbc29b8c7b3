"""From a model's logits to the distribution that tokens are drawn from, and the draw itself."""

import torch
from torch import Tensor


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were there before less likely: positive logits are divided by the penalty, others multiplied.

    Args:
        logits: (..., V).
        seen: (..., V) bool, True for the tokens of the prompt and of the response so far.

    Source: the repetition penalty of CTRL, Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def restricted(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(B, V) logits at a temperature; -inf outside the top k and outside the nucleus of mass top_p.

    Args:
        top_k: 0 keeps all.
        top_p: 1 keeps all; the likeliest token always stays.

    Source: the nucleus of Holtzman et al. 2020, arXiv:1904.09751.
    """
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(-1)
        mass_before = mass.cumsum(-1) - mass
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, mass_before >= top_p)
        outside.scatter_(1, order[:, :1], False)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """(B, V) log-probabilities and (B,) uniform numbers -> (B,) tokens, by inverting each row's distribution.

    A row's token depends on its own number only, so responses do not depend on how rows are batched.
    """
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    # scaled by the total, which rounding leaves a little off 1, and right-sided: a token of probability 0 cannot be hit
    return torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True)[:, 0]
