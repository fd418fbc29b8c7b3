"""The responses to a prompt behind one copy of it: every distinct token of a batch once, and no padding.

A batch is one sequence of N tokens, the distinct prompts and then the responses. What a model does to each token by
itself it does N times; only attention has to know whose tokens these are, and a function of that kind is registered
with the library. It computes rows of similar length together: a prompt sees itself, a response its prompt and itself.
Gradients of a prompt's keys and values are the sums over its responses, by the chain rule and nothing else.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_lab.functional.attention import attention
from rlhf_lab.types import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "shared_prefixes"  # the name of the attention function
ALIKE = 0.6  # rows at least this share of the longest are computed with it; their attention alone is padded
# by which share of its largest state a model may differ from itself, from rounding
ASTRAY = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
Read = Literal["before", "ends"]  # the token before each of the responses, or the last one of each row
FEW = 16  # and so are rows shorter by fewer tokens than this


@dataclass(frozen=True)
class Block:
    """Rows whose attention is computed together."""

    queries: Tensor  # (n, T) int64: places in the sequence; 0 beyond a row's end, of which nothing is read
    keys: Tensor  # (n, S) int64
    mask: Tensor | None  # (n or 1, 1, T, S), added to the attention scores; None: causal


@dataclass(frozen=True)
class Reads:
    """What is read of the last layer, of a batch of tokens end to end.

    Fields:
        blocks: whose queries these are; each has a mask.
        order: (N,) int64: where the N tokens that are read stand among the queries, all blocks end to end.
    """

    blocks: tuple[Block, ...]
    order: Tensor


@dataclass(frozen=True)
class Tree:
    """Distinct prompts and the responses to them as one sequence of N tokens."""

    tokens: Tensor  # (1, N) int64
    position_ids: Tensor  # (1, N) int64
    blocks: tuple[Block, ...]
    order: Tensor  # (N,) int64: where the tokens stand among the outputs of the blocks
    responses: Tensor  # (B, T) int64: places of the response tokens
    before: Tensor  # (B, T) int64: places of the tokens before them, the prompt's last one for the first
    ends: Tensor  # (B,) int64: place of the last token of each row
    asked: tuple[Block, ...]  # what is read of the last layer, if that was said
    asked_at: Tensor  # (B, T) or (B, 1) int64: where its queries stand, all blocks end to end

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a model is called with."""
        return {
            "input_ids": self.tokens,
            "position_ids": self.position_ids,
            # four dimensions: taken as finished, so that no mask of N x N is made
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=dtype, device=self.tokens.device),
            "tree": self,
        }


