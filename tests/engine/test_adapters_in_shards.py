"""Adapters whose base is cut, in one process: what they say and learn is what adapters on a whole base do."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine.average import MovingAverage
from rlhf_lab.engine.backbone import AdapterView, Lora, layers_of
from rlhf_lab.engine.critics import Critics, load_critics, shared_critics
from rlhf_lab.engine.distribution import Distribution, is_in_step, through
from rlhf_lab.engine.forward import critic_values, policy_forward, raw_outputs
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import Adapters, ModelPaths
from rlhf_lab.engine.models import Calibration, load_frozen, load_policy, new_scorer, save_model
from rlhf_lab.engine.prefixes import share_prefixes, shares_prefixes
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.functional.aggregate import mean
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.ensemble import Ensemble
from rlhf_lab.types import Rollout, Sequences

Folder = Callable[..., str]
Ragged = Callable[..., tuple[Sequences, list[list[int]], list[list[int]]]]
close = partial(assert_close, atol=1e-5, rtol=1e-5)


def hardware(kind: str, **changes: Any) -> Hardware:
    return Hardware(device="cpu", dtype="float32", threads=1, distribution=kind, **changes)  # type: ignore[arg-type]


def adapters(quantise: Any = None, **changes: Any) -> Adapters:
    settings: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
    settings |= {"layers_to_transform": None} | changes
    return Adapters(lora=Lora(**settings), quantise=quantise, frozen_layers=0.0)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """One process is a group of its own while these tests run."""
    yield
    Distribution.of.cache_clear()
    gc.collect()  # bases that were cut for this group
    if distributed.is_initialized():
        distributed.destroy_process_group()


def disturbed(model: Any, seed: int) -> Any:
    """As if it had learnt something."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


class Models:
    """Policy, reference, critics, two value models: all on one base, distributed as a run does it."""

    def __init__(self, folder: str, kind: str, critics: str = "own", **changes: Any) -> None:
        self.distribution = Distribution.of(hardware(kind, **changes))
        options: dict[str, Any] = {"device": self.distribution.loads_on, "dtype": "float32", "seed": 0}
        few = adapters(target_modules=["down_proj", "dense_4h_to_h", "fc2", "c_proj"])
        before = disturbed(new_scorer(folder, adapters=few, **options), 3).eval().requires_grad_(False)
        self.before = self.distribution.frozen(before, is_scorer=True)  # the base is cut here, if it is
        self.policy = disturbed(load_policy(folder, adapters=adapters(), **options), 1)
        self.critics: Critics = (
            shared_critics(self.policy, ("reward", "cost"))
            if critics == "shared"
            else load_critics(
                folder if critics == "own" else critics, ("reward", "cost"), adapters=adapters(), **options
            )
        )
        disturbed(self.critics, 2)
        modules = {"policy": self.policy, "critic": self.critics}
        self.training = self.distribution.learning(modules, (0.9, 0.95), 0.0)
        self.reference = self.distribution.frozen(load_frozen(folder, adapters=adapters(), **options))
        after = disturbed(new_scorer(folder, adapters=few, **options), 4).eval().requires_grad_(False)
        self.after = self.distribution.frozen(after, is_scorer=True)

    @property
    def base(self) -> Any:
        return self.policy.backbone

    def say(self, sequences: Sequences) -> dict[str, Tensor]:
        """Everything that the models say of some rows, each called as its distribution wants it."""
        calls: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
            "policy": (self.policy, lambda: policy_forward(self.policy, sequences).logprobs),
            "reference": (self.reference, lambda: policy_forward(self.reference, sequences).logprobs),
            "cost": (self.critics, lambda: critic_values(self.critics, sequences)["cost"]),
            "before": (self.before, lambda: raw_outputs(self.before, sequences)),
            "after": (self.after, lambda: raw_outputs(self.after, sequences)),
        }
        with torch.no_grad():
            return {name: through(module, call)() for name, (module, call) in calls.items()}

    def gradients(self, sequences: Sequences) -> dict[str, Tensor]:
        """Of a loss of policy and critics, over two pieces."""

        def loss(rows: Tensor) -> Tensor:
            said = policy_forward(self.policy, sequences.select(rows), critics=self.critics)
            return said.sequence_logprobs.sum() + (said.values["cost"] ** 2).sum()

        for i, rows in enumerate((torch.tensor([0, 2]), torch.tensor([1, 3, 4]))):
            self.training.backward(self.training.loss(partial(loss, rows)), last=i == 1)
        self.training.clip(1e9)
        named = {f"policy.{key}": p for key, p in self.policy.named_parameters()}
        named |= {f"critic.{key}": p for key, p in self.critics.named_parameters()}
        return {name: p.grad for name, p in named.items() if p.grad is not None}


