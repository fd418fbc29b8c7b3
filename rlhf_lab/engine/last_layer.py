"""The last layer only at the tokens that somebody reads.

Its keys and values are of all tokens; its queries, output projection and MLP, of those alone that a head reads: one of
a row for a value model, those before responses for a policy. In a model of L layers that saves up to 1/L of a pass.
It is done where the last layer is a Llama's (Llama, Mistral, Qwen2 and what is built like them), after a probe has
shown that the model says the same; any other model, and one in shards, computes every token to the end.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_lab.engine.prefixes import ASTRAY, Block, Reads
from rlhf_lab.functional.attention import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = (3, 7)  # rows and tokens of the probe


class Replayed:
    """In the place of a layer's forward pass: what it is said to return, which nothing may compute instead."""

    def __init__(self, returned: Sequence[Any]) -> None:
        self.returned, self.calls = returned, 0

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        self.calls += 1
        return self.returned[self.calls - 1]


def rows_read(there: Tensor, columns: Tensor, counted: Tensor, dtype: torch.dtype) -> Reads:
    """Reads of rows side by side.

    Args:
        there: (B, W) bool, True where a row has a token.
        columns: (B or 1, T) int64, where each row's queries are.
        counted: (B, T) bool, the queries that are read.
        dtype: of the model, and so of the mask.
    """
    rows, width = there.shape
    starts = torch.arange(rows, device=there.device)[:, None] * width
    places = torch.arange(width, device=there.device)
    allowed = there[:, None] & (places <= columns[..., None])
    barred = torch.zeros(allowed.shape, dtype=dtype, device=there.device)
    barred.masked_fill_(~allowed, torch.finfo(dtype).min)
    block = Block((starts + columns).expand(counted.shape), starts + places, barred[:, None])
    return Reads((block,), counted.reshape(-1).nonzero()[:, 0])


@contextmanager
def reading(trunk: Any, reads: Reads) -> Iterator[None]:
    """Within it a forward pass of the trunk returns (1, N, D) states of what is read, and no others."""
    layer = trunk.layers[-1]
    before = vars(layer).get("forward")
    if isinstance(before, Replayed):
        yield
        return
    # also in the place of a pass that would be computed again in backward: that would come right after this one
    layer.forward = partial(_forward, layer, reads)
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _forward(
    layer: Any, reads: Reads, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **_options: Any
) -> Tensor:
    """A Llama's layer."""
    x = hidden_states.flatten(0, 1)  # (tokens, D)
    asked = torch.cat([block.queries.reshape(-1) for block in reads.blocks])
    cosines, sines = (part.flatten(0, 1)[:, None] for part in position_embeddings)  # (tokens, 1, head width)
    states = layer.input_layernorm(x)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, layer.self_attn.head_dim))

    q = _rotated(heads(layer.self_attn.q_proj(states[asked])), cosines[asked], sines[asked])
    k = _rotated(heads(layer.self_attn.k_proj(states)), cosines, sines)
    v = heads(layer.self_attn.v_proj(states))
    said, start = [], 0
    for block in reads.blocks:
        end = start + block.queries.numel()
        read = attention(
            q[start:end].unflatten(0, tuple(block.queries.shape)).transpose(1, 2),
            k[block.keys].transpose(1, 2),
            v[block.keys].transpose(1, 2),
            block.mask,
            layer.self_attn.scaling,
        )
        said.append(read.flatten(0, 1))
        start = end
    x = x[asked[reads.order]] + layer.self_attn.o_proj(torch.cat(said)[reads.order])
    return (x + layer.mlp(layer.post_attention_layernorm(x)))[None]


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(tokens, heads, head width) queries or keys, turned by their positions (Su et al. 2021, eq. 34)."""
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


_apart: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def reads_apart(model: "PreTrainedModel", trunk: Any) -> bool:
    """Whether the last layer of a trunk is computed where it is read alone."""
    layers = getattr(trunk, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    layer = layers[-1]
    if _is_cut(layer):
        return False
    if layer not in _apart:
        with torch.autocast(model.device.type, enabled=False):  # which would round more than the probe allows
            _apart[layer] = _is_llamas(model, layer) and _says_the_same(model, trunk)
    return _apart[layer]


def _is_cut(layer: nn.Module) -> bool:
    """Whether its weights are in shards: trying it out would be a collective more on ranks that do not know it yet."""
    return type(layer).__name__.startswith("FSDP") or any(hasattr(p, "ds_id") for p in layer.parameters())


def _is_llamas(model: Any, layer: Any) -> bool:
    """Whether the layer's parts have the names of a Llama's, and nothing that a probe would not see is beside them."""
    if set(layer._modules) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention = layer.self_attn
    return (
        set(attention._modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and getattr(attention, "sliding_window", None) is None
        and not getattr(model.config, "attention_dropout", 0)
        and getattr(model.config, "_attn_implementation", None) in ("sdpa", "shared_prefixes")
    )


@torch.no_grad()
def _says_the_same(model: "PreTrainedModel", trunk: Any) -> bool:
    """Whether the states of a few tokens are those that the trunk computes with all others."""
    rows, width = PROBE
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (rows, width), generator=source).to(model.device)
    there = torch.ones_like(tokens, dtype=torch.bool)
    there[0, :2], there[1, -1] = False, False
    inputs = {
        "input_ids": tokens,
        "attention_mask": there,
        "position_ids": (there.long().cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    columns = torch.tensor([[3, 5]], device=model.device)
    whole = trunk(**inputs).last_hidden_state[:, columns[0]].flatten(0, 1)
    reads = rows_read(there, columns, torch.ones(rows, 2, dtype=torch.bool, device=model.device), model.dtype)
    try:
        with reading(trunk, reads):
            read = trunk(**inputs).last_hidden_state[0]
    except (AttributeError, RuntimeError, TypeError, ValueError):  # it is built otherwise after all
        return False
    return read.shape == whole.shape and bool((read - whole).abs().max() <= ASTRAY[model.dtype] * whole.abs().max())
