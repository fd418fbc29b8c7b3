"""One base in memory, and any number of models that are adapters and heads on it.

A `Backbone` holds a frozen causal language model, perhaps quantised. An `AdapterView` acts like a model of its own: its
low-rank adapter (or none) is active on the base for the duration of a call, and its parameters are that adapter's and
its head's.

Source: LoRA, Hu et al. 2022, arXiv:2106.09685; on a quantised base QLoRA, Dettmers et al. 2023, arXiv:2305.14314.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from rlhf_lab.types import Count, Fraction, Positive

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Quantise = Literal["nf4", "int8"]
ALL_LINEAR = "all-linear"
QUANTISED = ("Linear4bit", "Linear8bitLt")  # the layers of bitsandbytes
MISSING = {
    "peft": "model.peft=lora writes and reads its adapters by the package peft; pip install 'rlhf_lab[lora]'",
    "bitsandbytes": "model.quantise computes by the package bitsandbytes; pip install 'rlhf_lab[quantised]'",
}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What an adapter is like: W x + (alpha / rank) B A x, where B begins at zero.

    Fields:
        rank: rows of A.
        alpha: the larger, the further a step of the same rate goes.
        dropout: of x before A, while a data set is learnt from; what learns from own samples has none.
        target_modules: names of the linear layers that it changes, such as [q_proj, v_proj], or "all-linear": every one
            but the head of the policy.
        layers_to_transform: indices of the layers that it changes; null: all, or those that model.frozen_layers leaves.
        rank_stabilised: whether it is alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
    """

    rank: Count
    alpha: Positive
    dropout: Fraction
    target_modules: str | list[str]
    layers_to_transform: list[int] | None
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """Of B A x."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


def layers_of(model: "PreTrainedModel") -> nn.ModuleList | None:
    """The stack of layers through which the hidden states of a model go; None if it is not found."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = [part for part in model.base_model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    return stacks[0] if stacks else None


