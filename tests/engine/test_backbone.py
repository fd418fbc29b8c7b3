"""Adapters on one base, against peft's own forward, merged weights, separate models and finite differences."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from torch.testing import assert_close

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine.backbone import AdapterView, Lora
from rlhf_lab.engine.critics import load_critics, shared_critics
from rlhf_lab.engine.forward import critic_values, policy_forward, raw_outputs
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.learner import Learner, Part
from rlhf_lab.engine.model_paths import Adapters, ModelPaths, check_path
from rlhf_lab.engine.models import Calibration, load_frozen, load_policy, load_scorer, new_scorer, save_model
from rlhf_lab.engine.parameters import parameters_of, restore_parameters
from rlhf_lab.engine.prefixes import share_prefixes, shares_prefixes
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Prompt
from rlhf_lab.types import Sequences, Term, TextBatch

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"device": CPU, "dtype": "float32", "seed": 3}
Folder = Callable[..., str]
Ragged = Callable[..., tuple[Sequences, list[list[int]], list[list[int]]]]


def lora(**changes: Any) -> Lora:
    settings: dict[str, Any] = {
        "rank": 4,
        "alpha": 8,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "layers_to_transform": None,
    }
    return Lora(**(settings | changes))


def adapters(quantise: Any = None, frozen_layers: float = 0.0, **changes: Any) -> Adapters:
    return Adapters(lora=lora(**changes), quantise=quantise, frozen_layers=frozen_layers)


def view_of(model: Any) -> AdapterView:
    assert isinstance(model, AdapterView)
    return model


def disturb(model: torch.nn.Module, seed: int = 7) -> None:
    """As if it had learnt something."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=source)


