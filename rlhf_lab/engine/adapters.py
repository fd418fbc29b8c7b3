"""Folders of adapters as peft writes them: factors and head in safetensors, and which base they belong to.

Beside peft's two files stands backbone.json: the digest of the base's weights, how these were quantised while the
adapter learnt, and what a value model says in which units. Folders without it, of peft's own making, are read too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from rlhf_lab.engine.backbone import (
    ALL_LINEAR,
    MISSING,
    QUANTISED,
    Adapted,
    Adapter,
    AdapterView,
    Backbone,
    Lora,
    Quantise,
)
from rlhf_lab.engine.checkpoint import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "backbone.json"
PREFIX = "base_model.model."  # peft's, of every name in the weights
HEAD = "score.weight"
# settings of an adapter beyond two factors for the weights of some layers, and what they are without
BEYOND_FACTORS: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What an adapter's folder says of itself beside its weights.

    Fields:
        base: folder or hub id of the model that it is an adapter on.
        digest: of that one's weights; "" if unknown.
        quantise: how they were stored while it learnt.
        outputs: of a value model's head; () for a policy.
        calibration: of a value model.
    """

    base: str
    digest: str
    quantise: Quantise | None
    outputs: tuple[str, ...]
    calibration: Mapping[str, Any]


def require(package: str) -> None:
    """Refuse at once what a package that is not installed would be needed for.

    Raises:
        ValueError: with the command that installs it.
    """
    if find_spec(package) is None:
        raise ValueError(MISSING[package])


def is_adapter(path: str) -> bool:
    """Whether a path is a folder of an adapter, and not of a whole model."""
    return (Path(path).expanduser() / CONFIG).exists()


def located(path: str) -> str:
    """One spelling of a path, from wherever it is read; a hub id stays as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.exists() else path


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    return "-".join(sha256(file) for file, _, _ in files)


def digest(path: str) -> str:
    """Of the bytes of the weights in a folder or in the hub's cache; "" if they are not on this machine."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
        if not isinstance(cached, str):
            return ""
        folder = Path(cached).parent
    files = sorted(folder.glob("*.safetensors"))
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def read_record(path: str) -> Record:
    """What the folder of an adapter says of itself.

    Raises:
        ValueError: it is an adapter of another kind than plain LoRA.
    """
    folder = Path(path).expanduser()
    config = json.loads((folder / CONFIG).read_text())
    for key, plain in BEYOND_FACTORS.items():
        if (found := config.get(key, plain)) not in (plain, None):
            raise ValueError(f"{path}: {key}={found!r}; only plain LoRA factors (peft's defaults) are read")
    if (kept := config.get("modules_to_save") or ["score"]) != ["score"]:
        raise ValueError(f"{path}: modules_to_save={kept}; beside LoRA factors only a head called score is read")
    noted = json.loads((folder / RECORD).read_text()) if (folder / RECORD).exists() else {}
    outputs = ("score",) if config.get("modules_to_save") else ()
    return Record(
        base=config["base_model_name_or_path"],
        digest=noted.get("digest", ""),
        quantise=noted.get("quantise"),
        outputs=tuple(noted.get("outputs", outputs)),
        calibration=noted.get("calibration", {}),
    )


def lora_of(path: str) -> Lora:
    """The settings of the adapter in a folder."""
    config = json.loads((Path(path).expanduser() / CONFIG).read_text())
    targets = config["target_modules"]
    return Lora(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        layers_to_transform=config.get("layers_to_transform"),
        rank_stabilised=bool(config.get("use_rslora")),
    )


def check_adapter(path: str, role: str) -> str:
    """Refuse the folder of an adapter that cannot be read, as far as is seen without loading; returns its base.

    Raises:
        ValueError: a file or the package peft is missing, it is no plain LoRA adapter, or its base has other weights
            than it learnt on.
    """
    require("peft")
    if not (Path(path).expanduser() / WEIGHTS).exists():
        raise ValueError(f"{role}={path}: no {WEIGHTS} there; other weight files (pickles) are not loaded")
    return read_record(path).base


