"""One decoding step of a Llama, by its weights: a small model spends most of a step on the way through its modules.

The library's operations without its wrappers around each, equal up to rounding: a step of the embedded model takes less
than half the time. It is used where the layers are those of a Llama (Llama, Mistral, Qwen2 and what is built like
them), whole and unchanged, and after a probe has shown that it says what the model says; any other model decodes by its
own forward.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from rlhf_lab.engine.cache import InPlaceCache
from rlhf_lab.functional.attention import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# where cosines and sines depend on the position alone
STEADY_ROPE = ("default", "linear", "llama3", "yarn")
# by which share of its largest logit a step may differ from the model's own, from rounding; norms are in float32 there
ASTRAY = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
PROBE = (2, 5)  # rows and tokens of the probe


class _Linear(NamedTuple):
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Norm(NamedTuple):
    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, x.shape[-1:], self.weight, self.epsilon)


@dataclass(frozen=True)
class _Layer:
    """What one layer computes with; its modules are not asked again at each step."""

    input_norm: _Norm
    q: _Linear
    k: _Linear
    v: _Linear
    o: _Linear
    output_norm: _Norm
    gate: _Linear
    up: _Linear
    down: _Linear
    activation: Any
    scaling: float


def _linear(module: Any) -> _Linear:
    return _Linear(module.weight, module.bias)


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


def _layer(layer: Any) -> _Layer:
    read, mlp = layer.self_attn, layer.mlp
    return _Layer(
        input_norm=_norm(layer.input_layernorm),
        q=_linear(read.q_proj),
        k=_linear(read.k_proj),
        v=_linear(read.v_proj),
        o=_linear(read.o_proj),
        output_norm=_norm(layer.post_attention_layernorm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        activation=mlp.act_fn,
        scaling=read.scaling,
    )


class Decoder:
    """Reads one token for each row of a cache.

    Args:
        columns: positions that rows may have.
    """

    def __init__(self, model: "PreTrainedModel", columns: int) -> None:
        base: Any = model.base_model
        self.layers = [_layer(layer) for layer in base.layers]
        self.embeddings, self.norm = base.embed_tokens, _norm(base.norm)
        self.head = _linear(model.get_output_embeddings())
        positions = torch.arange(columns, device=model.device)[None]
        cosines, sines = base.rotary_emb(torch.empty(0, dtype=model.dtype, device=model.device), positions)
        self.width = cosines.shape[-1]
        # (x1, x2) cos + (-x2, x1) sin: the sign goes to the sines, and the halves change places
        self.cosines = cosines[0][:, None]  # (columns, 1, D)
        self.sines = torch.cat([-sines[0, :, : self.width // 2], sines[0, :, self.width // 2 :]], -1)[:, None]

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, store: InPlaceCache
    ) -> tuple[Tensor, Tensor]:
        """(n, D) states and (n, V) logits after the tokens (n,) at their positions (n,), which are added to the cache.

        Args:
            mask: (n, columns in use and this one) bool, True where a row has a token; None: everywhere.
        """
        n, end = tokens.shape[0], store.end
        cosines, sines = self.cosines[positions], self.sines[positions]
        seen = None
        if mask is not None:
            seen = torch.zeros_like(mask, dtype=cosines.dtype).masked_fill_(~mask, -torch.inf)[:, None, None]
        x = self.embeddings(tokens)
        for layer, cache in zip(self.layers, store.layers, strict=True):
            states = layer.input_norm(x)
            q, k, v = (part(states).view(n, -1, self.width) for part in (layer.q, layer.k, layer.v))
            keys, values = cache.append(self._rotated(k, cosines, sines), v, end)
            read = attention(self._rotated(q, cosines, sines)[:, :, None], keys, values, seen, layer.scaling)
            x = x + layer.o(read[:, 0])
            states = layer.output_norm(x)
            x = x + layer.down(layer.activation(layer.gate(states)) * layer.up(states))
        states = self.norm(x)
        return states, self.head(states)

    def _rotated(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """(n, heads, D) queries or keys, turned by their positions."""
        return torch.addcmul(x * cosines, x.roll(self.width // 2, -1), sines)


_agrees: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def decoder(model: "PreTrainedModel", columns: int) -> Decoder | None:
    """A decoder of this model; None where it decodes by its own forward."""
    if torch.is_autocast_enabled(model.device.type) or not isinstance(model, transformers.PreTrainedModel):
        return None
    # what others have put around a forward pass would be passed over: of adapters, of weights that are elsewhere
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in model.modules()):
        return None
    if model.training and getattr(model.config, "attention_dropout", 0):
        return None
    if model not in _agrees:
        _agrees[model] = _is_llama(model) and _says_the_same(model)
    return Decoder(model, columns) if _agrees[model] else None


def _is_llama(model: Any) -> bool:
    """Whether the parts are there, nothing is beside them that would compute, and weights are plain and whole."""
    base: Any = model.base_model
    if getattr(getattr(base, "rotary_emb", None), "rope_type", None) not in STEADY_ROPE:
        return False
    try:
        parts = [(layer.self_attn, layer.mlp) for layer in base.layers]
        norms = [base.norm]
        norms += [norm for layer in base.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        linear = [model.get_output_embeddings()]
        linear += [getattr(attention, f"{name}_proj") for attention, _ in parts for name in "qkvo"]
        linear += [getattr(mlp, f"{name}_proj") for _, mlp in parts for name in ("gate", "up", "down")]
    except AttributeError:
        return False
    return (
        all(type(one) is nn.Linear for one in linear)
        and all(hasattr(norm, "variance_epsilon") and len([*norm.parameters()]) == 1 for norm in norms)
        and all(len([*part.children()]) == 4 for pair in parts for part in pair)
        and all(type(p) is nn.Parameter for p in model.parameters())
    )


@torch.no_grad()
def _says_the_same(model: "PreTrainedModel") -> bool:
    """Whether a step after a few tokens gives the model's own logits, with and without padding."""
    rows, width = PROBE
    source = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (rows, width), generator=source).to(model.device)
    there = torch.ones_like(tokens, dtype=torch.bool)
    there[0, :2] = False
    positions = (there.long().cumsum(1) - 1).clamp(min=0)

    def read(upto: int) -> tuple[transformers.DynamicCache, Tensor]:
        cache = transformers.DynamicCache(config=model.config)
        logits = model(
            input_ids=tokens[:, :upto],
            attention_mask=there[:, :upto],
            position_ids=positions[:, :upto],
            past_key_values=cache,
            use_cache=True,
        ).logits
        return cache, logits[:, -1]

    try:
        store = InPlaceCache(before := read(width - 1)[0], rows, width)
        store.add(before, 1)
        _, said = Decoder(model, width)(tokens[:, -1], positions[:, -1], there, store)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # it is built otherwise after all
        return False
    own = read(width)[1]
    return bool((said - own).abs().max() <= ASTRAY[model.dtype] * own.abs().max())
