"""Policies mixed by their weights: of whole models, of LoRA factors, or of what the LoRA factors multiply to.

A soup needs no training: for every weighting of rewards it is made from the policies of the single rewards.

Source: Rewarded Soups, Ramé et al. 2023, arXiv:2306.04488; of adapters, Personalized Soups, Jang et al. 2023,
arXiv:2310.11564.
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.functional.simplex import check_simplex

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Space = Literal["weights", "adapter", "delta"]

MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# what may differ between the configurations of models that can be mixed
_INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
# settings of an adapter beyond its two factors, and what they are without
_BEYOND_FACTORS: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
_SAME_ADAPTER = ("base_model_name_or_path", "target_modules", "task_type", "fan_in_fan_out")
_SAME_FACTORS = ("r", "lora_alpha", "use_rslora")


class Stored:
    """The tensors of a policy folder by name, read one at a time."""

    def __init__(self, folder: str, space: Space) -> None:
        self.folder = Path(folder).expanduser()
        self.config_file = self.folder / ("config.json" if space == "weights" else "adapter_config.json")
        single, index = self.folder / (MODEL if space == "weights" else ADAPTER), self.folder / f"{MODEL}.index.json"
        is_sharded = space == "weights" and index.exists()
        if not self.config_file.exists() or not (single.exists() or is_sharded):
            kind = "a model" if space == "weights" else "a LoRA adapter"
            raise ValueError(
                f"{folder} is not {kind}: stage.space={space} needs {self.config_file.name} and {single.name}; for "
                f"{'LoRA adapters use stage.space=delta' if space == 'weights' else 'models use stage.space=weights'}"
            )
        files = {single}
        if is_sharded:
            files = {self.folder / file for file in json.loads(index.read_text())["weight_map"].values()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}
        for file in sorted(files):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  it has no __iter__
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                    self._file[name] = file

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(self.config_file.read_text())

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Its own; that of its base model for an adapter that came without."""
        has_own = (self.folder / "tokenizer_config.json").exists()
        return load_tokenizer(str(self.folder) if has_own else self.config["base_model_name_or_path"])

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file[name], "pt") as file:
            return file.get_tensor(name)


def check_soup(policies: Sequence[str], weights: Sequence[float], space: Space, promised: Collection[str] = ()) -> None:
    """Refuse what cannot be mixed, from configurations and shapes; reads no weights.

    Args:
        promised: paths that will be there by then.

    Raises:
        ValueError: weights that are not shares of one whole, one for each policy; a folder that is not of the kind that
            `space` mixes; or policies that differ in more than their weights.
    """
    if len(policies) != len(weights):
        raise ValueError(f"stage.weights has {len(weights)} entries for {len(policies)} stage.policies; give one each")
    check_simplex(weights, "stage.weights")
    there = [policy for policy in policies if policy not in promised]
    for policy in there:
        if not Path(policy).expanduser().is_dir():
            raise ValueError(f"stage.policies: no such folder: {policy}; soups are made of folders on this disk")
    stored = [Stored(policy, space) for policy in there]
    for policy in stored:
        if space == "weights":
            _check_same_model(stored[0], policy)
        else:
            _check_same_adapter(stored[0], policy, space)
        _check_same_shapes(stored[0], policy, space)
        _check_same_tokenizer(stored[0], policy)


def _check_same_model(first: Stored, other: Stored) -> None:
    ours, theirs = ({k: v for k, v in p.config.items() if k not in _INCIDENTAL} for p in (first, other))
    if differing := [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]:
        key = differing[0]
        raise ValueError(
            f"{first.folder} and {other.folder} are not one architecture: {key} is {ours.get(key)!r} and "
            f"{theirs.get(key)!r}; only policies that started from one model can be mixed"
        )


def _check_same_adapter(first: Stored, other: Stored, space: Space) -> None:
    for key, plain in _BEYOND_FACTORS.items():
        if (found := other.config.get(key, plain)) not in (plain, None):
            raise ValueError(f"{other.folder}: {key}={found!r}; only plain LoRA factors (peft's defaults) can be mixed")
    for key in (*_SAME_ADAPTER, *(_SAME_FACTORS if space == "adapter" else ())):
        ours, theirs = (p.config.get(key) for p in (first, other))
        if key == "target_modules":
            ours, theirs = (value if isinstance(value, str) else sorted(value or []) for value in (ours, theirs))
        if ours != theirs:
            hint = "; stage.space=delta mixes adapters of other ranks and scales" if key in _SAME_FACTORS else ""
            raise ValueError(f"{first.folder} and {other.folder} differ in {key}: {ours!r} and {theirs!r}{hint}")
    if other_names := [name for name in other.shapes if not _FACTOR.fullmatch(name)]:
        raise ValueError(f"{other.folder} holds {other_names[0]}, which is no LoRA factor of a layer's weight")