class Factors(nn.Module):
    """One adapter at one layer."""

    def __init__(self, fan_in: int, fan_out: int, lora: Lora, device: torch.device) -> None:
        super().__init__()
        # float32 whatever the base is in: small steps round away in less
        self.lora_A = nn.Linear(fan_in, lora.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(lora.rank, fan_out, bias=False, device=device, dtype=torch.float32)
        self.dropout, self.scale = nn.Dropout(lora.dropout), lora.scale
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * self.scale

    def delta(self) -> Tensor:
        """(fan_out, fan_in): what it adds to the weight."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


class Head(nn.Linear):
    """In float32, whatever the states that it reads are in: heads learn, as adapters do."""

    def __init__(self, width: int, outputs: int, *, bias: bool, device: torch.device) -> None:
        super().__init__(width, outputs, bias=bias, device=device, dtype=torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class Active:
    """Which adapter is at work on a base at the moment: place -> its factors there."""

    def __init__(self) -> None:
        self.factors: Mapping[str, Factors] = {}


class Adapted(nn.Module):
    """A linear layer of the base, to whose output the active adapter adds. It holds no adapter: the views do."""

    def __init__(self, layer: nn.Module, place: str, active: Active) -> None:
        super().__init__()
        self.base_layer, self.place, self.active = layer, place, active

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some models read the weight of their layers
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        factors = self.active.factors.get(self.place)
        return out if factors is None else out + factors(x).to(out.dtype)


class Adapter(nn.Module):
    """The factors of one adapter, under the names of the layers that they change."""

    def __init__(self, factors: Mapping[str, Factors], lora: Lora) -> None:
        super().__init__()
        self.lora, self.factors = lora, dict(factors)
        for place, part in factors.items():
            *path, last = place.split(".")
            parent: nn.Module = self
            for name in path:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = cast(nn.Module, parent._modules[name])
            parent.add_module(last, part)


class Backbone:
    """A frozen base, shared by everything that is an adapter on it.

    Args:
        model: a causal language model; it is frozen here.
        path: from where it was loaded.
        quantise: how its layers are stored; None: as they are.

    Attributes:
        device: where it computes, and so where adapters and heads are.
        root: of a base that was cut into shards, within which it is called; None: it is whole.
        copy: of a base that was cut, what stands in for it while its weights are gathered.
    """

    def __init__(self, model: "PreTrainedModel", path: str, quantise: Quantise | None) -> None:
        self.model, self.path, self.quantise = model.requires_grad_(False).eval(), path, quantise
        self.device: torch.device = model.device
        self.root: nn.Module | None = None
        self.copy: PreTrainedModel | None = None
        self.active = Active()
        self._adapted: set[str] = set()

    @property
    def width(self) -> int:
        """Of what a head reads: as wide as the embeddings, also where the layers are wider (OPT)."""
        return cast(Tensor, self.model.get_input_embeddings().weight).shape[1]

    def places(self, lora: Lora) -> dict[str, nn.Module]:
        """Path in the base -> the linear layer there that an adapter of these settings changes.

        Raises:
            ValueError: there is none; or a layer is named that the model does not have.
        """
        layers, inside = layers_of(self.model), {}
        if layers is not None:
            inside = {id(part): i for i, layer in enumerate(layers) for part in layer.modules()}
        chosen = None if lora.layers_to_transform is None else set(lora.layers_to_transform)
        if chosen is not None and (layers is None or not chosen <= set(range(len(layers)))):
            raise ValueError(
                f"model.lora.layers_to_transform={sorted(chosen)}, but {self.path} has the layers 0 to "
                f"{len(layers or ()) - 1}"
            )
        head, named = self.model.get_output_embeddings(), lora.target_modules
        found: dict[str, nn.Module] = {}
        for name, part in self.model.named_modules():
            if name.endswith(".base_layer"):
                continue
            layer = part.base_layer if isinstance(part, Adapted) else part
            if not isinstance(layer, nn.Linear | Conv1D) or layer is head:
                continue
            if chosen is not None and inside.get(id(part)) not in chosen:
                continue
            if named == ALL_LINEAR or any(name == one or name.endswith(f".{one}") for one in _listed(named)):
                found[name] = layer
        if not found:
            linear = (name for name, part in self.model.named_modules() if isinstance(part, nn.Linear | Conv1D))
            there = sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in linear})
            raise ValueError(
                f"model.lora.target_modules={named!r} names no linear layer of {self.path}; there are: "
                f"{', '.join(there)}"
            )
        return found

    def new_adapter(self, lora: Lora, seed: int) -> Adapter:
        """One that changes nothing yet; the seed draws what it will learn from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            factors = {
                place: Factors(*_fans(layer), lora, self.device) for place, layer in self.places(lora).items()
            }  # fmt: skip
        models = [self.model] if self.copy is None else [self.model, self.copy]
        for place in factors.keys() - self._adapted:
            above, _, last = place.rpartition(".")
            for model in models:
                parent = model.get_submodule(above)
                setattr(parent, last, Adapted(getattr(parent, last), place, self.active))
        self._adapted |= factors.keys()
        return Adapter(factors, lora)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it the copy of a base that was cut computes in its place; who calls this has given it the weights."""
        assert self.copy is not None
        cut, self.model = self.model, self.copy
        try:
            yield
        finally:
            self.model = cut

    @contextmanager
    def wearing(self, factors: Mapping[str, Factors], training: bool) -> Iterator[None]:
        """Within it the base computes with these factors, and in training mode or not."""
        before, self.active.factors = self.active.factors, factors
        if self.model.training != training:
            self.model.train(training)
        try:
            yield
        finally:
            self.active.factors = before

    def recompute_layers(self) -> None:
        """From now on layers keep their inputs only, and compute the rest again with the adapter of the first time."""
        for layer in layers_of(self.model) or ():
            if "forward" not in vars(layer):
                cast(Any, layer).forward = _Recomputed(layer.forward, self)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of the forward pass, and of when its layers are computed again."""
        return nullcontext(), self.wearing(self.active.factors, self.model.training)

    def weight(self, layer: Any) -> Tensor:
        """(fan_out, fan_in): a linear layer's weight in float32, as it computes with it."""
        stored: Any = layer.weight
        if type(layer).__name__ not in QUANTISED:
            weight = stored.detach().float()
            return weight.T if isinstance(layer, Conv1D) else weight
        from bitsandbytes import functional

        if hasattr(stored, "quant_state"):
            return functional.dequantize_4bit(stored.data, stored.quant_state).float()
        largest = layer.state.SCB if stored.SCB is None else stored.SCB  # of each row; forward passes move it
        return functional.int8_vectorwise_dequant(stored.data, largest).float()


@dataclass(frozen=True)
class _Recomputed:
    """Not a closure: a copy of a layer has its own forward in it."""

    forward: Callable[..., Any]
    backbone: Backbone

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, context_fn=self.backbone.contexts, **kwargs)


def _listed(named: str | Sequence[str]) -> Sequence[str]:
    return [named] if isinstance(named, str) else named


