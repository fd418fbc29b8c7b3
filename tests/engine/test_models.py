"""Folders that plain transformers can read, calibrations that come back, and refusals that say what is missing."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
import transformers
from torch.testing import assert_close

from rlhf_lab.engine.checkpoint import load_tree, save_tree
from rlhf_lab.engine.critics import Critics, load_critics
from rlhf_lab.engine.distribution import Whole
from rlhf_lab.engine.forward import critic_values, policy_forward, raw_outputs, raw_scores
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.learner import Learner, Part
from rlhf_lab.engine.model_paths import check_path
from rlhf_lab.engine.models import Calibration, load_policy, load_scorer, new_scorer, save_model
from rlhf_lab.engine.parameters import freeze, parameters_of, restore_parameters
from rlhf_lab.engine.tokenizer import load_tokenizer, new_token_ids
from rlhf_lab.types import Sequences, Term, TextBatch

CPU = torch.device("cpu")
Folder = Callable[..., str]
Ragged = Callable[..., tuple[Sequences, list[list[int]], list[list[int]]]]


def policy_of(folder: str) -> transformers.PreTrainedModel:
    return load_policy(folder, device=CPU, dtype="float32", seed=0)


def head(model: transformers.PreTrainedModel) -> torch.Tensor:
    return model.get_parameter("score.weight")


def weight(module: torch.nn.Module | None) -> torch.Tensor:
    assert module is not None
    return module.get_parameter("weight")


def disturb(model: torch.nn.Module) -> None:
    """As if it had learnt something."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def test_a_saved_policy_is_what_plain_transformers_loads(
    architecture: str, hf_folder: Folder, ragged: Ragged, tmp_path: Path
):
    model, tokenizer = policy_of(hf_folder(architecture)), load_tokenizer(hf_folder(architecture))
    disturb(model)
    save_model(tmp_path / "policy", model, tokenizer)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    plain_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    sequences, prompts, responses = ragged(model.config.vocab_size, 3)
    with torch.no_grad():
        found = policy_forward(model, sequences).sequence_logprobs
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            logprobs = plain(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            expected = sum(logprobs[len(prompt) + t - 1, token] for t, token in enumerate(response))
            assert_close(found[i], expected, atol=1e-4, rtol=1e-5)
    text = "User: do i bake bread ?"
    assert plain_tokenizer(text).input_ids == tokenizer(text).input_ids
    assert plain_tokenizer.chat_template == tokenizer.chat_template
    files = [path.name for path in (tmp_path / "policy").iterdir()]
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]


