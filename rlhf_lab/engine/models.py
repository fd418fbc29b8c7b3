"""Weights on disk -> modules in memory, and back; always safetensors, never code that came with the weights."""

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import logging as transformers_logging
from transformers.pytorch_utils import Conv1D

from rlhf_lab.engine.adapters import (
    Record,
    check_adapter,
    check_base,
    digest,
    is_adapter,
    load_view,
    located,
    lora_of,
    merge_into,
    read_record,
    require,
    save_view,
)
from rlhf_lab.engine.backbone import (
    ALL_LINEAR,
    AdapterView,
    Backbone,
    Head,
    Inner,
    Lora,
    Quantise,
    alive,
    alive_ones,
    frozen_count,
    share,
)
from rlhf_lab.engine.tiny import TINY, tiny_policy, tiny_tokenizer
from rlhf_lab.types import GAUSSIAN, Count, Fraction

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CALIBRATION = "score_calibration"
SCORE = ("score",)  # the outputs of a value model's head
NONE_NEW: Mapping[str, int] = MappingProxyType({})
SHARED = "shared"  # model.critic: value heads on the policy's own trunk
NF4_BLOCK = 64  # numbers that share a scale
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
                _check_same_settings(lora_of(path), self.lora, path, self.frozen_layers)

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
class Hardware:
    """Where a run computes, in which precision, and where its weights are; changes nothing else.

    Raises:
        ValueError: settings do not go together, or a package that they need is not installed.
    """

    device: str  # cpu, cuda, cuda:1, …
    dtype: Literal["float32", "bfloat16"]  # of the weights of reward and cost models
    threads: Count  # of torch, per process; more than the free cores is slower, by far
    distribution: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"  # ddp: each process holds all weights
    offload: bool = False  # of what is sharded into the CPU's memory
    bf16: bool = False  # policies, references and critics compute in bfloat16; their weights stay in float32
    gradient_checkpointing: bool = False  # layers are computed again in the backward pass: less memory, a third slower

    def __post_init__(self) -> None:
        if self.offload and self.distribution == "ddp":
            raise ValueError(
                "hardware.offload=true moves shards, but with hardware.distribution=ddp each process holds all "
                "weights; use hardware=fsdp or zero1 to zero3, or hardware.offload=false"
            )
        needed = ("accelerate", "deepspeed") if self.distribution.startswith("zero") else ()
        if missing := [name for name in needed if find_spec(name) is None]:
            raise ValueError(
                f"hardware.distribution={self.distribution} needs {' and '.join(missing)}: "
                "pip install -c constraints.txt -e '.[distributed]'"
            )

    def start(self) -> torch.device:
        """Apply the settings to this process.

        Raises:
            ValueError: the device is not there.
        """
        torch.set_num_threads(self.threads)
        if self.device == "cpu":  # DeepSpeed, which transformers imports whenever a model is saved, would warn of it
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"hardware.device={self.device}, but torch sees no GPU; use hardware=cpu")
        return torch.device(self.device)


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


def _check_same_settings(found: Lora, wanted: Lora, path: str, frozen_layers: float) -> None:
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


@dataclass(frozen=True)
class Calibration:
    """score = scale * raw + shift: how a value model's raw output becomes a score in stated units."""

    scale: float = 1.0
    shift: float = 0.0
    method: str = "none"  # none, standardised, scaled, gold, labels
    fitted_on: str = ""  # the reference set, by name

    def __call__(self, raw: Tensor) -> Tensor:
        return self.scale * raw + self.shift

    def variance(self, raw: Tensor) -> Tensor:
        """That of the score, from that of the raw output."""
        return self.scale**2 * raw


def is_embedded(path: str) -> bool:
    return path.startswith("embedded:")


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


