"""What several models have in common, kept once in memory and computed once.

Both are found from the weights, by comparing them to the bit, never from a setting: models that were trained with the
first layers frozen share these, and adapters on the upper layers, or heads alone, share the base below.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlhf_lab.engine.backbone import AdapterView, layers_of
from rlhf_lab.engine.forward import raw_outputs
from rlhf_lab.engine.last_layer import Replayed, reads_apart
from rlhf_lab.types import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# what may differ between the configurations of models whose layers compute alike
_OF_HEADS = {
    *("num_labels", "id2label", "label2id", "problem_type", "score_calibration", "pad_token_id", "architectures"),
    *("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("tie_word_embeddings", "quantization_config"),
}


def alias_frozen(modules: Iterable[nn.Module]) -> int:
    """Keep parameters that do not learn once in memory where several modules hold equal ones; returns the bytes saved.

    Nothing that is computed changes. What learns is never touched, nor what is equal to it.
    """
    saved = 0
    kept: dict[tuple[Any, ...], list[Tensor]] = {}
    for module in modules:
        for parameter in module.parameters():
            data = parameter.data
            if (
                parameter.requires_grad or not data.numel() or type(data) is not Tensor
            ):  # sharded ones are of other types
                continue
            key = (data.shape, data.dtype, data.device, tuple(data.flatten()[:8].tolist()))
            twins = kept.setdefault(key, [])
            twin = next((one for one in twins if one.data_ptr() == data.data_ptr() or torch.equal(one, data)), None)
            if twin is None:
                twins.append(data)
            elif twin.data_ptr() != data.data_ptr():
                parameter.data = twin
                saved += data.numel() * data.element_size()
    return saved


def common_layers(models: "Sequence[PreTrainedModel]") -> int:
    """How many of the first layers, and all that comes before them, are the same in every model, to the bit."""
    first = models[0]
    if len(models) < 2 or not all(_alike(first, other) for other in models[1:]):
        return 0
    stacks = [_stack(model) for model in models]
    if stacks[0] is None or any(stack is None or len(stack) != len(stacks[0]) for stack in stacks):
        return 0
    before = _names_before_layers(first)
    if not all(_same(first, other, before) for other in models[1:]):
        return 0
    prefix = next(name for name, part in _base(first).named_modules() if part is stacks[0])
    count = 0
    while count < len(stacks[0]) and all(_same(first, other, [f"{prefix}.{count}"]) for other in models[1:]):
        count += 1
    return count


def _base(model: "PreTrainedModel") -> nn.Module:
    """What holds the layers, in any of the models in which they may stand."""
    view: Any = model
    return view.backbone.model.base_model if isinstance(view, AdapterView) else model.base_model


def _stack(model: "PreTrainedModel") -> nn.ModuleList | None:
    view: Any = model
    return layers_of(view.backbone.model if isinstance(view, AdapterView) else model)


def _alike(one: Any, other: Any) -> bool:
    """Whether two models are of one architecture, and both whole, or both on one base."""
    if isinstance(one, AdapterView) or isinstance(other, AdapterView):
        return isinstance(one, AdapterView) and isinstance(other, AdapterView) and one.backbone is other.backbone
    ours, theirs = ({k: v for k, v in m.config.to_dict().items() if k not in _OF_HEADS} for m in (one, other))
    return type(one.base_model) is type(other.base_model) and one.dtype == other.dtype and ours == theirs


def _names_before_layers(model: "PreTrainedModel") -> list[str]:
    """Names of the modules with parameters of their own that a forward pass enters before the first layer."""
    base, stack, order = _base(model), _stack(model), []
    assert stack is not None
    inside = {id(part) for part in stack.modules()}
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, part in base.named_modules()
        if id(part) not in inside and next(part.parameters(recurse=False), None) is not None
    ]
    handles.append(stack[0].register_forward_pre_hook(lambda *_: order.append("")))
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return order[: order.index("")]


def _same(one: Any, other: Any, names: Sequence[str]) -> bool:
    """Whether the modules of these names in the bases compute alike."""
    if isinstance(one, AdapterView):
        ours, theirs = (_factors(view, names) for view in (one, other))
    else:
        ours, theirs = (_weights(model, names) for model in (one, other))
    return ours.keys() == theirs.keys() and all(
        x.data_ptr() == theirs[key].data_ptr() or torch.equal(x, theirs[key]) for key, x in ours.items()
    )


def _weights(model: "PreTrainedModel", names: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    base = _base(model)
    return {(name, key): value for name in names for key, value in base.get_submodule(name).state_dict().items()}


def _factors(view: AdapterView, names: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    """Those of a view's adapter in modules of the base."""
    if view.own is None:
        return {}
    parts = {id(part) for name in names for part in _base(cast(Any, view)).get_submodule(name).modules()}
    model = view.backbone.model
    found = {}
    for place, factors in view.own.factors.items():
        if id(model.get_submodule(place)) in parts:
            found |= {(place, key): value for key, value in factors.state_dict().items()}
            found[place, "scale"] = torch.tensor(factors.scale)
    return found


class Members:
    """Value models that read the same tokens, the layers that they have in common computed once.

    The first member computes as ever, and what comes out of the last common layer is kept. The others' common layers
    hand that on, and all else (masks, positions, the upper layers, norms, heads) is each member's own forward pass.

    Attributes:
        common: how many layers that are.
    """

    def __init__(self, models: "Sequence[PreTrainedModel]") -> None:
        self.models = list(models)
        self.common = common_layers(models)

    def raw_outputs(self, sequences: Sequences) -> Tensor:
        """(B, K, D): what each of the K members says after the last real token of each row."""
        if not self.common:
            return torch.stack([raw_outputs(model, sequences) for model in self.models], 1)
        for model in self.models:  # which tries a new one out, and is no part of what is kept and handed on
            reads_apart(model, model.base_model)
        tape: list[Any] = []
        with _recording(self._layers(0)[-1], tape):
            said = [raw_outputs(self.models[0], sequences)]
        for k, model in enumerate(self.models[1:], 1):
            with _replaying(self._layers(k), tape):
                said.append(raw_outputs(model, sequences))
        return torch.stack(said, 1)

    def _layers(self, k: int) -> list[nn.Module]:
        stack = _stack(self.models[k])
        assert stack is not None
        return list(stack[: self.common])


@contextmanager
def _recording(layer: nn.Module, tape: list[Any]) -> Iterator[None]:
    """Keep what a layer returns, call by call."""
    handle = layer.register_forward_hook(lambda _module, _inputs, output: tape.append(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaying(layers: Sequence[nn.Module], tape: Sequence[Any]) -> Iterator[None]:
    """Have layers return what is on the tape, the next piece at each pass through them; they keep their attributes.

    A member must pass through them as often as the first did.
    """
    before = [vars(layer).get("forward") for layer in layers]
    played = [Replayed(tape) for _ in layers]
    for layer, instead in zip(layers, played, strict=True):
        layer.forward = instead
    try:
        yield
        calls = {one.calls for one in played}
        assert calls == {len(tape)}, f"{len(tape)} pieces were recorded, but read {calls} times"
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
