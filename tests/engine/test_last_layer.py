"""Which tokens the last layer computes, and of which models; that the numbers are right is said where they are read."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from rlhf_lab.engine import forward
from rlhf_lab.engine.forward import policy_logprobs, raw_outputs
from rlhf_lab.engine.last_layer import reads_apart
from rlhf_lab.engine.models import load_policy, load_scorer
from rlhf_lab.engine.prefixes import share_prefixes
from rlhf_lab.types import Sequences

Folder = Callable[..., str]
Ragged = Callable[..., tuple[Sequences, list[list[int]], list[list[int]]]]
OPTIONS: Any = {"device": torch.device("cpu"), "dtype": "float32"}


def tokens_through(module: torch.nn.Module, compute: Callable[[], Any]) -> int:
    """How many tokens a module reads meanwhile."""
    read: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(0, -2).shape[0]))
    compute()
    handle.remove()
    return sum(read)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_only_what_is_read_goes_through_the_last_layer(
    architecture: str, shared: bool, hf_folder: Folder, scorer_folder: Folder, ragged: Ragged
):
    policy = load_policy(hf_folder(architecture), seed=0, **OPTIONS)
    scorer, _ = load_scorer(scorer_folder(architecture), **OPTIONS)
    sequences, _, _ = ragged(policy.config.vocab_size, 5)
    if shared:
        share_prefixes(policy)
        share_prefixes(scorer)
    is_llamas = architecture != "gpt2"
    for model, compute, read in (
        (policy, policy_logprobs, int(sequences.response_mask.sum())),
        (scorer, raw_outputs, len(sequences)),
    ):
        said = partial(compute, model, sequences)
        said()  # which tries it out
        computed = [tokens_through(mlp, said) for mlp in mlps(model)]
        assert reads_apart(model, model.base_model) == is_llamas
        assert computed[1] == (read if is_llamas else computed[0])
        assert computed[0] > read
        assert "forward" not in vars(getattr(model.base_model, "layers", [model])[-1])


def mlps(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [part for name, part in model.named_modules() if name.endswith(".mlp")]


def other(name: str) -> transformers.PreTrainedModel:
    """Models whose layers have the parts of a Llama's and compute otherwise."""
    configs: dict[str, Any] = {"granite": transformers.GraniteConfig, "mistral": transformers.MistralConfig}
    settings = {"granite": {"residual_multiplier": 0.3}, "mistral": {"sliding_window": 2}}[name]
    config = configs[name](
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["granite", "mistral"])
def test_a_layer_that_computes_otherwise_is_left_to_its_model(name: str, ragged: Ragged):
    model = other(name)
    sequences, prompts, responses = ragged(64, 4)
    said = policy_logprobs(model, sequences)
    assert not reads_apart(model, model.base_model)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        alone = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        assert_close(said[row, : len(response)], alone, atol=1e-5, rtol=0)


def test_rows_that_are_too_long_for_a_mask_are_computed_whole(
    hf_folder: Folder, ragged: Ragged, monkeypatch: pytest.MonkeyPatch
):
    model = load_policy(hf_folder("llama"), seed=0, **OPTIONS)
    sequences, _, _ = ragged(model.config.vocab_size, 5)
    apart = policy_logprobs(model, sequences)
    rows, width = sequences.tokens.shape
    monkeypatch.setattr(forward, "MASK_AT_MOST", rows * (width - sequences.prompt_width) * width - 1)
    said = partial(policy_logprobs, model, sequences)
    assert len({tokens_through(mlp, said) for mlp in mlps(model)}) == 1
    assert_close(said(), apart, atol=1e-5, rtol=0)


def test_under_autocast_it_is_computed_apart_too(hf_folder: Folder, ragged: Ragged):
    model = load_policy(hf_folder("llama"), seed=0, **OPTIONS)
    sequences, _, _ = ragged(model.config.vocab_size, 5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = policy_logprobs(model, sequences)
    assert reads_apart(model, model.base_model)
    assert_close(rounded, policy_logprobs(model, sequences), atol=0.2, rtol=0.02)


def test_dropout_of_attention_leaves_the_layer_to_its_model(hf_folder: Folder):
    model = load_policy(hf_folder("llama"), seed=0, **OPTIONS)
    model.config.attention_dropout = 0.1
    assert not reads_apart(model, model.base_model)


def test_a_layer_in_shards_is_not_tried_out(hf_folder: Folder):
    model = load_policy(hf_folder("llama"), seed=0, **OPTIONS)
    layer = model.get_submodule("model.layers.1")
    layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})  # as `fully_shard` does
    assert not reads_apart(model, model.base_model)
    other = load_policy(hf_folder("llama"), seed=0, **OPTIONS)
    vars(next(other.get_submodule("model.layers.1").parameters()))["ds_id"] = 0  # as ZeRO-3 does
    assert not reads_apart(other, other.base_model)
