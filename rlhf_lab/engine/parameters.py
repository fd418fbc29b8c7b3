"""The parameters of a module by name: which of them learn, and how they are written down and set again."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from rlhf_lab.engine.backbone import AdapterView, frozen_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layers(module: nn.Module) -> list[nn.Module]:
    """The stack of layers of the transformer in a module, in their order; [] if there is none, or it is not found."""
    trunk: Any = next((part for part in module.modules() if isinstance(part, transformers.PreTrainedModel)), None)
    if trunk is None:
        return []
    count = trunk.config.get_text_config().num_hidden_layers
    lists = (part for part in trunk.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    return list(next(lists, []))


def freeze(trunk: "PreTrainedModel", share: float) -> None:
    """Leave the embeddings and the first floor(share * L) of L layers as they are, if the share is above 0.

    A language-model head that is tied to the embeddings does not learn either.

    Raises:
        ValueError: the layers of this architecture are not found.
    """
    if not share or isinstance(trunk, AdapterView):  # whose adapter has no factors in those layers
        return
    stack = layers(trunk)
    if not stack:
        raise ValueError(
            f"model.frozen_layers={share}, but the layers of {type(trunk).__name__} are not found; set it to 0"
        )
    embeddings = [part for part in trunk.base_model.modules() if isinstance(part, nn.Embedding)]
    for part in (*embeddings, *stack[: frozen_count(len(stack), share)]):
        part.requires_grad_(False)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Everything a module learns or tracks, by name; weights that are tied stand there once."""
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in module.state_dict()}
    return {**dict(module.named_parameters()), **buffers}


@torch.no_grad()
def restore_parameters(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy saved parameters into a module of the same shape.

    Raises:
        ValueError: the names or shapes differ.
    """
    for name, tensor in matched(module, saved).items():
        tensor.copy_(saved[name])


def matched(module: nn.Module, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a module has of its own for each saved parameter.

    Raises:
        ValueError: the names or shapes differ.
    """
    own = parameters_of(module)
    if own.keys() != saved.keys():
        raise ValueError(f"the checkpoint holds other parameters; differing: {sorted(own.keys() ^ saved.keys())[:5]}")
    # ZeRO-3 keeps a parameter's shape beside it; copy_ would broadcast
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in own.items()}
    if other := [name for name, shape in shapes.items() if shape != tuple(saved[name].shape)]:
        raise ValueError(
            f"the checkpoint's {other[0]} has shape {tuple(saved[other[0]].shape)}, the module's {shapes[other[0]]}"
        )
    return own
