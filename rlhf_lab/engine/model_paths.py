"""Which weights a run reads, whole or as adapters on a base, checked before anything is loaded."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rlhf_lab.engine.adapters import check_adapter, check_base, is_adapter, lora_of, read_record, require
from rlhf_lab.engine.backbone import ALL_LINEAR, Backbone, Lora, Quantise, frozen_count
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.tiny import TINY, is_embedded
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.types import Fraction

SHARED = "shared"  # model.critic: value heads on the policy's own trunk
LEARNT = "float32"  # of what learns, and of what it is compared with: steps of 1e-5 round away in bfloat16


@dataclass(frozen=True, kw_only=True)
class ModelPaths:
    """Which weights a run reads: hub ids, local folders, or `embedded:tiny` for the model that comes with the project.

    `learning_rates` belong to the model, since they depend on its size: module -> rate. `new_tokens` are words that it
    gets beside its own, such as the names of conditions; they are saved with it. `frozen_layers` is the share of the
    layers that do not learn, in policies, critics and scorers: the first ones, and with them the embeddings.

    With `peft` what learns are adapters, with the settings `lora`, and all models of a run that stand on one base share
    it, stored as `quantise` says; `merge` saves what was trained as a whole model, and not as an adapter.
    """

    base: str  # before any fine-tuning
    policy: str  # what is trained, or what samples
    reference: str  # what the KL is measured against
    critic: str  # trunk of the value heads; `shared`: the policy's own, which then learns from both losses
    learning_rates: Mapping[str, float]
    new_tokens: Sequence[str] = ()
    frozen_layers: Fraction = 0.0
    peft: Literal["lora"] | None = None
    lora: Lora | None = None
    quantise: Quantise | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        if self.peft is None and (self.quantise or self.merge):
            key = f"quantise={self.quantise}" if self.quantise else "merge=true"
            raise ValueError(f"model.{key} is of adapters, but model.peft=null loads whole models; set model.peft=lora")
        if self.peft and self.lora is None:
            raise ValueError("model.peft=lora, but model.lora has no settings; see conf/model/tiny.yaml")
        if self.peft and self.frozen_layers and self.lora and self.lora.layers_to_transform is not None:
            raise ValueError(
                f"model.frozen_layers={self.frozen_layers} and model.lora.layers_to_transform="
                f"{self.lora.layers_to_transform} both say which layers learn; set one of them"
            )

    @property
    def adapters(self) -> "Adapters | None":
        """How models are loaded as adapters on one base; None where they are whole models."""
        if self.peft is None:
            return None
        assert self.lora is not None
        return Adapters(lora=self.lora, quantise=self.quantise, frozen_layers=self.frozen_layers)

    def dtype(self, hardware: "Hardware") -> str:
        """Of a policy, its reference and critics: what learns, learns in float32; a base that does not may be less.

        Raises:
            ValueError: the base would be cut in a way in which it cannot be.
        """
        if self.peft and hardware.distribution not in ("ddp", "fsdp"):
            raise ValueError(
                f"model.peft=lora, but hardware.distribution={hardware.distribution} does not cut what does not learn "
                "from what does; use hardware=fsdp, which cuts the base of adapters, or ddp, gpu or cpu"
            )
        if self.quantise and hardware.distribution != "ddp":
            raise ValueError(
                f"model.quantise={self.quantise} packs the layers of the base, and hardware.distribution="
                f"{hardware.distribution} does not cut packed layers; use hardware=ddp, gpu or cpu, where each process "
                "keeps all of the base, or model.quantise=null"
            )
        return LEARNT if self.peft is None else hardware.dtype

    def check(self, roles: Sequence[str], promised: Collection[str] = ()) -> None:
        """Refuse, before anything is loaded, models in these roles that are not there or cannot be trained as set.

        Raises:
            ValueError: naming the setting.
        """
        for role in roles:
            check_path(getattr(self, role), f"model.{role}", promised)
        if self.peft is None or self.lora is None:
            return
        require("peft")
        if self.quantise:
            require("bitsandbytes")
        if self.new_tokens:
            raise ValueError(
                f"model.new_tokens={list(self.new_tokens)}, but with model.peft=lora the embeddings do not learn; give "
                "a whole model its new words first (model.peft=null), and train adapters on that one"
            )
        for role in roles:
            path = getattr(self, role)
            if is_embedded(path):
                raise ValueError(
                    f"model.{role}={path} has no trained weights that an adapter could be of; name the folder of a "
                    "trained model, or use model.peft=null"
                )
            if role in ("policy", "critic") and path not in promised and is_adapter(path):
                check_same_settings(lora_of(path), self.lora, path, self.frozen_layers)

    def check_words(self, words: Sequence[str], promised: Collection[str] = ()) -> None:
        """Refuse adapters for a policy that lacks words of the method itself, before anything is loaded.

        Raises:
            ValueError: the embeddings do not learn with adapters, so nothing would give these words a meaning.
        """
        if self.peft is None or not words:  # no tokenizer is fetched for nothing
            return
        known = {} if self.policy in promised else load_tokenizer(self.policy).get_vocab()
        if lacking := [word for word in words if word not in known]:
            raise ValueError(
                f"this method gives the policy words of its own ({', '.join(lacking[:3])}, …), which "
                f"model.policy={self.policy} does not know, and with model.peft=lora the embeddings do not learn; use "
                "model.peft=null, or name the folder of a policy that has them"
            )


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """That models are loaded as adapters on one base, and what new ones are like."""

    lora: Lora
    quantise: Quantise | None
    frozen_layers: Fraction

    def settings(self, backbone: Backbone) -> Lora:
        """Of a new adapter on this base."""
        if not self.frozen_layers:
            return self.lora
        count = backbone.model.config.get_text_config().num_hidden_layers
        return replace(self.lora, layers_to_transform=list(range(frozen_count(count, self.frozen_layers), count)))


def check_same_settings(found: Lora, wanted: Lora, path: str, frozen_layers: float) -> None:
    """Refuse to go on with an adapter under other settings than its own."""
    for key in ("rank", "alpha", "target_modules", "layers_to_transform"):
        ours, theirs = getattr(wanted, key), getattr(found, key)
        if key == "target_modules":
            if ours == ALL_LINEAR:  # which is written out in the folder
                continue
            ours = ours if isinstance(ours, str) else sorted(ours)
        if key == "layers_to_transform" and frozen_layers:  # depends on the number of layers
            continue
        if ours != theirs:
            raise ValueError(
                f"{path} is an adapter with {key}={theirs}, but model.lora.{key}={ours}; an adapter that starts from "
                f"another has its settings: set model.lora.{key}={theirs}, or merge that one first (model.merge=true)"
            )


def check_path(path: str, role: str, promised: Collection[str] = ()) -> None:
    """Refuse a model folder that is not there, or holds no safetensors, before anything is loaded.

    `promised` paths are let pass: they will be there by then. So are absent ones that may be a hub id, owner/name.

    Raises:
        ValueError: naming the role, the path, and what is missing.
    """
    if path in promised:
        return
    if is_embedded(path):
        if path != TINY:
            raise ValueError(f"{role}={path}: the only embedded model is {TINY}")
        return
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.startswith(("/", ".", "~")) or path.count("/") != 1:
            raise ValueError(
                f"{role}={path}: no such folder; give a Hugging Face model folder or a hub id (owner/name)"
            )
        return
    if is_adapter(path):
        base = check_adapter(path, role)
        if base not in promised:
            check_path(base, f"the base of {role}={path}", promised)
            check_base(path, read_record(path))
        return
    if not (folder / "config.json").exists():
        raise ValueError(f"{role}={path}: no config.json there; it is not a Hugging Face model folder")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{role}={path}: no *.safetensors there; other weight files (pickles) are not loaded")