def load_tokenizer(path: str, new_tokens: Sequence[str] = ()) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model; one without a pad token pads with its EOS, which masks make harmless.

    Args:
        new_tokens: are added, as plain words that decoding shows, where they are not there yet.

    Raises:
        ValueError: it has no EOS token, so no response could end.
    """
    tokenizer = (
        tiny_tokenizer()
        if is_embedded(path)
        else transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    )
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {path} has no EOS token; a response could never end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens([transformers.AddedToken(token, normalized=False) for token in new_tokens])
    return tokenizer


def new_token_ids(tokenizer: "PreTrainedTokenizerBase", new_tokens: Sequence[str]) -> dict[str, int]:
    """token -> its id in the policy's tokenizer, by which every model of a run finds its row.

    Tokens that the policy was given in an earlier run are among them: a reference from before that lacks them too.
    """
    vocabulary, added = tokenizer.get_vocab(), cast(Any, tokenizer).get_added_vocab()
    return {token: vocabulary[token] for token in dict.fromkeys([*added, *new_tokens])}


@torch.no_grad()
def _widen(model: "PreTrainedModel", path: str, new_tokens: Mapping[str, int]) -> None:
    """Give tokens that the model does not know a row each, the mean of its own rows, in and out.

    The mean is where a word without meaning belongs, and draws no random numbers: policy, reference and critics agree.

    Args:
        new_tokens: token -> id.

    Raises:
        ValueError: the model knows one of them under another id, so one batch of tokens would not serve both.
    """
    own = load_tokenizer(path).get_vocab() if new_tokens else {}
    if other := [token for token, row in new_tokens.items() if own.get(token, row) != row]:
        raise ValueError(
            f"{path} knows {other[0]!r} as token {own[other[0]]}, the policy as {new_tokens[other[0]]}; "
            "list model.new_tokens in the order in which that model got them"
        )
    missing = [row for token, row in new_tokens.items() if token not in own]
    if not missing:
        return
    known = torch.tensor(sorted(own.values()))
    rows = len(cast(Tensor, model.get_input_embeddings().weight))
    missing += range(rows, max(missing))  # no row is left as resizing finds it, which differs from time to time
    if max(missing) >= rows:  # some models have rows to spare
        model.resize_token_embeddings(max(missing) + 1, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in layer.parameters() if layer is not None else ():
            parameter[missing] = parameter[known.to(parameter.device)].mean(0)


def _options(dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}


def _backbone(path: str, device: torch.device, dtype: str, quantise: Quantise | None) -> Backbone:
    """The base at a path, loaded once: whoever asks for it while something uses it gets the same."""
    key = (located(path), str(device), dtype, quantise)
    if (known := alive(key)) is not None:
        return known
    model: Any
    if quantise is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **_options(DTYPES[dtype]))
        model = model.to(device)
    else:
        require("bitsandbytes")
        if quantise == "nf4":
            _check_blocks(path)
        settings = (
            transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=DTYPES[dtype],
            )
            if quantise == "nf4"
            else transformers.BitsAndBytesConfig(load_in_8bit=True)
        )
        # 8-bit layers round their inputs too, in float16, and say so at every call
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, quantization_config=settings, device_map={"": device}, **_options(DTYPES[dtype])
        )
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                # on processors that have the instruction, it would compute in bfloat16, pack its weights anew at the
                # first pass without gradient, and fail at widths that are no multiple of 64
                layer.support_avx512bf16_for_cpu = False
    return share(key, Backbone(model, path, quantise))


def _check_blocks(path: str) -> None:
    """Refuse layers whose rows are no whole blocks: on a CPU, bitsandbytes 0.50 reads their weights back as others.

    Raises:
        ValueError: naming one of them.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        )
    for name, layer in model.base_model.named_modules():
        is_linear, is_transposed = isinstance(layer, nn.Linear | Conv1D), isinstance(layer, Conv1D)
        if is_linear and (width := cast(Tensor, layer.weight).shape[0 if is_transposed else 1]) % NF4_BLOCK:
            raise ValueError(
                f"model.quantise=nf4 stores blocks of {NF4_BLOCK} numbers, but a row of {name} in {path} has {width}; "
                "use model.quantise=int8 or null"
            )


def _check_knows(path: str, new_tokens: Mapping[str, int]) -> None:
    """Refuse a base that lacks a token: it does not learn, so the token's row would stay without meaning.

    Raises:
        ValueError: naming the tokens.
    """
    own = load_tokenizer(path).get_vocab() if new_tokens else {}
    if lacking := [token for token, row in new_tokens.items() if own.get(token) != row]:
        raise ValueError(
            f"{path} does not know {lacking[:5]}, and the embeddings of a base do not learn; give a whole model its "
            "new words first (model.peft=null), and train adapters on that one"
        )


def base_of(path: str) -> str:
    """Of an adapter; a whole model is its own."""
    return read_record(path).base if is_adapter(path) else path


def _adapter(
    path: str, *, device: torch.device, dtype: str, quantise: Quantise | None, is_trunk: bool = False
) -> AdapterView:
    """The adapter in a folder, on its base."""
    record = read_record(path)
    check_base(path, record)
    return load_view(_backbone(record.base, device, dtype, quantise), path, is_trunk=is_trunk)