def check_base(path: str, record: Record) -> None:
    """Refuse a base that is not the one on which an adapter learnt.

    Raises:
        ValueError: the bytes of its weights are others.
    """
    if record.digest and (now := digest(record.base)) and now != record.digest:
        raise ValueError(
            f"{path} is an adapter on {record.base}, whose weights are no longer those that it learnt on; "
            "restore them, or train the adapter again"
        )


def load_view(backbone: Backbone, path: str, *, is_trunk: bool = False) -> AdapterView:
    """The adapter, and the head if it has one, in a folder, on its base.

    Raises:
        ValueError: the names or shapes of the factors are not those of adapters on this base.
    """
    record, lora = read_record(path), lora_of(path)
    outputs = () if is_trunk else record.outputs
    view = AdapterView(backbone, backbone.new_adapter(lora, 0), outputs=outputs, is_trunk=is_trunk)
    stored = load_file(Path(path).expanduser() / WEIGHTS)
    own = view.state_dict()
    named = {_stored_name(name): name for name in own}
    if is_trunk:
        stored.pop(PREFIX + HEAD, None)
    if differing := sorted(stored.keys() ^ named.keys()):
        raise ValueError(f"{path} holds other tensors than an adapter on {backbone.path}; differing: {differing[:3]}")
    for name, tensor in stored.items():
        if tensor.shape != own[named[name]].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, on {backbone.path} it would have "
                f"{tuple(own[named[name]].shape)}"
            )
    view.load_state_dict({named[name]: tensor for name, tensor in stored.items()})
    return view


def _stored_name(name: str) -> str:
    """A view's name of a parameter -> peft's."""
    return PREFIX + name.removeprefix("adapter.")


def save_view(folder: Path, view: AdapterView, calibration: Mapping[str, Any] | None) -> None:
    """Write a folder that peft loads; needs an adapter."""
    from peft import LoraConfig, TaskType

    adapter, backbone = view.own, view.backbone
    assert adapter is not None
    lora, outputs = adapter.lora, view.outputs
    config = LoraConfig(
        base_model_name_or_path=located(backbone.path),
        task_type=TaskType.SEQ_CLS if outputs else TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  a fraction serves as well
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilised,
        target_modules=targets(backbone, adapter),
        layers_to_transform=lora.layers_to_transform,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in backbone.places(lora).values()),
        modules_to_save=["score"] if outputs else None,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {_stored_name(name): tensor.contiguous() for name, tensor in view.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    record = {
        "digest": digest(backbone.path),
        "quantise": backbone.quantise,
        "outputs": outputs,
        "calibration": dict(calibration or {}),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1))


def targets(backbone: Backbone, adapter: Adapter) -> list[str]:
    """Names of the layers that an adapter changes, as peft's list: endings, none of which another layer has."""
    if adapter.lora.target_modules != ALL_LINEAR and not isinstance(adapter.lora.target_modules, str):
        return list(adapter.lora.target_modules)
    return sorted({place.rpartition(".")[2] for place in adapter.factors})


def merge_into(model: "PreTrainedModel", view: AdapterView) -> None:
    """Make the weights of a whole model, of the base's architecture, those with which a view computes.

    A layer that the base holds quantised gets the weight that it computes with, so that the model is the one that
    learnt, and not the base before it was rounded.
    """
    adapter = view.own
    factors = {} if adapter is None else adapter.factors
    base = view.backbone.model
    for name, part in base.named_modules():
        if name.endswith(".base_layer"):
            continue
        layer = part.base_layer if isinstance(part, Adapted) else part
        if name not in factors and type(layer).__name__ not in QUANTISED:
            continue
        weight = view.backbone.weight(layer)
        if name in factors:
            weight = weight + factors[name].delta().detach()
        target = model.get_submodule(name)  # of GPT-2 a Conv1D, also where the base's quantised layer is none
        target.get_parameter("weight").data.copy_(weight.T if isinstance(target, Conv1D) else weight)
    if view.outputs:
        model.get_parameter(HEAD).data.copy_(view.score.weight)
