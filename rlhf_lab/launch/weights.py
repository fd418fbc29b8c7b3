"""How many parameters a run holds, read from the headers of weight files; nothing is loaded and nothing fetched."""

import json
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from hydra.utils import instantiate

from rlhf_lab.engine.model_paths import LEARNT
from rlhf_lab.engine.models import base_of
from rlhf_lab.engine.tiny import is_embedded
from rlhf_lab.launch.compose import Plan

BYTES = {"float32": 4, "bfloat16": 2}
BYTES_QUANTISED = {"nf4": 0.5, "int8": 1}  # of a base; its embeddings take more
LEARNING = 4  # times its weights: gradients and AdamW's two moments are as large
HEADS = ("lm_head.", "embed_out.")  # of a policy, which a critic or a scorer that starts from it has not


class UnknownWeights(LookupError):
    """Weights that are not on this machine."""


@cache
def _sizes(path: str) -> Mapping[str, int]:
    """tensor -> number of parameters, of the weights in a folder, in the hub's cache, or embedded."""
    if is_embedded(path):
        from rlhf_lab.engine.tiny import tiny_policy

        return {name: tensor.numel() for name, tensor in tiny_policy(0).named_parameters()}
    folder = Path(path).expanduser()
    if not folder.is_dir():
        cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
        if not isinstance(cached, str):
            raise UnknownWeights(path)
        folder = Path(cached).parent
    sizes: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:  # 8 bytes: the length of the header that follows
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        sizes |= {name: prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    if not sizes:
        raise UnknownWeights(path)
    return sizes


def parameters(path: str, promised: Mapping[str, Plan], trunk: bool = False) -> int:
    """Of the model at `path`; of what it will be made from, if one of the promised plans makes it.

    Args:
        promised: output -> the plan that makes it.
        trunk: without the head of a policy.

    Raises:
        UnknownWeights: they are not on this machine.
    """
    while path in promised and not Path(path).is_dir():
        plan = promised[path]
        made = plan.config["stage"]["model"]
        if made["peft"] and not made["merge"]:  # an adapter, which is next to nothing
            return 0
        path, trunk = plan.config["stage"]["model"]["policy"], trunk or plan.config["output"] == "scorer"
    return sum(count for name, count in _sizes(path).items() if not (trunk and name.startswith(HEADS)))


def least_memory_mib(plan: Plan, promised: Mapping[str, Plan]) -> float:
    """What the weights alone take, with gradients and moments of what learns: a floor, without activations and data.

    Raises:
        UnknownWeights: some are not on this machine.
    """
    stage: dict[str, Any] = plan.config["stage"]
    if "model" not in stage:
        return 0.0
    model, algorithm = stage["model"], stage.get("algorithm")
    dtype = stage["hardware"]["dtype"]
    scorers = [path for source in stage.get("rewards", {}).values() if source for path in source.get("members", ())]
    beside = sum(parameters(path, promised, trunk=True) * BYTES[dtype] for path in scorers)
    if model["peft"]:  # one base, and adapters
        each = BYTES_QUANTISED[model["quantise"]] if model["quantise"] else BYTES[dtype]
        return (parameters(base_of(model["policy"]), promised) * each + beside) / 2**20
    learning = 1 if algorithm is None or model["frozen_layers"] else LEARNING  # frozen layers have no gradients
    total = parameters(model["policy"], promised) * BYTES[LEARNT] * learning
    if "prompts_per_step" in stage:  # on its own samples
        total += parameters(model["reference"], promised) * BYTES[LEARNT]
        if instantiate(algorithm, _convert_="all").critics:
            total += parameters(model["critic"], promised, trunk=True) * BYTES[LEARNT] * learning
    return (total + beside) / 2**20