def whole(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logprobs_of(model: Any, sequences: Sequences) -> torch.Tensor:
    with torch.no_grad():
        return policy_forward(model, sequences).logprobs


def test_without_an_adapter_a_view_is_the_base_to_the_bit(architecture: str, hf_folder: Folder, ragged: Ragged):
    folder = hf_folder(architecture)
    policy = load_policy(folder, adapters=adapters(), **OPTIONS)
    disturb(policy)
    reference = load_frozen(folder, adapters=adapters(), **OPTIONS)
    assert view_of(reference).backbone is view_of(policy).backbone
    sequences, _, _ = ragged(policy.config.vocab_size, 4)
    expected = logprobs_of(whole(folder), sequences)
    assert not torch.allclose(logprobs_of(policy, sequences), expected, atol=1e-3)
    assert torch.equal(logprobs_of(reference, sequences), expected)
    assert not list(reference.parameters())


def test_a_new_adapter_changes_nothing_yet(hf_folder: Folder, ragged: Ragged):
    policy = load_policy(hf_folder("llama"), adapters=adapters(), **OPTIONS)
    sequences, _, _ = ragged(policy.config.vocab_size, 4)
    assert torch.equal(logprobs_of(policy, sequences), logprobs_of(whole(hf_folder("llama")), sequences))


def test_policy_critics_and_scorers_on_one_base_are_what_peft_computes(
    architecture: str, hf_folder: Folder, ragged: Ragged, tmp_path: Path
):
    folder = hf_folder(architecture)
    tokenizer = load_tokenizer(folder)
    policy = load_policy(folder, adapters=adapters(), **OPTIONS)
    scorer = new_scorer(folder, adapters=adapters(rank=2), **OPTIONS)
    disturb(policy, 1)
    disturb(scorer.eval(), 2)
    save_model(tmp_path / "policy", policy, tokenizer)
    save_model(tmp_path / "scorer", scorer, tokenizer, Calibration(scale=2.0, shift=-1.0, method="gold"))
    sequences, _, _ = ragged(policy.config.vocab_size, 4)

    plain = cast(Any, peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")).eval()
    assert_close(logprobs_of(plain.base_model.model, sequences), logprobs_of(policy, sequences), atol=1e-5, rtol=1e-5)
    if architecture != "opt":  # whose rows are one before some layers, where peft cannot tell them apart
        _compare_rows(folder, tmp_path / "policy", policy, sequences)
    trained = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "scorer", num_labels=1)
    with torch.no_grad():
        expected = raw_outputs(cast(Any, trained).eval().base_model.model, sequences)
        assert_close(raw_outputs(scorer, sequences), expected, atol=1e-5, rtol=1e-5)
    loaded, calibration = load_scorer(str(tmp_path / "scorer"), device=CPU, dtype="float32")
    assert view_of(loaded).backbone is view_of(policy).backbone
    assert calibration == Calibration(scale=2.0, shift=-1.0, method="gold")
    with torch.no_grad():
        assert torch.equal(raw_outputs(loaded, sequences), raw_outputs(scorer, sequences))


def _compare_rows(folder: str, adapter: Path, policy: Any, sequences: Sequences) -> None:
    """The policy and the reference on one base, a row each, are what peft computes in one forward of both rows."""
    own = cast(Any, peft.PeftModel.from_pretrained(whole(folder), adapter, adapter_name="policy")).eval()
    inputs = {"input_ids": sequences.tokens[:2], "attention_mask": sequences.attention_mask[:2]}
    inputs["position_ids"] = sequences.position_ids[:2]
    reference = load_frozen(folder, adapters=adapters(), **OPTIONS)
    with torch.no_grad():
        mixed = own(**inputs, adapter_names=["policy", "__base__"]).logits
        for row, model in enumerate((policy, reference)):
            seen = sequences.attention_mask[row]
            assert_close(cast(Any, model)(**inputs).logits[row][seen], mixed[row][seen], atol=1e-5, rtol=1e-5)


def test_a_merged_adapter_is_a_whole_model_that_says_the_same(
    architecture: str, hf_folder: Folder, ragged: Ragged, tmp_path: Path
):
    folder = hf_folder(architecture)
    policy = load_policy(folder, adapters=adapters(target_modules=named_linears(architecture)), **OPTIONS)
    disturb(policy)
    save_model(tmp_path / "merged", policy, load_tokenizer(folder), merge=True)
    save_model(tmp_path / "adapter", policy, load_tokenizer(folder))
    sequences, _, _ = ragged(policy.config.vocab_size, 4)
    expected = logprobs_of(policy, sequences)
    assert_close(logprobs_of(whole(str(tmp_path / "merged")), sequences), expected, atol=1e-5, rtol=1e-5)
    by_peft = cast(Any, peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")).merge_and_unload()
    assert_close(logprobs_of(by_peft.eval(), sequences), expected, atol=1e-5, rtol=1e-5)
    again = load_policy(str(tmp_path / "adapter"), **OPTIONS)  # for training as a whole
    assert isinstance(again, transformers.PreTrainedModel)
    assert_close(logprobs_of(again, sequences), expected, atol=1e-5, rtol=1e-5)


def named_linears(architecture: str) -> list[str]:
    return {
        "gpt2": ["c_attn", "c_fc"],
        "gpt_neox": ["query_key_value", "dense_4h_to_h"],
        "opt": ["q_proj", "fc2"],
    }.get(architecture, ["q_proj", "v_proj", "down_proj"])


def nll(new: Any, batch: Any) -> list[Term]:
    return [Term("nll", -new.logprobs, "token", 1.0)]


def learnt(model: Any, sequences: Sequences, steps: int = 2) -> None:
    learner = Learner(
        modules={"policy": model}, total_updates=steps, lr={"policy": 0.05}, epochs=1, minibatch_size=0,
        tokens_at_once=10**6, schedule="constant", warmup=0, weight_decay=0.0, betas=(0.9, 0.95), max_grad_norm=1.0,
    )  # fmt: skip
    for step in range(steps):
        learner.update(
            [Part(TextBatch(sequences=sequences), lambda rows: policy_forward(model, rows.sequences), nll)], step
        )


def test_training_one_adapter_changes_only_it(hf_folder: Folder, ragged: Ragged):
    folder = hf_folder("llama")
    policy, other = (load_policy(folder, adapters=adapters(), **OPTIONS) for _ in range(2))
    critics = load_critics(folder, ("reward",), adapters=adapters(), **OPTIONS)
    disturb(other)
    disturb(critics)
    sequences, _, _ = ragged(policy.config.vocab_size, 4)
    base = {name: p.clone() for name, p in view_of(policy).backbone.model.named_parameters()}
    before, values = logprobs_of(other, sequences), critic_values(critics, sequences)["reward"]
    mine = logprobs_of(policy, sequences)
    learnt(policy, sequences)
    assert (logprobs_of(policy, sequences) - mine).abs().max() > 0.1
    assert torch.equal(logprobs_of(other, sequences), before)
    assert torch.equal(critic_values(critics, sequences)["reward"], values)
    assert all(torch.equal(p, base[name]) for name, p in view_of(policy).backbone.model.named_parameters())


def test_gradients_are_those_of_finite_differences(hf_folder: Folder, ragged: Ragged):
    policy = load_policy(hf_folder("qwen2"), adapters=adapters(), **OPTIONS)
    disturb(policy)
    sequences, _, _ = ragged(policy.config.vocab_size, 3)
    policy_forward(policy, sequences).logprobs.sum().backward()
    for name, parameter in list(policy.named_parameters())[::5]:
        assert parameter.grad is not None, name
        place, step = int(parameter.grad.abs().argmax()), 1e-2
        flat = parameter.data.view(-1)
        sums = []
        for change in (step, -2 * step):
            flat[place] += change
            sums.append(logprobs_of(policy, sequences).double().sum())
        flat[place] += step
        assert_close(parameter.grad.view(-1)[place].double(), (sums[0] - sums[1]) / (2 * step), atol=1e-2, rtol=2e-2)


def test_what_is_computed_again_in_the_backward_pass_has_the_adapter_of_the_forward_pass(
    hf_folder: Folder, ragged: Ragged
):
    folder = hf_folder("llama")
    policy, other = (load_policy(folder, adapters=adapters(), **OPTIONS) for _ in range(2))
    reference = load_frozen(folder, adapters=adapters(), **OPTIONS)
    disturb(policy, 1)
    disturb(other, 2)
    sequences, _, _ = ragged(policy.config.vocab_size, 4)

    def gradients() -> list[torch.Tensor]:
        policy.zero_grad(set_to_none=True)
        other.zero_grad(set_to_none=True)
        # both graphs are alive, and another view computes last, before any backward pass
        total = policy_forward(policy, sequences).logprobs.sum() - 2 * policy_forward(other, sequences).logprobs.sum()
        logprobs_of(reference, sequences)
        total.backward()
        return [cast(torch.Tensor, p.grad) for model in (policy, other) for p in model.parameters()]

    expected = gradients()
    view_of(policy).recompute_layers()
    layer = view_of(policy).backbone.model.get_submodule("model.layers.0.self_attn")
    calls: list[int] = []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    found = gradients()
    handle.remove()
    assert len(calls) == 5  # twice each for the two that learn
    for one, another in zip(found, expected, strict=True):
        assert_close(one, another, atol=1e-6, rtol=1e-5)


def test_parameters_are_the_adapters_and_heads_own_and_come_back(hf_folder: Folder, ragged: Ragged):
    folder = hf_folder("llama")
    critics = load_critics(folder, ("reward", "cost"), adapters=adapters(), **OPTIONS)
    names = parameters_of(critics)
    assert "trunk.adapter.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert sum(x.numel() for x in names.values()) < 20_000
    disturb(critics)
    fresh = load_critics(folder, ("reward", "cost"), adapters=adapters(), **OPTIONS)
    restore_parameters(fresh, parameters_of(critics))
    sequences, _, _ = ragged(critics.trunk.config.vocab_size, 3)
    with torch.no_grad():
        assert torch.equal(critic_values(fresh, sequences)["cost"], critic_values(critics, sequences)["cost"])
    twin = copy.deepcopy(critics.trunk)
    assert view_of(twin).backbone is view_of(critics.trunk).backbone
    own = {id(p) for p in critics.parameters()}
    assert not any(id(p) in own for p in twin.parameters())
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), critics.trunk.parameters(), strict=True))