def in_pieces(base: Any) -> bool:
    return all(isinstance(p, DTensor) for p in base.model.parameters())


def test_models_on_a_base_that_is_cut_say_and_learn_what_they_do_on_a_whole_one(
    architecture: str, hf_folder: Folder, ragged: Ragged
):
    whole, cut = Models(hf_folder(architecture), "ddp"), Models(hf_folder(architecture), "fsdp")
    sequences, _, _ = ragged(whole.policy.config.vocab_size, 5)
    assert in_pieces(cut.base)
    assert not any(isinstance(p, DTensor) for model in (cut.policy, cut.critics, cut.after) for p in model.parameters())
    roots = {
        id(vars(model)["_entry"].root) for model in (cut.policy, cut.critics, cut.reference, cut.before, cut.after)
    }
    assert len(roots) == 1, "cut once"
    assert cut.training.in_step
    assert is_in_step(through(cut.reference, cut.reference))
    expected = whole.say(sequences)
    assert (expected["policy"] - expected["reference"]).abs().max() > 1e-2
    for name, found in cut.say(sequences).items():
        close(found, expected[name])
    gradients = whole.gradients(sequences)
    found = cut.gradients(sequences)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        close(found[name], gradient, atol=1e-4)
    assert in_pieces(cut.base)
    assert all(p.grad is None for p in cut.base.model.parameters())


def test_critics_on_the_policys_trunk_and_critics_on_another_base_learn_alike(hf_folder: Folder, ragged: Ragged):
    folder, other = hf_folder("llama"), hf_folder("qwen2")
    for critics in ("shared", other):
        whole, cut = (Models(folder, kind, critics=critics) for kind in ("ddp", "fsdp"))
        words = min(model.config.vocab_size for model in (whole.policy, whole.critics.trunk))
        sequences, _, _ = ragged(words, 5)
        expected, found = whole.gradients(sequences), cut.gradients(sequences)
        assert any(name.startswith("critic.") for name in expected)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            close(found[name], gradient, atol=1e-4)
        if critics == other:
            assert in_pieces(cut.critics.trunk.backbone)
            assert cut.critics.trunk.backbone is not cut.base


def test_layers_that_are_computed_again_have_the_same_gradient(hf_folder: Folder, ragged: Ragged):
    folder = hf_folder("gpt_neox")
    plain, again = Models(folder, "ddp"), Models(folder, "fsdp", gradient_checkpointing=True)
    sequences, _, _ = ragged(plain.policy.config.vocab_size, 5)
    expected = plain.gradients(sequences)
    calls: list[int] = []
    stack = layers_of(again.base.model)
    assert stack is not None
    again.say(sequences)
    for layer in stack:
        layer.get_submodule("input_layernorm").register_forward_hook(lambda *_: calls.append(1))
    found = again.gradients(sequences)
    assert len(calls) == 2 * len(stack) * 2 * 2  # once more; two models read two pieces
    for name, gradient in expected.items():
        close(found[name], gradient, atol=1e-4)
    # and what samples has layers of its own, with weights of the base
    with torch.no_grad(), again.distribution.whole(again.policy) as sampled:
        close(policy_forward(sampled, sequences).logprobs, plain.say(sequences)["policy"])


def test_within_whole_all_that_stand_on_the_base_are_called_by_themselves(hf_folder: Folder, ragged: Ragged):
    whole, cut = Models(hf_folder("llama"), "ddp"), Models(hf_folder("llama"), "fsdp")
    sequences, _, _ = ragged(whole.policy.config.vocab_size, 5)
    expected = whole.say(sequences)
    average = MovingAverage(cut.policy, 0.5)
    settings = Sampling(max_new_tokens=6, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=64)
    template = Template(load_tokenizer(hf_folder("llama")), "auto")
    prompts = prompt_batch(template, [Prompt.from_text(text) for text in ("a joke", "is it safe ?")])
    make = partial(Generator, template=template, sampling=settings)
    drawn = cut.distribution.engine(cut.policy, make).generate(prompts, 3, seed=0)
    assert drawn.responses == whole.distribution.engine(whole.policy, make).generate(prompts, 3, seed=0).responses
    copy = cut.base.copy
    through(cut.policy, partial(share_prefixes, cut.policy))()
    with torch.no_grad(), cut.distribution.whole(cut.policy) as policy:
        assert policy is cut.policy
        assert shares_prefixes(policy)
        close(policy_forward(policy, sequences).logprobs, expected["policy"])
        close(policy_forward(cut.reference, sequences).logprobs, expected["reference"])
        close(policy_forward(average.model, sequences).logprobs, expected["policy"])
        close(raw_outputs(cut.after, sequences), expected["after"])
        assert sum(p.numel() for p in copy.parameters()) == sum(p.numel() for p in whole.base.model.parameters())
    assert sum(p.numel() for p in copy.parameters()) == 0, "what was gathered is let go"
    close(cut.say(sequences)["policy"], expected["policy"])


