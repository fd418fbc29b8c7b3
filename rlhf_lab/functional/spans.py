"""Which positions of two responses to one prompt a loss compares."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lab.types import ScoreForward, Sequences

Level = Literal["sequence", "token"]


def diverging(first: Sequences, second: Sequences) -> Tensor:
    """(B, S) bool: from the first token in which two responses differ to the later of their ends; S the wider of both.

    Of equal responses, which differ nowhere, the last position alone.
    """
    width = max(first.response_mask.shape[1], second.response_mask.shape[1])
    mask, other = (_wide(text.response_mask, width) for text in (first, second))
    tokens, others = (_wide(text.tokens[:, text.prompt_width :], width) for text in (first, second))
    either = mask | other
    differ = (mask != other) | (mask & (tokens != others))
    last = torch.arange(width, device=mask.device) == either.sum(1, keepdim=True) - 1
    return either & (differ.cumsum(1) > 0) | last


def carried(x: Tensor, mask: Tensor, width: int) -> Tensor:
    """(B, T) -> (B, width): a row that has ended keeps its last valid entry."""
    place = torch.minimum(torch.arange(width, device=x.device), mask.sum(1, keepdim=True) - 1)
    return x.gather(1, place.clamp(min=0))


def compared(new: ScoreForward, texts: tuple[Sequences, ...], level: Level) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of the two responses of each row that are compared, and what each comparison weighs.

    "sequence" compares the scores at the ends. "token" compares the scores after every token from the first that
    differs to the later end, all weighing the same; a response that has ended keeps its score, so the last comparison
    is that of the ends.

    Returns:
        (B, S) each; the weights of a row sum to 1.

    Source: the two losses of the Safe RLHF release (values/reward/trainer.py). Its token-wise one goes on to the later
    end too, but reads there what the model says of the padding of the shorter response, which means nothing.
    """
    if level == "sequence":
        first, second = new.first[:, None], new.second[:, None]
        return first, second, torch.ones_like(first)
    span = diverging(*texts)
    first, second = (
        carried(scores, text.response_mask, span.shape[1]) for scores, text in zip(new.token_scores, texts, strict=True)
    )
    return first, second, span / span.sum(1, keepdim=True)


def _wide(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[1]))
