"""What members have in common is found from the weights, computed once, and changes no score."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from rlhf_lab.engine.backbone import Lora, layers_of
from rlhf_lab.engine.forward import policy_forward, raw_outputs
from rlhf_lab.engine.model_paths import Adapters
from rlhf_lab.engine.models import load_frozen, load_policy, new_scorer
from rlhf_lab.engine.parameters import freeze
from rlhf_lab.engine.trunk import Members, alias_frozen, common_layers
from rlhf_lab.types import Sequences

OPTIONS: dict[str, Any] = {"device": torch.device("cpu"), "dtype": "float32"}
Folder = Callable[..., str]
Ragged = Callable[..., tuple[Sequences, list[list[int]], list[list[int]]]]


def scorers(folder: str, count: int = 3, frozen: float = 0.5, adapters: Adapters | None = None) -> list[Any]:
    """As if each had been trained from one policy with other data."""
    models = [new_scorer(folder, seed=k, adapters=adapters, **OPTIONS).eval() for k in range(count)]
    with torch.no_grad():
        for k, model in enumerate(models):
            freeze(model, frozen)
            source = torch.Generator().manual_seed(k)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=source)
    return [model.requires_grad_(False) for model in models]


def on_upper_layers() -> Adapters:
    lora = Lora(rank=4, alpha=8, dropout=0.0, target_modules="all-linear", layers_to_transform=[1])
    return Adapters(lora=lora, quantise=None, frozen_layers=0.0)


def calls_of(model: Any, layer: int, compute: Callable[[], Any]) -> int:
    """How often a layer's attention is computed meanwhile, seen at the first of its projections."""
    stack = layers_of(model)
    assert stack is not None
    named = stack[layer].named_children()
    attention = next(part for name, part in named if ("attn" in name or "attention" in name) and [*part.children()])
    seen: list[int] = []
    handle = next(attention.children()).register_forward_hook(lambda *_: seen.append(1))
    compute()
    handle.remove()
    return len(seen)


@pytest.mark.parametrize("kind", ["frozen layers", "adapters"])
def test_members_are_scored_as_each_alone_and_what_they_share_is_computed_once(
    kind: str, architecture: str, hf_folder: Folder, ragged: Ragged
):
    adapters = on_upper_layers() if kind == "adapters" else None
    models = scorers(hf_folder(architecture), frozen=0.5 if adapters is None else 0.0, adapters=adapters)
    sequences, _, _ = ragged(models[0].config.vocab_size, 6)
    if architecture == "opt" and adapters is None:  # its embeddings go through a projection, which learnt
        assert common_layers(models) == 0
        for model in models[1:]:
            model.get_submodule("model.decoder.project_in").load_state_dict(
                models[0].get_submodule("model.decoder.project_in").state_dict()
            )
    with torch.no_grad():
        members = Members(models)
        assert members.common == 1
        together = members.raw_outputs(sequences)  # of models that have read nothing before
        expected = torch.stack([raw_outputs(model, sequences) for model in models], 1)
        assert_close(together, expected, atol=1e-6, rtol=0)
        assert expected.std(1).min() > 1e-3
        assert_close(torch.stack([raw_outputs(model, sequences) for model in models], 1), expected, atol=0, rtol=0)
        whole: Any = models[0]
        base = whole.backbone.model if adapters else models[1]
        computed = [calls_of(base, layer, lambda: members.raw_outputs(sequences)) for layer in (0, 1)]
    assert computed == ([1, 3] if adapters else [0, 1])


def test_members_that_differ_by_their_heads_alone_are_computed_once(hf_folder: Folder, ragged: Ragged):
    models = [new_scorer(hf_folder("llama"), seed=k, **OPTIONS).eval() for k in range(3)]
    members = Members(models)
    assert members.common == 2
    sequences, _, _ = ragged(models[0].config.vocab_size, 4)
    with torch.no_grad():
        expected = torch.stack([raw_outputs(model, sequences) for model in models], 1)
        assert_close(members.raw_outputs(sequences), expected, atol=1e-6, rtol=0)


def test_one_weight_that_differs_ends_what_is_common(hf_folder: Folder):
    models = scorers(hf_folder("gpt2"), 2, frozen=0.99)
    assert common_layers(models) == 1
    stack = layers_of(models[1])
    assert stack is not None
    with torch.no_grad():
        weight = next(stack[0].parameters())
        weight.view(-1)[3] *= 1 + 2e-7
        assert common_layers(models) == 0
        weight.copy_(next(layers_of(models[0])[0].parameters()))  # pyright: ignore[reportOptionalSubscript]
        assert common_layers(models) == 1
        models[1].get_submodule("transformer.wpe").get_parameter("weight")[5, 1] += 1e-6
    assert common_layers(models) == 0
    models[1].get_submodule("transformer.wpe").get_parameter("weight").data.copy_(
        models[0].get_submodule("transformer.wpe").get_parameter("weight").data
    )
    models[1].config.layer_norm_epsilon *= 2
    assert common_layers(models) == 0


def test_frozen_layers_are_in_memory_once_and_learning_moves_no_other_model(hf_folder: Folder, ragged: Ragged):
    folder = hf_folder("qwen2")
    policy, reference = load_policy(folder, seed=0, **OPTIONS), load_frozen(folder, seed=0, **OPTIONS)
    freeze(policy, 0.5)
    members = scorers(folder, 2)
    sequences, _, _ = ragged(policy.config.vocab_size, 4)

    def everything() -> list[torch.Tensor]:
        with torch.no_grad():
            said = [policy_forward(model, sequences).logprobs for model in (policy, reference)]
            return said + [raw_outputs(model, sequences) for model in members]

    before = everything()
    layer = sum(p.numel() * 4 for p in policy.get_submodule("model.layers.0").parameters())
    embeddings = policy.get_input_embeddings().get_parameter("weight").numel() * 4
    saved = alias_frozen([policy, reference, *members])
    # the norms of a new model are all ones, and so equal to each other
    assert 3 * (layer + embeddings) <= saved < 3 * (layer + embeddings) + 3000
    assert all(torch.equal(x, y) for x, y in zip(everything(), before, strict=True))
    for model in (reference, *members):
        mine = model.get_submodule("model.layers.0.self_attn.q_proj").get_parameter("weight")
        theirs = policy.get_submodule("model.layers.0.self_attn.q_proj").get_parameter("weight")
        assert mine.data_ptr() == theirs.data_ptr()
    optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    policy_forward(policy, sequences).logprobs.sum().backward()
    optimiser.step()
    after = everything()
    assert not torch.allclose(after[0], before[0], atol=1e-2)
    assert all(torch.equal(x, y) for x, y in zip(after[1:], before[1:], strict=True))


def test_what_learns_is_shared_with_nobody(hf_folder: Folder):
    policies = [load_policy(hf_folder("llama"), seed=0, **OPTIONS) for _ in range(2)]
    assert alias_frozen(policies) == 0
    ours, theirs = (policy.get_input_embeddings().get_parameter("weight") for policy in policies)
    assert torch.equal(ours, theirs)
    assert ours.data_ptr() != theirs.data_ptr()


def test_models_of_two_architectures_have_nothing_in_common(hf_folder: Folder):
    models: list[transformers.PreTrainedModel] = [
        new_scorer(hf_folder(name), seed=0, **OPTIONS) for name in ("llama", "qwen2")
    ]
    assert common_layers(models) == 0
