"""Rollout engines beside the built-in one, and what the loss makes of samples that are not quite the learner's."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from torch.testing import assert_close

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine import ranks
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.models import load_policy
from rlhf_lab.engine.rollouts import VLLM, BuiltIn, ContinuousBatching, Foreign
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.functional.mismatch import mismatch, truncated_weights
from rlhf_lab.records import Prompt
from rlhf_lab.types import Term

CPU = torch.device("cpu")
Folder = Callable[..., str]
TEXTS = ["bread ?", "is it safe to mix bleach and acid ?", "x"]
WHOLE = ModelPaths(base="b", policy="p", reference="r", critic="c", learning_rates={})
ALONE = Hardware(device="cpu", dtype="float32", threads=1)
PAGED = ContinuousBatching(importance_cap=2.0, page_size=16, max_batch_tokens=256, memory=1024)
VLLM_ENGINES = VLLM(
    importance_cap=2.0, python=None, dtype="float32", gpu_memory_utilization=0.3, kv_cache_gib=None,
    max_model_len=None, enforce_eager=False, start_timeout=1.0,
)  # fmt: skip


def sampling(**changes: Any) -> Sampling:
    settings: dict[str, Any] = {
        "max_new_tokens": 9,
        "min_new_tokens": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "batch_size": 16,
    }
    return Sampling(**(settings | changes))


def loaded(folder: str, stops: int = 0):
    model = load_policy(folder, device=CPU, dtype="float32", seed=0)
    template = Template(load_tokenizer(folder), "auto")
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [template.eos, *range(20, 20 + stops)]
    return model, template, prompt_batch(template, [Prompt.from_text(text) for text in TEXTS])


def test_continuous_batching_is_greedy_token_for_token_as_the_built_in_engine(architecture: str, hf_folder: Folder):
    model, template, prompts = loaded(hf_folder(architecture), stops=20)
    greedy = sampling(temperature=0)
    ours = BuiltIn().engine(model, template, greedy).generate(prompts, 2, seed=0)
    theirs = PAGED.engine(model, template, greedy).generate(prompts, 2, seed=0)
    assert torch.equal(ours.sequences.tokens, theirs.sequences.tokens)
    assert torch.equal(ours.sequences.response_mask, theirs.sequences.response_mask)
    assert torch.equal(ours.finished, theirs.finished)
    assert ours.responses == theirs.responses
    assert torch.equal(ours.group, theirs.group)


def test_what_continuous_batching_records_is_the_learners_and_its_seed_repeats_it(hf_folder: Folder):
    model, template, prompts = loaded(hf_folder("llama"), stops=20)
    attention = model.config._attn_implementation
    before = torch.get_rng_state()
    engine = PAGED.engine(model, template, sampling(temperature=0.7))
    rollout = engine.generate(prompts, 3, seed=5)
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), before)
    learnt, figures = PAGED.measured(rollout, model, 4096)
    assert_close(learnt.logprobs, rollout.logprobs, atol=1e-4, rtol=0)
    assert figures["rollout/mismatch_ratio_max"] == pytest.approx(1, abs=1e-4)
    again, other = (engine.generate(prompts, 3, seed=seed) for seed in (5, 6))
    assert torch.equal(again.sequences.tokens, rollout.sequences.tokens)
    assert again.responses == rollout.responses
    assert other.responses != rollout.responses


@pytest.mark.parametrize("change", [{"top_k": 4}, {"top_p": 0.6}], ids=str)
def test_what_continuous_batching_records_is_of_the_restricted_distribution(change: dict[str, Any], hf_folder: Folder):
    model, template, prompts = loaded(hf_folder("llama"), stops=20)
    rollout = PAGED.engine(model, template, sampling(temperature=0.7, **change)).generate(prompts, 3, seed=5)
    key, value = next(iter(change.items()))
    warp = {"top_k": transformers.TopKLogitsWarper, "top_p": transformers.TopPLogitsWarper}[key](value)
    sequences = rollout.sequences
    with torch.no_grad():
        logits = model(
            input_ids=sequences.tokens, attention_mask=sequences.attention_mask, position_ids=sequences.position_ids
        ).logits[:, sequences.prompt_width - 1 : -1]
    tokens = sequences.tokens[:, sequences.prompt_width :][sequences.response_mask]
    warped = warp(cast(Any, None), logits[sequences.response_mask] / 0.7).log_softmax(-1)
    assert_close(rollout.logprobs[sequences.response_mask], warped.gather(1, tokens[:, None])[:, 0], atol=1e-4, rtol=0)


def test_the_built_in_engine_is_the_learner(hf_folder: Folder):
    model, template, prompts = loaded(hf_folder("gpt2"))
    rollout = BuiltIn().engine(model, template, sampling(temperature=0.7)).generate(prompts, 2, seed=0)
    same, figures = BuiltIn().measured(rollout, model, 4096)
    assert same is rollout
    assert abs(figures["rollout/mismatch_kl"]) < 1e-8
    hotter = replace(rollout, processing=replace(rollout.processing, temperature=1.0))
    hot = BuiltIn().measured(hotter, model, 4096)[1]  # and another distribution is told from it
    assert hot["rollout/mismatch_kl"] > 1e-3


def test_the_mismatch_of_two_known_distributions_is_its_kl():
    engine, learner = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    tokens = torch.multinomial(engine, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = mismatch(
        engine.log()[tokens][None], learner.log()[tokens][None], torch.ones(1, len(tokens), dtype=torch.bool)
    )
    exact = sum(p * math.log(p / q) for p, q in zip(engine.tolist(), learner.tolist(), strict=True))
    assert found["rollout/mismatch_kl"] == pytest.approx(exact, abs=3e-4)
    assert found["rollout/mismatch_ratio_max"] == pytest.approx(4 / 3, rel=1e-5)


def test_truncated_weights_make_a_loss_on_the_engines_samples_that_of_the_learner(hf_folder: Folder):
    """Sum over every token of a vocabulary, weighted by how often the engine says it: an expectation, exactly."""
    learner = torch.tensor([0.1, 0.2, 0.3, 0.4])
    engine = torch.tensor([0.25, 0.25, 0.25, 0.25])
    loss = torch.tensor([3.0, -1.0, 2.0, 0.5])
    weights = truncated_weights((learner / engine).log(), cap=10.0)
    assert_close((engine * weights * loss).sum(), (learner * loss).sum())
    cut = truncated_weights((learner / engine).log(), cap=1.3)
    assert cut.tolist() == pytest.approx([0.4, 0.8, 1.2, 1.3])


def test_terms_that_move_the_policy_are_weighted_by_token_or_by_response_and_others_are_not(hf_folder: Folder):
    model, template, prompts = loaded(hf_folder("llama"))
    rollout = BuiltIn().engine(model, template, sampling(max_new_tokens=2)).generate(prompts, 1, seed=0)
    ratio = torch.tensor([[0.5, 0.5], [3.0, 1.5], [1.0, 1.0]])
    rollout = replace(rollout, log_ratio=(ratio.log(),))
    ones = torch.ones(3, 2)
    terms = [
        Term("policy", ones, "token"),
        Term("policy", ones[:, 0], "row"),
        Term("value/cost", ones, "token", 0.5),
        Term("clipfrac", ones, "token", 0.0),
    ]
    found = PAGED.corrected(terms, rollout)
    assert_close(found[0].values, torch.tensor([[0.5, 0.5], [2.0, 1.5], [1.0, 1.0]]))
    assert_close(found[1].values, torch.tensor([0.25, 2.0, 1.0]))
    assert [term.weight for term in found] == [1.0, 1.0, 0.5, 0.0]
    for i in (2, 3):
        assert torch.equal(found[i].values, ones)
    assert replace(PAGED, importance_cap=None).corrected(terms, rollout) == terms
    assert BuiltIn().corrected(terms, rollout) == terms


@pytest.mark.parametrize(
    "change", [{"min_new_tokens": 2}, {"repetition_penalty": 1.2}, {"stop_strings": ["x"]}], ids=str
)
def test_what_continuous_batching_would_not_apply_is_refused(change: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"continuous_batching does not work with sampling\.{next(iter(change))}="):
        PAGED.check(sampling(**change), WHOLE, ALONE)
    PAGED.check(sampling(top_k=3, top_p=0.5), WHOLE, ALONE)


@pytest.mark.parametrize("engines", [PAGED, VLLM_ENGINES], ids=["continuous_batching", "vllm"])
def test_engines_that_do_not_record_what_was_left_are_refused_in_training(engines: Foreign):
    for change in ({"top_k": 5}, {"top_p": 0.9}, {"min_new_tokens": 2}):
        key, value = next(iter(change.items()))
        with pytest.raises(ValueError, match=rf"training with sampling\.{key}={value} needs .* use rollout=built_in"):
            engines.check_trainable(sampling(**change))
        BuiltIn().check_trainable(sampling(**change))
    with pytest.raises(ValueError, match=r"sampling\.top_k=5, sampling\.top_p=0\.9 needs"):
        engines.check_trainable(sampling(top_k=5, top_p=0.9))
    engines.check_trainable(sampling(temperature=0.5, repetition_penalty=1.2, stop_strings=["x"]))


def test_continuous_batching_refuses_what_it_could_not_read_before_it_is_loaded():
    with pytest.raises(ValueError, match=r"does not work with hardware\.distribution=fsdp; use rollout=built_in"):
        PAGED.check(sampling(), WHOLE, replace(ALONE, distribution="fsdp"))
    with pytest.raises(ValueError, match=r"does not work with model\.peft=lora; use"):
        PAGED.check(sampling(), cast(ModelPaths, SimpleNamespace(peft="lora")), ALONE)
    with ranks.planned(3), pytest.raises(ValueError, match=r"does not work with num_processes=3; use"):
        PAGED.check(sampling(), WHOLE, ALONE)
    BuiltIn().check(sampling(min_new_tokens=2), WHOLE, replace(ALONE, distribution="fsdp"))