def test_policy_and_critic_start_from_the_adapter_that_was_fine_tuned(
    hf_folder: Folder, ragged: Ragged, tmp_path: Path
):
    folder = hf_folder("llama")
    tuned = load_policy(folder, adapters=adapters(), **OPTIONS)
    disturb(tuned)
    save_model(tmp_path / "sft", tuned, load_tokenizer(folder))
    path = str(tmp_path / "sft")
    sequences, _, _ = ragged(tuned.config.vocab_size, 4)
    expected = logprobs_of(tuned, sequences)
    policy = load_policy(path, adapters=adapters(), **OPTIONS)
    reference = load_frozen(path, adapters=adapters(), **OPTIONS)
    critics = load_critics(path, ("reward",), adapters=adapters(), **OPTIONS)
    assert torch.equal(logprobs_of(policy, sequences), expected)
    learnt(policy, sequences)
    assert torch.equal(logprobs_of(reference, sequences), expected)
    assert not any(p.requires_grad for p in reference.parameters())
    inputs = {"input_ids": sequences.tokens, "attention_mask": sequences.attention_mask}
    with torch.no_grad():
        hidden = critics.trunk(**inputs).last_hidden_state
        assert torch.equal(hidden, view_of(tuned).base_model(**inputs).last_hidden_state)
    with pytest.raises(ValueError, match=r"an adapter with rank=4, but model\.lora\.rank=8"):
        load_policy(path, adapters=adapters(rank=8), **OPTIONS)


