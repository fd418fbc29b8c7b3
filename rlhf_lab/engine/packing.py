"""Several rows in one sequence, none of which sees another: the loss of SFT without the padding between short rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lab.engine.forward import policy_logprobs, token_logprobs
from rlhf_lab.types import Batch, PolicyForward, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ASTRAY = 1e-3  # nats per token by which a row may differ when it is packed, from rounding


@dataclass(frozen=True, kw_only=True)
class PackedBatch(Batch):
    """Rows laid end to end, B sequences of L tokens, padded right.

    Example: rows of 3, 2 and 4 tokens in sequences of at most 6 give
        row = [[2, 2, 2, 2, 1, 1], [0, 0, 0, -1, -1, -1]]
    """

    tokens: Tensor  # (B, L) int64
    row: Tensor  # (B, L) int64: the row that a token belongs to; -1 for padding
    position_ids: Tensor  # (B, L) int64, 0 at the first token of each row
    token_mask: Tensor  # (B, L) bool, True on the tokens that are learnt

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: real tokens of each sequence."""
        return (self.row >= 0).sum(1)


def pack(sequences: Sequences, longest: int) -> PackedBatch:
    """Lay rows end to end in sequences of at most `longest` tokens; a longer row has a sequence of its own.

    The longest rows first, each where it still fits, which leaves little room unused. What is learnt of each row, and
    its positions, stay as they are.
    """
    sizes = sequences.lengths
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sizes.argsort(descending=True, stable=True).tolist():
        size = int(sizes[row])
        place = next((k for k, left in enumerate(room) if size <= left), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max(longest, size))
        bins[place].append(row)
        room[place] -= size
    width = max(int(sizes[rows].sum()) for rows in bins)
    mask = torch.cat(
        [torch.zeros_like(sequences.attention_mask[:, : sequences.prompt_width]), sequences.response_mask], 1
    )
    packed = PackedBatch(
        tokens=torch.zeros(len(bins), width, dtype=torch.int64),
        row=torch.full((len(bins), width), -1),
        position_ids=torch.zeros(len(bins), width, dtype=torch.int64),
        token_mask=torch.zeros(len(bins), width, dtype=torch.bool),
    )
    for k, rows in enumerate(bins):
        start = 0
        for row in rows:
            real = sequences.attention_mask[row]
            place = slice(start, start + int(sizes[row]))
            packed.tokens[k, place] = sequences.tokens[row][real]
            packed.position_ids[k, place] = sequences.position_ids[row][real]
            packed.token_mask[k, place] = mask[row][real]
            packed.row[k, place] = row
            start = place.stop
    return packed


def packed_forward(model: "PreTrainedModel", batch: PackedBatch) -> PolicyForward:
    """Log-probability and entropy of each token that is learnt, (B, L), 0 elsewhere; a row attends to itself alone."""
    length = batch.tokens.shape[1]
    same = batch.row[:, :, None] == batch.row[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
    # (B, 1, L, L), added to the attention scores: eager and SDPA attention both take it as it is
    barred = torch.zeros(same.shape, dtype=model.dtype, device=same.device)
    barred.masked_fill_(~(same & causal), torch.finfo(model.dtype).min)
    logits = model(
        input_ids=batch.tokens, attention_mask=barred[:, None], position_ids=batch.position_ids, use_cache=False
    ).logits[:, :-1]
    said, spread = token_logprobs(logits, batch.tokens[:, 1:], 1.0)
    learnt = batch.token_mask[:, 1:]
    empty = said.new_zeros(len(said), 1)
    return PolicyForward(
        torch.cat([empty, said.where(learnt, 0)], 1), torch.cat([empty, spread.where(learnt, 0)], 1), values={}
    )


@torch.no_grad()
def check_packing(model: "PreTrainedModel", sequences: Sequences) -> None:
    """Refuse a model that does not keep packed rows apart, found by comparing it with itself on these rows.

    Raises:
        ValueError: it says something else of the rows when they are packed.
    """
    attention = getattr(model.config, "_attn_implementation", "eager")
    advice = "set stage.pack_tokens=0"
    if attention not in ("eager", "sdpa"):
        raise ValueError(f"stage.pack_tokens needs eager or sdpa attention, the model uses {attention}; {advice}")
    apart = policy_logprobs(model, sequences).sum(1)
    packed = pack(sequences, int(sequences.lengths.sum())).to(apart.device)
    said = packed_forward(model, packed).logprobs
    together = torch.zeros_like(apart).index_add(0, packed.row[packed.token_mask], said[packed.token_mask])
    astray = ((together - apart).abs() / sequences.response_mask.sum(1)).max().item()
    if not astray <= ASTRAY:
        raise ValueError(
            f"{type(model).__name__} does not keep packed rows apart: packed, a row differs by {astray:.4f} nats per "
            f"token; {advice}"
        )