def _check_same_shapes(first: Stored, other: Stored, space: Space) -> None:
    if differing := sorted(first.shapes.keys() ^ other.shapes.keys()):
        raise ValueError(f"{first.folder} and {other.folder} hold other tensors; differing: {differing[:3]}")
    for name, shape in other.shapes.items():
        ours = first.shapes[name]
        if space == "delta":  # ranks may differ
            rank = 0 if name.endswith("lora_A.weight") else 1
            shape, ours = (s[:rank] + s[rank + 1 :] for s in (shape, ours))
        if shape != ours:
            raise ValueError(f"{name} has shape {first.shapes[name]} in {first.folder}, {other.shapes[name]} in "
                             f"{other.folder}; only policies of one shape can be mixed")  # fmt: skip


def _check_same_tokenizer(first: Stored, other: Stored) -> None:
    ours, theirs = first.tokenizer, other.tokenizer
    for what, mine, yours in (
        ("vocabulary", ours.get_vocab(), theirs.get_vocab()),
        ("special tokens", ours.special_tokens_map, theirs.special_tokens_map),
        ("chat template", ours.chat_template, theirs.chat_template),
    ):
        if mine != yours:
            raise ValueError(f"the tokenizers of {first.folder} and {other.folder} differ in their {what}")


def merge(policies: Sequence[str], weights: Sequence[float], space: Space, folder: Path) -> None:
    """Write the mixture of policies as a policy folder of the same kind, with the first one's tokenizer.

    Computed in float64, one tensor of all policies at a time, and stored in the first policy's type. A policy of weight
    0 is not read, so a single weight of 1 gives that policy to the bit. Tied weights stand in the files once, and do so
    in the mixture.

    Args:
        weights: shares of one whole, one for each policy.
        space: "weights", theta = sum_i w_i theta_i of whole models (Rewarded Soups); "adapter", A = sum_i w_i A_i and
            B = sum_i w_i B_i, as Personalized Soups' code has it, which also mixes B_i with A_j; "delta", the sum
            of the products, sum_i w_i s_i B_i A_i, exactly, as one adapter whose rank is the sum of theirs.
        folder: is there, and empty.

    Raises:
        ValueError: see `check_soup`; or counters and other whole numbers in the weights differ.
    """
    check_soup(policies, weights, space)
    used = [(Stored(policy, space), weight) for policy, weight in zip(policies, weights, strict=True) if weight]
    first = used[0][0]
    config = first.config
    if space == "delta":
        tensors = _concatenate(used)
        rank = sum(policy.config["r"] for policy, _ in used)
        widened = rank / config["r"]
        scale = config["lora_alpha"] * (widened**0.5 if config.get("use_rslora") else widened)
        config |= {"r": rank, "lora_alpha": int(scale) if scale == int(scale) else scale}
    else:
        tensors = {name: _average(name, used) for name in first.shapes}
    save_file(tensors, folder / (MODEL if space == "weights" else ADAPTER), metadata={"format": "pt"})
    (folder / first.config_file.name).write_text(json.dumps(config, indent=2))
    if (generation := first.folder / "generation_config.json").exists():
        shutil.copy(generation, folder)
    first.tokenizer.save_pretrained(folder)


def _average(name: str, used: Sequence[tuple[Stored, float]]) -> Tensor:
    first = used[0][0][name]
    if not first.is_floating_point():
        if not all(torch.equal(first, policy[name]) for policy, _ in used):
            raise ValueError(f"{name} holds whole numbers that differ between the policies; they have no mean")
        return first
    total = first.double() * used[0][1]  # not from 0, to which a -0 adds up as 0
    for policy, weight in used[1:]:
        total += policy[name].double() * weight
    return total.to(first.dtype)


def _concatenate(used: Sequence[tuple[Stored, float]]) -> dict[str, Tensor]:
    """sum_i w_i s_i B_i A_i = s_1 [w_1 B_1, w_2 (s_2 / s_1) B_2, …] [A_1; A_2; …], in the first one's scale s_1."""
    first = used[0][0]
    tensors: dict[str, Tensor] = {}
    for name in first.shapes:
        if name.endswith("lora_A.weight"):
            tensors[name] = torch.cat([policy[name] for policy, _ in used]).to(first[name].dtype)
        else:
            parts = [policy[name].double() * (w * _scale(policy) / _scale(first)) for policy, w in used]
            tensors[name] = torch.cat(parts, dim=1).to(first[name].dtype).contiguous()
    return tensors


def _scale(policy: Stored) -> float:
    """What peft multiplies B A by."""
    config = policy.config
    return config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