def test_one_call_may_go_through_the_root_twice(hf_folder: Folder, ragged: Ragged):
    """As an implicit reward's does, of two policies that may stand on one base."""
    models = Models(hf_folder("llama"), "fsdp")
    sequences, _, _ = ragged(models.policy.config.vocab_size, 5)
    said = models.say(sequences)

    def both() -> Tensor:
        return policy_forward(models.policy, sequences).logprobs - policy_forward(models.reference, sequences).logprobs

    for _ in range(2):
        with torch.no_grad():
            close(through(models.policy, through(models.reference, both))(), said["policy"] - said["reference"])
        assert in_pieces(models.base)
    models.gradients(sequences)


def test_what_is_used_whole_never_stands_on_a_base_that_is_cut(hf_folder: Folder, tmp_path: Path):
    folder = hf_folder("llama")
    models = Models(folder, "fsdp")
    save_model(tmp_path, models.policy, load_tokenizer(folder))
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": "float32", "seed": 0}
    beside: Any = load_frozen(folder, adapters=adapters(), **options)
    assert isinstance(beside, AdapterView)
    assert beside.backbone is not models.base
    merged = load_policy(str(tmp_path), device=models.distribution.loads_on, dtype="float32", seed=0)
    assert not any(isinstance(p, DTensor) for p in merged.parameters())


def test_members_on_a_base_that_is_cut_compute_what_they_share_once(hf_folder: Folder, tmp_path: Path):
    folder = hf_folder("llama")
    template = Template(load_tokenizer(folder), "auto")
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": "float32"}
    upper = adapters(layers_to_transform=[1])
    for k in (0, 1):
        scorer = disturbed(new_scorer(folder, adapters=upper, seed=k, **options), k)
        save_model(tmp_path / str(k), scorer, template.tokenizer, Calibration())
    settings = Sampling(max_new_tokens=6, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=64)
    prompts = prompt_batch(template, [Prompt.from_text(text) for text in ("a joke", "is it safe ?")])
    rollout: Rollout = Generator(load_policy(folder, seed=0, **options), template, settings).generate(
        prompts, 3, seed=0
    )
    paths = [str(tmp_path / str(k)) for k in (0, 1)]
    whole, cut = (
        Ensemble(paths, 2, mean, "auto", 20).load(hardware(kind), template) for kind in ("ddp", "fsdp")
    )  # fmt: skip
    first: Any = cut.models[0]
    assert in_pieces(first.backbone)
    assert cut.together is not None
    assert cut.together.common == 1
    expected = whole.score(rollout).members
    assert expected.std(1).min() > 1e-4
    close(cut.score(rollout).members, expected)


def paths(**changes: Any) -> ModelPaths:
    settings: dict[str, Any] = {"peft": "lora", "lora": adapters().lora, "learning_rates": {}}
    settings |= dict.fromkeys(("base", "policy", "reference", "critic"), "a/b")
    return ModelPaths(**(settings | changes))


def test_what_cuts_no_base_is_refused():
    assert paths().dtype(hardware("fsdp")) == "float32"
    for kind in ("zero1", "zero2", "zero3"):
        pytest.importorskip("deepspeed")
        with pytest.raises(ValueError, match=rf"model\.peft=lora, but hardware\.distribution={kind} .*hardware=fsdp"):
            paths().dtype(hardware(kind))
    for bits in ("nf4", "int8"):
        with pytest.raises(ValueError, match=rf"model\.quantise={bits} packs the layers .*distribution=fsdp"):
            paths(quantise=bits).dtype(hardware("fsdp"))
        assert paths(quantise=bits).dtype(hardware("ddp")) == "float32"


def test_a_value_model_on_a_quantised_base_is_not_cut(hf_folder: Folder):
    pytest.importorskip("bitsandbytes")
    distribution = Distribution.of(hardware("fsdp"))
    options: dict[str, Any] = {"device": distribution.loads_on, "dtype": "float32", "seed": 0}
    scorer = new_scorer(hf_folder("llama"), adapters=adapters("int8"), **options)
    with pytest.raises(ValueError, match="stored as int8, whose packed layers hardware=fsdp does not cut"):
        distribution.frozen(scorer, is_scorer=True)