def _trainable(
    path: str,
    adapters: Adapters,
    *,
    device: torch.device,
    dtype: str,
    seed: int,
    new_tokens: Mapping[str, int],
    outputs: tuple[str, ...] = (),
    is_trunk: bool = False,
) -> AdapterView:
    """A new adapter, with a fresh head for each output: on the model at a path, or where the adapter there stands."""
    base = base_of(path)
    _check_knows(base, new_tokens)
    if is_adapter(path):
        start = _adapter(path, device=device, dtype=dtype, quantise=adapters.quantise, is_trunk=True)
        assert start.own is not None
        _check_same_settings(start.own.lora, adapters.settings(start.backbone), path, 0.0)
        return start.copied(outputs=outputs, is_trunk=is_trunk, seed=seed)
    backbone = _backbone(base, device, dtype, adapters.quantise)
    adapter = backbone.new_adapter(adapters.settings(backbone), seed)
    return AdapterView(backbone, adapter, outputs=outputs, is_trunk=is_trunk, seed=seed)


def merged(view: AdapterView) -> "PreTrainedModel":
    """A whole model in float32 that computes as a view does, apart from rounding.

    Of an 8-bit base only nearly: its layers round their inputs too.
    """
    kind, options = transformers.AutoModelForCausalLM, _options(torch.float32)
    if outputs := view.outputs:
        kind, options = transformers.AutoModelForSequenceClassification, options | {"num_labels": len(outputs)}
    model: Any = kind.from_pretrained(view.backbone.path, **options)
    if outputs and outputs != SCORE:
        model.config.id2label, model.config.label2id = view.config.id2label, view.config.label2id
    merge_into(model, view)
    return model


def _merged_at(path: str) -> "PreTrainedModel":
    """What the adapter in a folder makes of its base, as a whole model on the CPU."""
    quantise = read_record(path).quantise
    return merged(_adapter(path, device=torch.device("cpu"), dtype=LEARNT, quantise=quantise))


def load_policy(
    path: str,
    *,
    device: torch.device,
    dtype: str,
    seed: int,
    new_tokens: Mapping[str, int] = NONE_NEW,
    adapters: Adapters | None = None,
) -> "PreTrainedModel":
    """A causal language model in evaluation mode, that may learn.

    Args:
        seed: initialises an embedded one, and new adapters.
        new_tokens: token -> id, see `new_token_ids`.
        adapters: it is an adapter on a shared base; None: a whole model, into which an adapter at `path` is merged.
    """
    model: Any  # transformers wraps `to` in a way that type checkers cannot follow; a view acts like a model
    if adapters is not None:
        model = _trainable(path, adapters, device=device, dtype=dtype, seed=seed, new_tokens=new_tokens)
        return model.eval()
    if is_embedded(path):
        model = tiny_policy(seed)
    elif is_adapter(path):
        model = _merged_at(path)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **_options(DTYPES[dtype]))
    model = model.to(DTYPES[dtype])
    _widen(model, path, new_tokens)
    return model.to(device).eval()


def load_frozen(
    path: str,
    *,
    device: torch.device,
    dtype: str,
    seed: int,
    new_tokens: Mapping[str, int] = NONE_NEW,
    adapters: Adapters | None = None,
) -> "PreTrainedModel":
    """A causal language model that does not learn; an adapter is read on its base, which others share."""
    view: Any
    if is_adapter(path):
        _check_knows(base_of(path), new_tokens)
        quantise = read_record(path).quantise if adapters is None else adapters.quantise
        view = _adapter(path, device=device, dtype=dtype, quantise=quantise)
        return view.eval().requires_grad_(False)
    if adapters is not None:
        _check_knows(path, new_tokens)
        view = AdapterView(_backbone(path, device, dtype, adapters.quantise), None)
        return view.eval()
    policy = load_policy(path, device=device, dtype=dtype, seed=seed, new_tokens=new_tokens)
    return policy.requires_grad_(False)


