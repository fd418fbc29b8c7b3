"""One process: settings that change memory only, the precision of what learns, and what is refused."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_lab.engine import distribution, hardware
from rlhf_lab.engine.distribution import Distribution, Whole, in_step, is_in_step, through
from rlhf_lab.engine.forward import policy_forward
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.models import load_frozen, load_policy
from rlhf_lab.engine.parameters import layers
from rlhf_lab.types import Sequences

CPU = torch.device("cpu")
Folder = Callable[[str], str]
Ragged = Callable[..., tuple[Sequences, list[list[int]], list[list[int]]]]


def on_cpu(**changes: Any) -> Hardware:
    return Hardware(device="cpu", dtype="float32", threads=1, **changes)


def gradients(model: nn.Module, sequences: Sequences, on: Hardware) -> tuple[dict[str, Tensor], Tensor]:
    """Of the log-probability of all rows, and each row's."""
    training = Distribution.of(on).learning({"policy": model}, (0.9, 0.95), 0.0)
    said: list[Tensor] = []

    def loss() -> Tensor:
        said.append(policy_forward(model, sequences).sequence_logprobs)  # type: ignore[arg-type]
        return said[0].sum()

    training.backward(training.loss(loss), last=True)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, said[0].detach()


@pytest.mark.parametrize("reenters", [False, True])
def test_layers_that_are_computed_again_have_the_same_gradient(
    architecture: str, reenters: bool, hf_folder: Folder, ragged: Ragged, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distribution.Replicated, "_reenters", reenters)
    load = partial(load_policy, hf_folder(architecture), device=CPU, dtype="float32", seed=0)
    plain, again = load(), load()
    sequences, _, _ = ragged(plain.config.vocab_size, 5)
    calls: list[int] = []
    for layer in layers(again):
        inner = next(
            part for part in layer.modules() if isinstance(part, nn.LayerNorm) or "Norm" in type(part).__name__
        )
        inner.register_forward_hook(lambda *_: calls.append(1))
    expected, _ = gradients(plain, sequences, on_cpu())
    policy_forward(again, sequences)  # which tries a new model out first
    calls.clear()
    found, _ = gradients(again, sequences, on_cpu(gradient_checkpointing=True))
    # the last layer of a Llama is computed where it is read, and kept: its backward pass comes first
    kept = architecture in ("llama", "qwen2")
    assert len(calls) == 2 * len(layers(again)) - kept
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    with torch.no_grad():
        policy_forward(again, sequences)
    assert len(calls) == 3 * len(layers(again)) - kept, "without a gradient nothing is computed twice"


def test_in_bf16_layers_compute_in_bfloat16_and_what_learns_stays_in_float32(hf_folder: Folder, ragged: Ragged):
    load = partial(load_policy, hf_folder("llama"), device=CPU, dtype="float32", seed=0)
    plain, half = load(), load()
    sequences, _, _ = ragged(plain.config.vocab_size, 6)
    policy_forward(half, sequences)  # which tries a new model out
    kinds: set[torch.dtype] = set()
    layers(half)[0].get_submodule("mlp").register_forward_hook(lambda _, __, output: kinds.add(output.dtype))
    expected, exact = gradients(plain, sequences, on_cpu())
    found, rounded = gradients(half, sequences, on_cpu(bf16=True))
    assert kinds == {torch.bfloat16}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert_close(rounded, exact, atol=0.5, rtol=0.02)
    assert not torch.equal(rounded, exact)
    whole = torch.cat([g.flatten() for g in expected.values()])
    near = torch.cat([g.flatten() for g in found.values()])
    assert torch.cosine_similarity(whole, near, 0) > 0.99

    training = vars(half)["_training"]
    assert isinstance(training, Whole)
    training.step({"policy": 0.1})
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    [moments] = training.moments().values()
    assert {moment.dtype for values in moments.values() for moment in values.values()} == {torch.float32}

    # what samples, and the reference, compute as what learns does
    now, _ = gradients_of_nothing(half, sequences)
    with torch.no_grad(), Distribution.of(on_cpu(bf16=True)).whole(half) as sampled:
        assert torch.equal(policy_forward(sampled, sequences).logprobs, now)


def gradients_of_nothing(model: Any, sequences: Sequences) -> tuple[Tensor, bool]:
    with torch.no_grad():
        call = through(model, lambda: policy_forward(model, sequences).logprobs)
        return call(), is_in_step(call)


def test_a_scorer_computes_in_the_precision_of_its_weights(hf_folder: Folder, ragged: Ragged):
    model = load_frozen(hf_folder("llama"), device=CPU, dtype="float32", seed=0)
    sequences, _, _ = ragged(model.config.vocab_size, 3)
    with torch.no_grad():
        expected = policy_forward(model, sequences).logprobs
    Distribution.of(on_cpu(bf16=True)).frozen(model, is_scorer=True)
    assert torch.equal(gradients_of_nothing(model, sequences)[0], expected)
    Distribution.of(on_cpu(bf16=True)).frozen(model)
    assert not torch.equal(gradients_of_nothing(model, sequences)[0], expected)


def test_alone_nothing_waits_for_others():
    assert in_step([torch.tensor([3]), torch.tensor([1, 2])])[1][1]
    net = nn.Linear(2, 2)
    Distribution.of(on_cpu()).frozen(net)
    call = through(net, net)
    assert call is net
    assert not is_in_step(call)


def test_what_cannot_be_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"hardware\.offload=true moves shards, but with hardware\.distribution=ddp"):
        on_cpu(offload=True)
    known = importlib.util.find_spec
    monkeypatch.setattr(hardware, "find_spec", lambda name: None if name == "deepspeed" else known(name))
    with pytest.raises(ValueError, match=r"needs deepspeed: pip install -c constraints.txt -e '\.\[distributed\]'"):
        on_cpu(distribution="zero3")
    on_cpu(distribution="fsdp")
