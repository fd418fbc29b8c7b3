"""One decoding step of a Llama, by its weights: a small model spends most of a step on the way through its modules.

The library's operations without its wrappers around each, equal up to rounding: a step of the embedded model takes less
than half the time. It is used where the layers are those of a Llama (Llama, Mistral, Qwen2 and what is built like
them), whole and unchanged, and after a probe has shown that it says what the model says; any other model decodes by its
own forward.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from rlhf_lab.engine.cache import InPlaceCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# where cosines and sines depend on the position alone
STEADY_ROPE = ("default", "linear", "llama3", "yarn")
# by which share of its largest logit a step may differ from the model's own, from rounding; norms are in float32 there
ASTRAY = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
PROBE = (2, 5)  # rows and tokens of the probe


@dataclass(frozen=True)
class _Layer:
    """The modules of one layer; their weights are read at each step, since they learn."""

    input_norm: Any
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    output_norm: Any
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: Any
    scaling: float


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        input_norm=layer.input_layernorm,
        q=attention.q_proj,
        k=attention.k_proj,
        v=attention.v_proj,
        o=attention.o_proj,
        output_norm=layer.post_attention_layernorm,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
        activation=mlp.act_fn,
        scaling=attention.scaling,
    )


class Decoder:
    """Reads one token for each row of a cache.

    Args:
        columns: positions that rows may have.
    """

    def __init__(self, model: "PreTrainedModel", columns: int) -> None:
        base: Any = model.base_model
        self.layers = [_layer(layer) for layer in base.layers]
        self.embeddings, self.norm, self.head = base.embed_tokens, base.norm, model.get_output_embeddings()
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
        n, end = len(tokens), store.end
        cosines, sines = self.cosines[positions], self.sines[positions]
        seen = None if mask is None else mask[:, None, None]
        x = self.embeddings(tokens)
        for layer, cache in zip(self.layers, store.layers, strict=True):
            states = _normalised(x, layer.input_norm)
            q, k, v = (_linear(states, part).view(n, -1, self.width) for part in (layer.q, layer.k, layer.v))
            keys, values = cache.append(self._rotated(k, cosines, sines), v, end)
            read = F.scaled_dot_product_attention(
                self._rotated(q, cosines, sines)[:, :, None],
                keys,
                values,
                attn_mask=seen,
                scale=layer.scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            x = x + _linear(read.view(n, -1), layer.o)
            states = _normalised(x, layer.output_norm)
            x = x + _linear(layer.activation(_linear(states, layer.gate)) * _linear(states, layer.up), layer.down)
        states = _normalised(x, self.norm)
        return states, _linear(states, self.head)

    def _rotated(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """(n, heads, D) queries or keys, turned by their positions."""
        return torch.addcmul(x * cosines, x.roll(self.width // 2, -1), sines)


def _linear(x: Tensor, layer: Any) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _normalised(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


_agrees: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def decoder(model: "PreTrainedModel", columns: int) -> Decoder | None:
    """A decoder of this model; None where it decodes by its own forward."""
    if torch.is_autocast_enabled(model.device.type) or not _is_llama(model):
        return None
    if model not in _agrees:
        _agrees[model] = _says_the_same(model)
    return Decoder(model, columns) if _agrees[model] else None


def _is_llama(model: Any) -> bool:
    """Whether the parts are there, nothing is beside them that would compute, and weights are plain and whole."""
    if not isinstance(model, transformers.PreTrainedModel):
        return False
    base: Any = model.base_model
    if getattr(getattr(base, "rotary_emb", None), "rope_type", None) not in STEADY_ROPE:
        return False
    if model.training and getattr(model.config, "attention_dropout", 0):
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
        # what others have put around a forward pass would be passed over: of adapters, of weights that are elsewhere
        and not any(
            part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in model.modules()
        )
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
