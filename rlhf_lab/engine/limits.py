"""What sampling did to the logits besides the temperature, done again to those of whoever reads the responses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lab.functional.sampled import penalised
from rlhf_lab.types import Processing, Sequences


@dataclass(frozen=True)
class Limits:
    """On the logits before N response tokens, of one batch and row by row.

    Nothing of the size of the vocabulary is kept: what was seen before a token, and what was left, is written out for
    the logits at hand.
    """

    processing: Processing
    sequences: Sequences
    row: Tensor  # (N,) int64
    column: Tensor  # (N,) int64, how many response tokens come before
    sizes: Tensor  # (N,) int64: how many tokens top k and top p left; 0 without them
    ids: Tensor  # (M,) int64: those tokens, end to end

    def split(self, size: int) -> "list[Limits]":
        """The limits of consecutive tokens, at most `size` in a part, as `Tensor.split`."""
        sizes = self.sizes.split(size)
        ids = self.ids.split([int(part.sum()) for part in sizes])
        return [
            Limits(self.processing, self.sequences, *part)
            for part in zip(self.row.split(size), self.column.split(size), sizes, ids, strict=True)
        ]

    def __call__(self, logits: Tensor) -> Tensor:
        """(N, V) logits -> those of the distribution that was sampled, but for the temperature."""
        processing = self.processing
        if processing.repetition_penalty != 1:
            logits = penalised(logits, self._seen(logits.shape[1]), processing.repetition_penalty)
        if processing.min_new_tokens:
            stops = torch.tensor(processing.stops, device=logits.device)
            is_stop = torch.isin(torch.arange(logits.shape[1], device=logits.device), stops)
            early = (self.column < processing.min_new_tokens)[:, None] & is_stop
            logits = logits.masked_fill(early, -torch.inf)
        if processing.restricted:
            outside = torch.ones_like(logits, dtype=torch.bool)
            token = torch.arange(len(logits), device=logits.device)
            outside[token.repeat_interleave(self.sizes, output_size=len(self.ids)), self.ids] = False
            logits = logits.masked_fill(outside, -torch.inf)
        return logits

    def _seen(self, vocabulary: int) -> Tensor:
        """(N, V) bool: the tokens of the prompt and of the response before each token."""
        sequences = self.sequences
        place = torch.arange(sequences.tokens.shape[1], device=self.row.device)
        before = sequences.attention_mask[self.row] & (place < sequences.prompt_width + self.column[:, None])
        tokens = sequences.tokens[self.row].where(before, vocabulary)  # padding goes to a column beyond
        seen = torch.zeros(len(tokens), vocabulary + 1, dtype=torch.bool, device=tokens.device)
        return seen.scatter_(1, tokens, True)[:, :vocabulary]


def limits_of(processing: Processing, sequences: Sequences) -> Limits | None:
    """Those of a batch's response tokens, in the order of its mask; None if only the temperature was changed.

    Raises:
        ValueError: top k or top p restricted what was drawn, and the batch does not say to what.
    """
    if processing.repetition_penalty == 1 and not processing.min_new_tokens and not processing.restricted:
        return None
    mask = sequences.response_mask
    row, column = mask.nonzero(as_tuple=True)
    if not processing.restricted:
        return Limits(processing, sequences, row, column, torch.zeros_like(row), row[:0])
    if not sequences.kept:
        raise ValueError(
            "these responses were drawn with top_k or top_p, but which tokens were left is not recorded; sample with "
            "rollout=built_in, or with top_k=0 and top_p=1"
        )
    (kept,) = sequences.kept
    sizes, ids = kept.sizes[mask], torch.cat(kept.ids).to(mask.device).long()
    return Limits(processing, sequences, row, column, sizes, ids)