def siblings(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The distinct prompts, (G, P) with -1 where there is no token, and (B,) int64 the prompt of each row."""
    width = sequences.prompt_width
    prompts = sequences.tokens[:, :width].masked_fill(~sequences.attention_mask[:, :width], -1)
    return torch.unique(prompts, dim=0, return_inverse=True)


def plant(sequences: Sequences, dtype: torch.dtype, read: Read | None = None) -> Tree:
    """Lay rows out with one copy of each prompt.

    Args:
        dtype: of the model, and so of the masks.
        read: at which tokens the last layer is read; None: wherever. Rows without a response have no such tokens.
    """
    device, width = sequences.tokens.device, sequences.prompt_width
    prompts, parent = siblings(sequences)
    prompt_sizes = (prompts >= 0).sum(1)
    spoken = sequences.attention_mask[:, width:]
    sizes = spoken.sum(1)
    prompt_starts = prompt_sizes.cumsum(0) - prompt_sizes
    starts = int(prompt_sizes.sum()) + sizes.cumsum(0) - sizes

    columns = torch.arange(spoken.shape[1], device=device)
    responses = starts[:, None] + columns
    last_of_prompt = (prompt_starts + prompt_sizes - 1)[parent]
    before = torch.where(columns == 0, last_of_prompt[:, None], responses - 1)
    counted = (prompts >= 0).cumsum(1) - 1
    tree_tokens = torch.cat([prompts[prompts >= 0], sequences.tokens[:, width:][spoken]])

    ends = torch.where(sizes > 0, starts + sizes - 1, last_of_prompt)
    if read == "ends" and not bool(sizes.all()):
        read = None  # where nothing was said the end is the prompt's, which no block below asks for
    asked: list[Block] = []
    asked_before = 0
    asked_at = torch.zeros(spoken.shape if read == "before" else (len(sizes), 1), dtype=torch.int64, device=device)
    blocks: list[Block] = []
    order = torch.empty_like(tree_tokens)
    done = 0
    for rows in _alike(prompt_sizes):
        places = torch.arange(int(prompt_sizes[rows].max()), device=device)
        there = places < prompt_sizes[rows][:, None]
        queries = (prompt_starts[rows][:, None] + places).where(there, 0)
        blocks.append(Block(queries, queries, None))
        order[queries[there]] = done + there.view(-1).nonzero()[:, 0]
        done += there.numel()
    for rows in _alike(sizes):
        places = torch.arange(int(sizes[rows].max()), device=device)
        there = places < sizes[rows][:, None]
        queries = (starts[rows][:, None] + places).where(there, 0)
        lengths = prompt_sizes[parent[rows]]
        longest = int(lengths.max())
        # prompts end where the responses begin, so that they are padded on the left
        back = torch.arange(-longest, 0, device=device)
        seen = back >= -lengths[:, None]
        keys = ((last_of_prompt[rows] + 1)[:, None] + back).where(seen, 0)
        if bool(seen.all()):
            seen = seen[:1]
        causal = torch.ones(len(places), len(places), dtype=torch.bool, device=device).tril()
        allowed = torch.cat(
            [seen[:, None].expand(-1, len(places), -1), causal.expand(len(seen), -1, -1)], 2
        )  # (n or 1, T, S)
        keys = torch.cat([keys, queries], 1)
        blocks.append(Block(queries, keys, _barred(allowed, dtype)))
        order[queries[there]] = done + there.view(-1).nonzero()[:, 0]
        done += there.numel()
        if read is None:
            continue
        if read == "before":  # each sees what the one before it sees, the first its prompt alone
            chosen = before[rows, : len(places)].where(there, 0)
            allowed = torch.cat([nn.functional.pad(seen[:, None], (0, len(places))), allowed[:, :-1]], 1)
        else:
            chosen = ends[rows, None]
            allowed = torch.cat([seen.expand(len(rows), -1), there], 1)[:, None]
        asked.append(Block(chosen, keys, _barred(allowed, dtype)))
        asked_at[rows, : chosen.shape[1]] = asked_before + torch.arange(chosen.numel(), device=device).view_as(chosen)
        asked_before += chosen.numel()
    return Tree(
        tokens=tree_tokens[None],
        position_ids=torch.cat([counted[prompts >= 0], sequences.position_ids[:, width:][spoken]])[None],
        blocks=tuple(blocks),
        order=order,
        responses=responses,
        before=before,
        ends=ends,
        asked=tuple(asked),
        asked_at=asked_at,
    )


def _barred(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, T, S) bool -> (n, 1, T, S), added to the attention scores."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )[:, None]


def _alike(sizes: Tensor) -> list[Tensor]:
    """Rows of similar size, the longest first; none of those that are empty."""
    order = sizes.argsort(descending=True, stable=True)
    lengths = sizes[order].tolist()
    groups: list[Tensor] = []
    first = 0
    for i, length in enumerate([*lengths, 0]):
        longest = lengths[first] if first < len(lengths) else 0
        if length == 0 or (length < ALIKE * longest and longest - length >= FEW):
            if i > first:
                groups.append(order[first:i])
            first = i
        if length == 0:
            break
    return groups


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree: Tree | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The library's SDPA attention, and over the blocks of a tree where there is one.

    Raises:
        ValueError: this model's attention is not a plain causal one, so a tree of its tokens is not its rows.
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if other := [name for name in ("sliding_window", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} has attention with {other[0]}")
    by_token = [x.transpose(1, 2).flatten(2)[0] for x in (query, key, value)]  # (N, heads x width)

    def rows(x: Tensor, like: Tensor, places: Tensor) -> Tensor:
        """(N, heads x width) -> (n, heads, T, width)."""
        found = x.index_select(0, places.view(-1))
        return found.view(*places.shape, like.shape[1], like.shape[3]).transpose(1, 2)

    outputs: list[Tensor] = []
    for block in tree.blocks:
        read = attention(
            rows(by_token[0], query, block.queries),
            rows(by_token[1], key, block.keys),
            rows(by_token[2], value, block.keys),
            block.mask,
            options.get("scaling"),
            options.get("dropout", 0.0),
        )
        outputs.append(read.flatten(0, 1))
    said = torch.cat(outputs).index_select(0, tree.order)
    return said.unflatten(-1, (query.shape[1], -1))[None], None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def shares_prefixes(model: "PreTrainedModel") -> bool:
    """Whether the model computes the prompt of several rows once."""
    return getattr(model.config, "_attn_implementation", None) == ATTENTION


@torch.no_grad()
def share_prefixes(model: "PreTrainedModel") -> None:
    """From now on the model computes the prompt of several rows once, after it was seen to say the same of them.

    Raises:
        ValueError: it does not, or its attention is of another kind; it is left as it was.
    """
    config, name = model.config, type(model).__name__
    if shares_prefixes(model):
        return
    if (own := getattr(config, "_attn_implementation", "eager")) != "sdpa":
        raise ValueError(f"{name} computes attention by {own}, not sdpa")
    if other := set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}:
        raise ValueError(f"{name} has layers of {', '.join(sorted(other))}")
    probe = _probe(config.get_text_config().vocab_size, model.device)
    trunk, width = model.base_model, probe.prompt_width
    apart = [
        trunk(input_ids=row[real][None], use_cache=False).last_hidden_state[0, int(real[:width].sum()) :]
        for row, real in zip(probe.tokens, probe.attention_mask, strict=True)
    ]
    expected = torch.cat(apart)
    config._attn_implementation = ATTENTION
    try:
        tree = plant(probe, model.dtype)
        together = trunk(**tree.inputs(model.dtype), use_cache=False).last_hidden_state[0]
    except (ValueError, TypeError, RuntimeError) as error:  # its forward or its attention takes no tree
        config._attn_implementation = own
        raise ValueError(f"{name} computes no responses behind one prompt: {error}") from error
    astray = (together[tree.responses[probe.response_mask]] - expected).abs().max() / expected.abs().max()
    if not astray <= ASTRAY[model.dtype]:
        config._attn_implementation = own
        raise ValueError(f"{name} behind a shared prompt differs from itself by {astray:.1e} of its largest state")


def _probe(vocabulary: int, device: torch.device) -> Sequences:
    """Two prompts with two and three responses, of unequal lengths."""
    sizes = [(5, 3), (5, 6), (2, 4), (2, 1), (2, 7)]
    width, longest = 5, 7
    source = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (6, width), generator=source)
    columns = torch.arange(width + longest)
    tokens = torch.randint(vocabulary, (len(sizes), width + longest), generator=source)
    for row, (prompt, _) in enumerate(sizes):
        tokens[row, :width] = prompts[prompt]
    mask = torch.stack([(columns >= width - prompt) & (columns < width + response) for prompt, response in sizes])
    return Sequences(
        tokens=tokens,
        attention_mask=mask,
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
        response_mask=mask[:, width:],
    ).to(device)