def test_a_saved_scorer_is_what_plain_transformers_loads(
    architecture: str, hf_folder: Folder, ragged: Ragged, tmp_path: Path
):
    tokenizer = load_tokenizer(hf_folder(architecture))
    model = new_scorer(hf_folder(architecture), device=CPU, dtype="float32", seed=3)
    disturb(model)
    calibration = Calibration(scale=2.5, shift=-0.75, method="standardised", fitted_on="val_id")
    save_model(tmp_path / "scorer", model.eval(), tokenizer, calibration)

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").eval()
    loaded, read = load_scorer(str(tmp_path / "scorer"), device=CPU, dtype="float32")
    assert read == calibration
    assert json.loads((tmp_path / "scorer" / "config.json").read_text())["score_calibration"]["scale"] == 2.5
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    sequences, prompts, responses = ragged(model.config.vocab_size, 4)
    eos = int(str(tokenizer.eos_token_id))
    rows = [p + r[:-1] + [eos] for p, r in zip(prompts, responses, strict=True)]
    for i, response in enumerate(responses):
        sequences.tokens[i, sequences.prompt_width + len(response) - 1] = eos
    with torch.no_grad():
        found = raw_scores(loaded, sequences)
        expected = torch.stack([plain(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
        assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert_close(read(found), 2.5 * expected - 0.75, atol=1e-5, rtol=1e-5)
        if tokenizer.pad_token_id != tokenizer.eos_token_id:
            longest = max(map(len, rows))
            padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            batch = plain(input_ids=padded, attention_mask=mask).logits[:, 0]
            assert_close(batch, expected, atol=1e-5, rtol=1e-5)


def test_a_new_scorer_has_the_policys_trunk_and_a_head_of_its_seed(architecture: str, hf_folder: Folder):
    policy = policy_of(hf_folder(architecture))
    first, again, other = (new_scorer(hf_folder(architecture), device=CPU, dtype="float32", seed=s) for s in (1, 1, 2))
    trunk = dict(policy.base_model.named_parameters())
    for name, parameter in first.base_model.named_parameters():
        assert torch.equal(parameter, trunk[name]), name
    assert torch.equal(head(first), head(again))
    assert not torch.equal(head(first), head(other))
    assert head(first).shape[0] == 1


def test_a_scorer_of_mean_and_log_variance_is_what_plain_transformers_loads(
    hf_folder: Folder, ragged: Ragged, tmp_path: Path
):
    tokenizer = load_tokenizer(hf_folder("llama"))
    model = new_scorer(hf_folder("llama"), device=CPU, dtype="float32", seed=3, outputs=("mean", "log_variance"))
    save_model(tmp_path / "scorer", model.eval(), tokenizer, Calibration(scale=-3.0, shift=7.0))

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").eval()
    assert plain.config.id2label == {0: "mean", 1: "log_variance"}
    loaded, calibration = load_scorer(str(tmp_path / "scorer"), device=CPU, dtype="float32")
    sequences, prompts, responses = ragged(model.config.vocab_size, 3)
    with torch.no_grad():
        found = raw_outputs(loaded, sequences)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            plain.config.pad_token_id = None
            assert_close(found[i], plain(input_ids=torch.tensor([prompt + response])).logits[0], atol=1e-5, rtol=1e-5)
    assert calibration.variance(torch.tensor([0.5, 2.0])).tolist() == [4.5, 18.0]


def test_two_outputs_of_other_names_are_no_scorer(hf_folder: Folder, tmp_path: Path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(hf_folder("gpt2"), num_labels=2)
    model.config.id2label = {0: "negative", 1: "positive"}
    model.save_pretrained(tmp_path / "sentiment")
    with pytest.raises(ValueError, match=r"has 2 outputs, negative, positive; .* called mean and log_variance"):
        load_scorer(str(tmp_path / "sentiment"), device=CPU, dtype="float32")


def test_an_embedded_model_has_no_trunk_to_score_with():
    with pytest.raises(ValueError, match="no trained trunk"):
        new_scorer("embedded:tiny", device=CPU, dtype="float32", seed=0)


def test_a_classifier_of_many_labels_is_no_scorer(hf_folder: Folder, tmp_path: Path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(hf_folder("gpt2"), num_labels=3)
    model.save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="has 3 outputs, LABEL_0, LABEL_1, LABEL_2; a reward or cost model has one"):
        load_scorer(str(tmp_path / "three"), device=CPU, dtype="float32")


def test_a_scorer_without_calibration_is_read_as_it_is(scorer_folder: Folder):
    _, calibration = load_scorer(scorer_folder("llama"), device=CPU, dtype="float32")
    raw = torch.tensor([-1.5, 0.0, 3.0])
    assert torch.equal(calibration(raw), raw)


def test_tied_weights_are_kept_once_and_stay_tied(hf_folder: Folder, tmp_path: Path):
    model = policy_of(hf_folder("llama"))
    names = parameters_of(model).keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert "lm_head.weight" in parameters_of(policy_of(hf_folder("qwen2")))  # whose weights are not tied
    other = policy_of(hf_folder("llama"))
    disturb(other)
    save_tree(tmp_path / "step_0", parameters_of(other))
    restore_parameters(model, load_tree(tmp_path / "step_0"))
    output, embedding = weight(model.get_output_embeddings()), weight(model.get_input_embeddings())
    assert output.data_ptr() == embedding.data_ptr()
    assert torch.equal(output, weight(other.get_input_embeddings()))
    save_model(tmp_path / "policy", model, load_tokenizer(hf_folder("llama")))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(weight(plain.get_output_embeddings()), output)


def test_parameters_come_back_in_every_architecture(
    architecture: str, hf_folder: Folder, ragged: Ragged, tmp_path: Path
):
    trained = load_critics(hf_folder(architecture), ("reward", "cost"), device=CPU, dtype="float32", seed=0)
    disturb(trained)
    save_tree(tmp_path / "step_0", parameters_of(trained))
    fresh = load_critics(hf_folder(architecture), ("reward", "cost"), device=CPU, dtype="float32", seed=0)
    restore_parameters(fresh, load_tree(tmp_path / "step_0"))
    sequences, _, _ = ragged(fresh.trunk.config.vocab_size, 3)
    with torch.no_grad():
        expected, found = critic_values(trained, sequences), critic_values(fresh, sequences)
    assert all(torch.equal(expected[name], found[name]) for name in ("reward", "cost"))
    assert found["cost"].abs().sum() > 0


def test_other_names_or_shapes_are_not_restored(hf_folder: Folder):
    one, two = (
        load_critics(hf_folder("gpt2"), names, device=CPU, dtype="float32", seed=0) for names in (("a",), ("a", "b"))
    )
    before = {name: tensor.clone() for name, tensor in parameters_of(two).items()}
    with pytest.raises(ValueError, match=r"heads.weight has shape \(1, 32\), the module's \(2, 32\)"):
        restore_parameters(two, parameters_of(one))
    with pytest.raises(ValueError, match=r"other parameters; differing: \['heads.bias', 'heads.weight'\]"):
        restore_parameters(one.trunk, {f"{k.removeprefix('trunk.')}": v for k, v in parameters_of(one).items()})
    assert all(torch.equal(before[name], tensor) for name, tensor in parameters_of(two).items())


def test_critics_are_as_wide_as_the_last_hidden_state(architecture: str, hf_folder: Folder):
    critics = load_critics(hf_folder(architecture), ("reward",), device=CPU, dtype="bfloat16", seed=0)
    hidden = critics.trunk(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state
    assert critics.heads(hidden).shape == (1, 3, 1)
    assert critics.heads.in_features == (16 if architecture == "opt" else 32)
    assert critics.heads.weight.dtype == torch.bfloat16


def test_critics_of_a_config_without_hidden_size():
    class Trunk(torch.nn.Module):
        config, dtype = object(), torch.float32

        def get_input_embeddings(self) -> torch.nn.Module:
            return torch.nn.Embedding(5, 12)

    assert Critics(Trunk(), ("a", "b")).heads.weight.shape == (2, 12)  # pyright: ignore[reportArgumentType]


def test_embedded_models_differ_by_their_seed_only():
    first, again, other = (load_policy("embedded:tiny", device=CPU, dtype="float32", seed=s) for s in (1, 1, 2))
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    critics = load_critics("embedded:tiny", ("reward",), device=CPU, dtype="float32", seed=1)
    assert torch.equal(weight(critics.trunk.get_input_embeddings()), weight(first.get_input_embeddings()))


def test_a_tokenizer_without_pad_pads_with_its_eos(hf_folder: Folder):
    raw = transformers.AutoTokenizer.from_pretrained(hf_folder("gpt2"))
    assert raw.pad_token is None
    assert load_tokenizer(hf_folder("gpt2")).pad_token_id == raw.eos_token_id
    assert load_tokenizer(hf_folder("llama")).pad_token == "<pad>"


def test_a_tokenizer_without_eos_is_refused(hf_folder: Folder, tmp_path: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_folder("gpt2"))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no EOS token; a response could never end"):
        load_tokenizer(str(tmp_path))


def test_paths_are_checked_before_anything_is_loaded(hf_folder: Folder, tmp_path: Path):
    check_path(hf_folder("gpt2"), "model.policy")
    check_path("embedded:tiny", "model.policy")
    check_path("Qwen/Qwen2.5-0.5B", "model.policy")  # may be on the hub
    missing = str(tmp_path / "missing")
    for path in (missing, "./missing", "~/missing", "missing", "a/b/missing"):
        with pytest.raises(ValueError, match=r"model\.policy=.*missing: no such folder"):
            check_path(path, "model.policy")
    check_path(missing, "model.policy", promised=[missing])
    with pytest.raises(ValueError, match="the only embedded model is embedded:tiny"):
        check_path("embedded:huge", "model.policy")

    broken = tmp_path / "broken"
    shutil.copytree(hf_folder("gpt2"), broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"broken: no \*\.safetensors there; other weight files \(pickles\)"):
        check_path(str(broken), "model.policy")
    (broken / "config.json").unlink()
    with pytest.raises(ValueError, match=r"broken: no config\.json there"):
        check_path(str(broken), "model.policy")


def test_a_pickle_is_not_loaded(hf_folder: Folder, tmp_path: Path):
    folder = tmp_path / "pickled"
    shutil.copytree(hf_folder("gpt2"), folder)
    (folder / "model.safetensors").unlink()
    torch.save(policy_of(hf_folder("gpt2")).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        policy_of(str(folder))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="torch sees no GPU; use hardware=cpu"):
        Hardware(device="cuda:1", dtype="float32", threads=1).start()
    assert Hardware(device="cpu", dtype="float32", threads=1).start() == CPU
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def new_tokens_of(folder: str, *tokens: str) -> tuple[transformers.PreTrainedTokenizerBase, dict[str, int]]:
    tokenizer = load_tokenizer(folder, tokens)
    ids = new_token_ids(tokenizer, tokens)
    return tokenizer, {token: ids[token] for token in tokens}


def test_new_tokens_change_nothing_that_was_there_and_start_at_the_mean(
    architecture: str, hf_folder: Folder, ragged: Ragged
):
    folder = hf_folder(architecture)
    tokenizer, ids = new_tokens_of(folder, "<kind>", "<witty>")
    old, new = policy_of(folder), load_policy(folder, device=CPU, dtype="float32", seed=0, new_tokens=ids)
    assert sorted(ids.values()) == [old.config.vocab_size, old.config.vocab_size + 1]
    assert new.config.vocab_size == old.config.vocab_size + 2
    with torch.no_grad():
        sequences, *_ = ragged(old.config.vocab_size, 3)
        inputs = {"input_ids": sequences.tokens, "attention_mask": sequences.attention_mask}
        before, after = old(**inputs).logits, new(**inputs).logits
    assert_close(after[..., : old.config.vocab_size], before)
    # a row that is the mean of the rows has the mean of the logits
    assert_close(after[..., list(ids.values())], before.mean(-1, keepdim=True).expand(-1, -1, 2), atol=1e-4, rtol=1e-4)
    for row in ids.values():
        assert_close(weight(new.get_input_embeddings())[row], weight(old.get_input_embeddings()).mean(0))
    assert tokenizer.decode(tokenizer("User: <kind> <witty>").input_ids).count("<kind>") == 1


def test_new_tokens_are_saved_with_the_policy_and_added_once(architecture: str, hf_folder: Folder, tmp_path: Path):
    tokenizer, ids = new_tokens_of(hf_folder(architecture), "<kind>", "<witty>")
    model = load_policy(hf_folder(architecture), device=CPU, dtype="float32", seed=0, new_tokens=ids)
    disturb(model)
    save_model(tmp_path / "policy", model, tokenizer)
    again, ids_again = new_tokens_of(str(tmp_path / "policy"), "<kind>", "<witty>")
    assert ids_again == ids
    assert len(again) == len(tokenizer)
    loaded = load_policy(str(tmp_path / "policy"), device=CPU, dtype="float32", seed=0, new_tokens=ids)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name  # what it learnt of them is not reset


def test_a_reference_gets_the_words_of_an_earlier_run_too(architecture: str, hf_folder: Folder, tmp_path: Path):
    base = hf_folder(architecture)
    tokenizer, ids = new_tokens_of(base, "<kind>")
    model = load_policy(base, device=CPU, dtype="float32", seed=0, new_tokens=ids)
    save_model(tmp_path / "policy", model, tokenizer)
    ids = new_token_ids(load_tokenizer(str(tmp_path / "policy"), ["<witty>"]), ["<witty>"])
    mean = weight(policy_of(base).get_input_embeddings()).mean(0)
    for seed in (1, 2):
        torch.manual_seed(seed)
        reference = load_policy(base, device=CPU, dtype="float32", seed=0, new_tokens=ids)
        for token in ("<kind>", "<witty>"):
            assert_close(weight(reference.get_input_embeddings())[ids[token]], mean)


def test_reference_critics_and_scorers_get_the_rows_of_the_policy(architecture: str, hf_folder: Folder):
    _, ids = new_tokens_of(hf_folder(architecture), "<kind>")
    options = {"device": CPU, "dtype": "float32", "seed": 0, "new_tokens": ids}
    folder, row = hf_folder(architecture), ids["<kind>"]
    expected = weight(load_policy(folder, **options).get_input_embeddings())[row]
    assert torch.equal(weight(load_critics(folder, ("reward",), **options).trunk.get_input_embeddings())[row], expected)
    assert torch.equal(weight(new_scorer(folder, **options).get_input_embeddings())[row], expected)


def test_new_tokens_under_two_ids_are_refused(hf_folder: Folder, tmp_path: Path):
    tokenizer, ids = new_tokens_of(hf_folder("llama"), "<kind>", "<witty>")
    model = load_policy(hf_folder("llama"), device=CPU, dtype="float32", seed=0, new_tokens=ids)
    save_model(tmp_path / "policy", model, tokenizer)
    _, turned = new_tokens_of(hf_folder("llama"), "<witty>", "<kind>")
    with pytest.raises(ValueError, match=r"knows '<witty>' as token \d+, the policy as \d+.*in the order"):
        load_policy(str(tmp_path / "policy"), device=CPU, dtype="float32", seed=0, new_tokens=turned)


def test_rows_to_spare_are_used_before_new_ones_are_made(hf_folder: Folder, tmp_path: Path):
    folder = hf_folder("qwen2")
    padded, tokenizer = policy_of(folder), load_tokenizer(folder)
    padded.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    save_model(tmp_path / "padded", padded, tokenizer)
    _, ids = new_tokens_of(str(tmp_path / "padded"), "<kind>")
    model = load_policy(str(tmp_path / "padded"), device=CPU, dtype="float32", seed=0, new_tokens=ids)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert len(weight(layer)) == len(tokenizer) + 8
        assert_close(weight(layer)[ids["<kind>"]], weight(layer)[: len(tokenizer)].mean(0))


@pytest.mark.parametrize(("share", "frozen"), [(0.0, 0), (0.49, 0), (0.5, 1), (0.99, 1), (1.0, 2)])
def test_the_first_layers_and_the_embeddings_do_not_learn_and_the_others_do(
    architecture: str, share: float, frozen: int, hf_folder: Folder, ragged: Ragged
):
    model = new_scorer(hf_folder(architecture), device=CPU, dtype="float32", seed=0)
    freeze(model, share)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sequences, _, _ = ragged(model.config.vocab_size, 4)
    learner = Learner(
        modules={"scorer": model},
        total_updates=1,
        lr={"scorer": 0.01},
        epochs=1,
        minibatch_size=0,
        tokens_at_once=1000,
        schedule="constant",
        warmup=0,
        weight_decay=0.1,  # moves whatever the optimiser has, with a gradient or without
        betas=(0.9, 0.95),
        max_grad_norm=1.0,
    )
    batch = TextBatch(sequences=sequences)
    part = Part(batch, lambda rows: raw_scores(model, rows.sequences), lambda new, _: [Term("score", new, "row")])
    learner.update([part], seed=0)

    def is_frozen(name: str) -> bool:
        layer = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        embeds = re.search(r"\.(embed_tokens|embed_in|wte|wpe|embed_positions)\.", name)
        return share > 0 and (bool(embeds) or (layer is not None and int(layer[1]) < frozen))

    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if not is_frozen(name)}
    assert any(map(is_frozen, before)) is (share > 0)
    learning = sum(parameter.numel() for name, parameter in before.items() if not is_frozen(name))
    groups = cast(Whole, learner.training).optimiser.param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == learning


def test_the_trunk_of_critics_is_frozen_like_a_policy(hf_folder: Folder):
    critics = load_critics(hf_folder("llama"), ("reward",), device=CPU, dtype="float32", seed=0)
    freeze(critics.trunk, 0.5)
    frozen = {name for name, parameter in critics.named_parameters() if not parameter.requires_grad}
    policy = policy_of(hf_folder("llama"))
    freeze(policy, 0.5)
    alike = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    assert {name.removeprefix("trunk.") for name in frozen} == {name.removeprefix("model.") for name in alike}
    assert not any(name.startswith("heads") for name in frozen)