def test_layers_that_are_left_out_have_no_factors(hf_folder: Folder):
    policy = load_policy(hf_folder("qwen2"), adapters=adapters(frozen_layers=0.5), **OPTIONS)
    names = [name for name, _ in policy.named_parameters()]
    assert names
    assert all(".layers.1." in name for name in names)
    with pytest.raises(ValueError, match=r"layers_to_transform=\[2\], but .* has the layers 0 to 1"):
        load_policy(hf_folder("qwen2"), adapters=adapters(layers_to_transform=[2]), **OPTIONS)
    with pytest.raises(ValueError, match=r"'query' names no linear layer .*: down_proj, gate_proj"):
        load_policy(hf_folder("qwen2"), adapters=adapters(target_modules="query"), **OPTIONS)


def test_a_base_with_other_weights_than_the_adapter_learnt_on_is_refused(hf_folder: Folder, tmp_path: Path):
    base, path = tmp_path / "base", str(tmp_path / "adapter")
    whole(hf_folder("llama")).save_pretrained(base)
    load_tokenizer(hf_folder("llama")).save_pretrained(base)
    save_model(tmp_path / "adapter", load_policy(str(base), adapters=adapters(), **OPTIONS), load_tokenizer(str(base)))
    check_path(path, "model.policy")
    other = whole(hf_folder("llama"))
    disturb(other)
    other.save_pretrained(base)
    with pytest.raises(ValueError, match="whose weights are no longer those that it learnt on"):
        check_path(path, "model.policy")


@pytest.mark.parametrize("quantise", ["nf4", "int8"])
def test_a_quantised_base_is_smaller_near_the_base_and_learns(
    quantise: Any, hf_folder: Folder, ragged: Ragged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # as on processors that have it, where layers would compute in bfloat16
    monkeypatch.setattr(pytest.importorskip("bitsandbytes").nn.modules, "has_avx512bf16", lambda: True)
    folder = str(tmp_path / "base")
    config = transformers.AutoConfig.from_pretrained(hf_folder("qwen2"), hidden_size=64, intermediate_size=128)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer(hf_folder("qwen2")).save_pretrained(folder)
    policy = load_policy(folder, adapters=adapters(quantise), **OPTIONS)
    backbone = view_of(policy).backbone
    base = backbone.model
    stored = base.get_submodule("model.layers.0.mlp.up_proj.base_layer").get_parameter("weight")
    exact = cast(torch.Tensor, whole(folder).get_submodule("model.layers.0.mlp.up_proj").weight)
    bits = 8 * stored.numel() * stored.element_size() / exact.numel()
    assert bits == {"nf4": 4, "int8": 8}[quantise]
    # each number is stored as the nearest of a few, as shares of the largest of its block (of its row)
    blocks = exact.view(-1, {"nf4": 64, "int8": exact.shape[1]}[quantise])
    off = (backbone.weight(base.get_submodule("model.layers.0.mlp.up_proj.base_layer")).view_as(blocks) - blocks).abs()
    widest = {"nf4": 1 - 0.6962, "int8": 1 / 127}[quantise]  # between two neighbours
    # the scales of blocks are stored in 8 bits themselves, and 8-bit numbers come by way of float16
    assert (off <= (0.51 * widest + 2**-11) * blocks.abs().amax(1, keepdim=True)).all()
    sequences, _, _ = ragged(policy.config.vocab_size, 4)
    mask = sequences.response_mask
    gap = (logprobs_of(policy, sequences) - logprobs_of(whole(folder), sequences))[mask]
    assert 0 < gap.abs().mean() < {"nf4": 1.0, "int8": 0.2}[quantise]
    disturb(policy)
    before = logprobs_of(policy, sequences)[mask].mean()
    learnt(policy, sequences, 4)
    assert logprobs_of(policy, sequences)[mask].mean() > before + 0.2

    save_model(tmp_path / "merged", policy, load_tokenizer(folder), merge=True)
    merged = logprobs_of(whole(str(tmp_path / "merged")), sequences)[mask]
    close = {"nf4": 1e-4, "int8": 0.5}[quantise]  # 8-bit layers round their inputs too
    assert_close(merged, logprobs_of(policy, sequences)[mask], atol=close, rtol=1e-4)


def test_rows_that_are_no_whole_blocks_of_four_bits_are_refused(hf_folder: Folder):
    with pytest.raises(
        ValueError, match=r"blocks of 64 numbers, but a row of layers\.0\.self_attn\.q_proj in .* has 32"
    ):
        load_policy(hf_folder("qwen2"), adapters=adapters("nf4"), **OPTIONS)


def paths(**changes: Any) -> ModelPaths:
    settings: dict[str, Any] = {"peft": "lora", "lora": lora(), "learning_rates": {}}
    settings |= dict.fromkeys(("base", "policy", "reference", "critic"), "a/b")
    return ModelPaths(**(settings | changes))


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"model\.quantise=nf4 is of adapters"):
        paths(peft=None, quantise="nf4")
    with pytest.raises(ValueError, match=r"model\.merge=true is of adapters"):
        paths(peft=None, merge=True)
    with pytest.raises(ValueError, match="both say which layers learn"):
        paths(frozen_layers=0.5, lora=lora(layers_to_transform=[1]))
    with pytest.raises(ValueError, match="the embeddings do not learn"):
        paths(new_tokens=["<x>"]).check(["policy"])
    with pytest.raises(ValueError, match="no trained weights that an adapter could be of"):
        paths(policy="embedded:tiny").check(["policy"])


