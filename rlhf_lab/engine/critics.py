"""State values: heads on a trunk of their own, or on the policy's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor, nn

from rlhf_lab.engine.adapters import is_adapter
from rlhf_lab.engine.backbone import AdapterView, Head, Inner
from rlhf_lab.engine.model_paths import Adapters
from rlhf_lab.engine.models import DTYPES, NONE_NEW, merged_at, safe_options, trainable_view, widen
from rlhf_lab.engine.tiny import is_embedded, tiny_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Critics(nn.Module):
    """State values of several streams: one trunk, one linear head per stream.

    The heads start at zero, so the first advantages are the returns themselves and no random value leaks into them.

    Args:
        shares_trunk: the trunk is the policy's, so the parameters here are the heads alone.
    """

    trunk: "PreTrainedModel"

    def __init__(self, trunk: "PreTrainedModel", names: tuple[str, ...], *, shares_trunk: bool = False) -> None:
        super().__init__()
        self.names, self.shares_trunk = names, shares_trunk
        if shares_trunk:
            self.__dict__["trunk"] = trunk  # past nn.Module, which would count it among the parameters
        else:
            self.trunk = trunk
        # what the language-model head would read: as wide as the embeddings, also where the layers are wider (OPT)
        width = cast(Tensor, trunk.get_input_embeddings().weight).shape[1]
        if isinstance(trunk, AdapterView | Inner):
            self.heads = Head(width, len(names), bias=True, device=trunk.device)
        else:
            self.heads = nn.Linear(width, len(names), dtype=trunk.dtype)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)


def load_critics(
    path: str,
    names: tuple[str, ...],
    *,
    device: torch.device,
    dtype: str,
    seed: int,
    new_tokens: Mapping[str, int] = NONE_NEW,
    adapters: Adapters | None = None,
) -> Critics:
    """Value heads on the trunk of the model at `path`, or on an adapter of theirs on its base."""
    trunk: Any
    if adapters is not None:
        # another draw than the policy's, whose adapter has the same seed
        trunk = trainable_view(
            path, adapters, device=device, dtype=dtype, seed=seed + 1, new_tokens=new_tokens, is_trunk=True
        )
        return Critics(trunk, names).to(device).eval()
    if is_embedded(path):
        trunk = tiny_policy(seed).model
        trunk = trunk.to(DTYPES[dtype])
    elif is_adapter(path):
        trunk = merged_at(path).base_model.to(DTYPES[dtype])
    else:
        trunk = transformers.AutoModel.from_pretrained(path, **safe_options(DTYPES[dtype]))
    widen(trunk, path, new_tokens)
    return Critics(trunk, names).to(device).eval()


def shared_critics(policy: "PreTrainedModel", names: tuple[str, ...]) -> Critics:
    """Value heads on the policy's own trunk."""
    return Critics(cast("PreTrainedModel", policy.base_model), names, shares_trunk=True).to(policy.device).eval()
