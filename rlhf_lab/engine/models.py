"""Weights on disk -> modules in memory, and back; always safetensors, never code that came with the weights."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import logging as transformers_logging
from transformers.pytorch_utils import Conv1D

from rlhf_lab.engine.adapters import (
    Record,
    check_base,
    digest,
    is_adapter,
    load_view,
    located,
    merge_into,
    read_record,
    require,
    save_view,
)
from rlhf_lab.engine.backbone import AdapterView, Backbone, Quantise, alive, alive_ones, share
from rlhf_lab.engine.model_paths import LEARNT, Adapters, check_same_settings
from rlhf_lab.engine.tiny import is_embedded, tiny_policy
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.types import GAUSSIAN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CALIBRATION = "score_calibration"
SCORE = ("score",)  # the outputs of a value model's head
NONE_NEW: Mapping[str, int] = MappingProxyType({})
NF4_BLOCK = 64  # numbers that share a scale


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


@torch.no_grad()
def widen(model: "PreTrainedModel", path: str, new_tokens: Mapping[str, int]) -> None:
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


def safe_options(dtype: torch.dtype) -> dict[str, Any]:
    """How weights are read: no code that came with them, and no pickles."""
    return {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}


def _backbone(path: str, device: torch.device, dtype: str, quantise: Quantise | None) -> Backbone:
    """The base at a path, loaded once: whoever asks for it while something uses it gets the same."""
    key = (located(path), str(device), dtype, quantise)
    if (known := alive(key)) is not None:
        return known
    model: Any
    if quantise is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **safe_options(DTYPES[dtype]))
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
            path, quantization_config=settings, device_map={"": device}, **safe_options(DTYPES[dtype])
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


def trainable_view(
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
        check_same_settings(start.own.lora, adapters.settings(start.backbone), path, 0.0)
        return start.copied(outputs=outputs, is_trunk=is_trunk, seed=seed)
    backbone = _backbone(base, device, dtype, adapters.quantise)
    adapter = backbone.new_adapter(adapters.settings(backbone), seed)
    return AdapterView(backbone, adapter, outputs=outputs, is_trunk=is_trunk, seed=seed)


def merged(view: AdapterView) -> "PreTrainedModel":
    """A whole model in float32 that computes as a view does, apart from rounding.

    Of an 8-bit base only nearly: its layers round their inputs too.
    """
    kind, options = transformers.AutoModelForCausalLM, safe_options(torch.float32)
    if outputs := view.outputs:
        kind, options = transformers.AutoModelForSequenceClassification, options | {"num_labels": len(outputs)}
    model: Any = kind.from_pretrained(view.backbone.path, **options)
    if outputs and outputs != SCORE:
        model.config.id2label, model.config.label2id = view.config.id2label, view.config.label2id
    merge_into(model, view)
    return model


def merged_at(path: str) -> "PreTrainedModel":
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
        model = trainable_view(path, adapters, device=device, dtype=dtype, seed=seed, new_tokens=new_tokens)
        return model.eval()
    if is_embedded(path):
        model = tiny_policy(seed)
    elif is_adapter(path):
        model = merged_at(path)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **safe_options(DTYPES[dtype]))
    model = model.to(DTYPES[dtype])
    widen(model, path, new_tokens)
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
        view: Any = trainable_view(
            path, adapters, device=device, dtype=dtype, seed=seed, new_tokens=new_tokens, outputs=outputs
        )
        return view
    torch.manual_seed(seed)
    base = base_of(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(outputs), **safe_options(DTYPES[dtype])
    )
    if base != path:
        model.base_model.load_state_dict(merged_at(path).base_model.state_dict())
    if outputs != SCORE:
        model.config.id2label = dict(enumerate(outputs))
        model.config.label2id = {output: i for i, output in enumerate(outputs)}
    widen(model, path, new_tokens)
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
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, **safe_options(DTYPES[dtype]))
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