def test_a_policy_without_the_words_of_a_method_gets_no_adapters(hf_folder: Folder):
    saved_policy = hf_folder("llama")
    known = next(iter(load_tokenizer(saved_policy).get_vocab()))
    paths(policy=saved_policy).check_words([known])
    paths(policy=saved_policy, peft=None, lora=None).check_words(["<new>"])
    with pytest.raises(ValueError, match=r"words of its own \(<new>, …\)"):
        paths(policy=saved_policy).check_words([known, "<new>"])
    with pytest.raises(ValueError, match="words of its own"):
        paths(policy=saved_policy).check_words([known], promised=[saved_policy])  # nobody knows yet what it will know


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlhf_lab.engine.adapters.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"pip install 'rlhf_lab\[lora\]'"):
        paths().check(["policy"])
    monkeypatch.setattr("rlhf_lab.engine.adapters.find_spec", lambda package: package == "peft" or None)
    with pytest.raises(ValueError, match=r"pip install 'rlhf_lab\[quantised\]'"):
        paths(quantise="nf4").check(["policy"])


def test_a_base_in_bfloat16_has_adapters_and_heads_that_learn_in_float32(hf_folder: Folder, ragged: Ragged):
    options = OPTIONS | {"dtype": "bfloat16", "adapters": adapters()}
    policy = load_policy(hf_folder("llama"), **options)
    critics = load_critics(hf_folder("llama"), ("reward",), **options)
    on_policy = shared_critics(policy, ("reward", "cost"))
    scorer = new_scorer(hf_folder("llama"), **options)
    assert policy.dtype == torch.bfloat16
    for module in (policy, critics, on_policy, scorer):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    sequences, _, _ = ragged(policy.config.vocab_size, 4)
    said = policy_forward(policy, sequences, critics=on_policy)
    values, scores = critic_values(critics, sequences)["reward"], raw_outputs(scorer, sequences)
    (said.logprobs.sum() + said.values["cost"].sum() + values.sum() + scores.sum()).backward()
    for module in (policy, critics, on_policy, scorer):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_critics_on_an_adapters_trunk_are_read_while_it_samples(hf_folder: Folder):
    folder = hf_folder("llama")
    policy = load_policy(folder, adapters=adapters(), **OPTIONS)
    disturb(policy, 1)
    critics = shared_critics(policy, ("reward",))
    disturb(critics, 2)
    template = Template(load_tokenizer(folder), "auto")
    prompts = prompt_batch(template, [Prompt.from_text(text) for text in ("a joke", "is it safe ?")])
    sampling = Sampling(max_new_tokens=8, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=8)
    rollout = Generator(policy, template, sampling, critics).generate(prompts, 2, seed=0)
    with torch.no_grad():
        asked = critic_values(critics, rollout.sequences)
    assert asked["reward"].abs().max() > 0.1
    assert_close(rollout.values, asked, atol=1e-4, rtol=1e-4)


def test_rows_behind_one_prompt_say_the_same_on_a_shared_base(hf_folder: Folder, ragged: Ragged):
    folder = hf_folder("qwen2")
    policy = load_policy(folder, adapters=adapters(), **OPTIONS)
    scorer = new_scorer(folder, adapters=adapters(), **OPTIONS).eval()
    disturb(policy, 1)
    disturb(scorer, 2)
    sequences, _, _ = ragged(policy.config.vocab_size, 4)
    rows = sequences.select(torch.tensor([0, 1, 1, 2, 2, 3]))
    with torch.no_grad():
        expected = policy_forward(policy, rows).logprobs, raw_outputs(scorer, rows)
        share_prefixes(policy)
        assert shares_prefixes(scorer)  # it is the base that computes
        assert_close(policy_forward(policy, rows).logprobs, expected[0], atol=1e-5, rtol=1e-5)
        assert_close(raw_outputs(scorer, rows), expected[1], atol=1e-5, rtol=1e-5)