def _fans(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.nf
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features  # the weight of a quantised one has another shape


class Inner:
    """The base without its language-model head, called with a view's adapter."""

    def __init__(self, view: "AdapterView") -> None:
        self.view = view

    def __call__(self, **inputs: Any) -> Any:
        return self.view.inner(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.view.backbone.model.base_model, name)


class _Config:
    """The base's configuration, live, with the labels of a view's own head."""

    def __init__(self, base: "PretrainedConfig", outputs: Sequence[str]) -> None:
        vars(self)["_base"] = base
        if outputs:
            vars(self)["num_labels"] = len(outputs)
            vars(self)["id2label"] = dict(enumerate(outputs))
            vars(self)["label2id"] = {output: i for i, output in enumerate(outputs)}

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._base, name, value)


class AdapterView(nn.Module):
    """What acts like a model of its own, and is an adapter, perhaps with a head, on a shared base.

    Its parameters are its own: those of the adapter and of the head. Without either it is the base, adapters off.

    Args:
        outputs: of a value model's head; () for a policy.
        is_trunk: to be called as the model without its head, as the trunk of critics is.
        seed: draws the head.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter | None,
        *,
        outputs: Sequence[str] = (),
        is_trunk: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone, self.is_trunk, self.outputs = backbone, is_trunk, tuple(outputs)
        if adapter is not None:
            self.adapter = adapter
        self.config = _Config(backbone.model.config, outputs)
        self.generation_config = backbone.model.generation_config
        if outputs:
            self.score = Head(backbone.width, len(outputs), bias=False, device=backbone.device)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                nn.init.normal_(self.score.weight, std=getattr(self.config, "initializer_range", 0.02))

    @property
    def own(self) -> Adapter | None:
        """Its adapter."""
        return cast(Adapter | None, self._modules.get("adapter"))

    def stands_beside(self, other: object) -> bool:
        """Whether another model is on the same base."""
        return isinstance(other, AdapterView) and other.backbone is self.backbone

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the base computes."""
        return self.backbone.model.dtype

    @property
    def base_model(self) -> Inner:
        return Inner(self)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.model.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.model.get_input_embeddings()

    def wearing(self) -> AbstractContextManager[None]:
        """Within it the base computes as this view."""
        own = self.own
        return self.backbone.wearing({} if own is None else own.factors, self.training)

    def inner(self, **inputs: Any) -> Any:
        """The hidden states of the base with this adapter."""
        with self.wearing():
            return self.backbone.model.base_model(**inputs)

    def forward(self, **inputs: Any) -> Any:
        """As the base is called, or the base without its head if this is a trunk or a value model."""
        if self.is_trunk or self.outputs:
            return self.inner(**inputs)
        with self.wearing():
            return self.backbone.model(**inputs)

    def recompute_layers(self) -> None:
        """Keep the inputs of the layers only, and compute the rest again in the backward pass, for all on this base."""
        self.backbone.recompute_layers()

    def copied(self, *, outputs: Sequence[str] = (), is_trunk: bool = False, seed: int = 0) -> "AdapterView":
        """Another view on the same base whose adapter begins where this one's stands, with heads of its own."""
        adapter = None
        if (own := self.own) is not None:
            adapter = self.backbone.new_adapter(own.lora, seed)
            adapter.load_state_dict(own.state_dict())
        return AdapterView(self.backbone, adapter, outputs=outputs, is_trunk=is_trunk, seed=seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdapterView":
        """The base is shared by copies too."""
        other = self.copied(outputs=self.outputs, is_trunk=self.is_trunk)
        other.load_state_dict(self.state_dict())
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            theirs.requires_grad_(mine.requires_grad)
        return other.train(self.training)


def bases_of(modules: Iterable[nn.Module]) -> list[Backbone]:
    """What the adapters and heads among modules and their parts stand on, each once."""
    views = (part for module in modules for part in module.modules() if isinstance(part, AdapterView))
    return list({id(view.backbone): view.backbone for view in views}.values())


Key = tuple[str, str, str, Quantise | None]  # path, device, type, quantisation
_alive: "weakref.WeakValueDictionary[Key, Backbone]" = weakref.WeakValueDictionary()


def alive(key: Key) -> Backbone | None:
    """The backbone of this key, if something in this process uses it."""
    return _alive.get(key)


def alive_ones() -> list[tuple[Key, Backbone]]:
    """Every backbone that something in this process uses."""
    return list(_alive.items())


def share(key: Key, backbone: Backbone) -> Backbone:
    """Let others find it for as long as something uses it."""
    _alive[key] = backbone
    return backbone


def frozen_count(layers: int, share: float) -> int:
    """How many of the layers a share of them is, rounded down."""
    return math.floor(share * layers + 1e-9)