def new_scorer(
    path: str,
    *,
    device: torch.device,
    dtype: str,
    seed: int,
    new_tokens: Mapping[str, int] = NONE_NEW,
    outputs: tuple[str, ...] = SCORE,
    adapters: Adapters | None = None,
) -> "PreTrainedModel":
    """A policy's trunk with a fresh head: a sequence classifier to be trained, one label for each of the `outputs`."""
    if is_embedded(path):
        raise ValueError(f"model.policy={path} has no trained trunk; name the folder of a trained policy")
    if adapters is not None:
        view: Any = _trainable(
            path, adapters, device=device, dtype=dtype, seed=seed, new_tokens=new_tokens, outputs=outputs
        )
        return view
    torch.manual_seed(seed)
    base = base_of(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(outputs), **_options(DTYPES[dtype])
    )
    if base != path:
        model.base_model.load_state_dict(_merged_at(path).base_model.state_dict())
    if outputs != SCORE:
        model.config.id2label = dict(enumerate(outputs))
        model.config.label2id = {output: i for i, output in enumerate(outputs)}
    _widen(model, path, new_tokens)
    return model.to(device)


def load_scorer(path: str, *, device: torch.device, dtype: str) -> tuple["PreTrainedModel", Calibration]:
    """A trained value model, frozen, with the calibration that its config carries.

    An adapter joins a base that is in use already if it is its own, by path or by the bytes of its weights.

    Raises:
        ValueError: it has other outputs than a score, or than the mean and log-variance of one; or it is an adapter and
            its base has other weights than it learnt on.
    """
    if is_adapter(path):
        record = read_record(path)
        _check_outputs(path, record.outputs)
        check_base(path, record)
        view: Any = load_view(_backbone_in_use(record, device, dtype), path)
        return view.eval().requires_grad_(False), Calibration(**record.calibration)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, **_options(DTYPES[dtype]))
    _check_outputs(path, tuple(model.config.id2label[i] for i in range(model.config.num_labels)))
    calibration = Calibration(**getattr(model.config, CALIBRATION, {}))
    return model.to(device).eval().requires_grad_(False), calibration


def _check_outputs(path: str, labels: tuple[str, ...]) -> None:
    if len(labels) != 1 and labels != GAUSSIAN:
        raise ValueError(
            f"{path} has {len(labels)} outputs, {', '.join(labels[:5])}; a reward or cost model has one, "
            f"or the two that are called {' and '.join(GAUSSIAN)}"
        )


def _backbone_in_use(record: Record, device: torch.device, dtype: str) -> Backbone:
    """The base of an adapter: as it learnt if that is in memory, else in memory otherwise quantised, else loaded."""
    base = located(record.base)
    there = [backbone for (_, *how), backbone in alive_ones() if how[:2] == [str(device), dtype]]
    same = [b for b in there if located(b.path) == base or (record.digest and digest(b.path) == record.digest)]
    same.sort(key=lambda backbone: backbone.quantise != record.quantise)
    return same[0] if same else _backbone(record.base, device, dtype, record.quantise)


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
        trunk = _trainable(
            path, adapters, device=device, dtype=dtype, seed=seed + 1, new_tokens=new_tokens, is_trunk=True
        )
        return Critics(trunk, names).to(device).eval()
    if is_embedded(path):
        trunk = tiny_policy(seed).model
        trunk = trunk.to(DTYPES[dtype])
    elif is_adapter(path):
        trunk = _merged_at(path).base_model.to(DTYPES[dtype])
    else:
        trunk = transformers.AutoModel.from_pretrained(path, **_options(DTYPES[dtype]))
    _widen(trunk, path, new_tokens)
    return Critics(trunk, names).to(device).eval()


def shared_critics(policy: "PreTrainedModel", names: tuple[str, ...]) -> Critics:
    """Value heads on the policy's own trunk."""
    return Critics(cast("PreTrainedModel", policy.base_model), names, shares_trunk=True).to(policy.device).eval()


def save_model(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    calibration: Calibration | None = None,
    *,
    merge: bool = False,
) -> None:
    """Write a folder that `AutoModelFor…` loads, of an adapter with peft; a value model's calibration goes with it.

    Args:
        merge: write an adapter as a whole model.
    """
    if isinstance(model, AdapterView):
        if not merge:
            save_view(folder, model, None if calibration is None else calibration.__dict__)
            tokenizer.save_pretrained(folder)
            return
        model = merged(model)
    if calibration is not None:
        setattr(model.config, CALIBRATION, dict(calibration.__dict__))
        # AutoModelForSequenceClassification reads the score at the last token that is not a pad: were the EOS the pad,
        # it would read one token early. Without a pad it reads the last token, and refuses more than one row.
        shared = tokenizer.pad_token_id == tokenizer.eos_token_id
        model.config.pad_token_id = None if shared else tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
