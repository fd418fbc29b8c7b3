"""A scorer with a tokenizer of its own, or the policy's; against the classifier's own output on whole conversations."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch, sequences
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.models import load_policy
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Prompt
from rlhf_lab.rewards import scalar_model
from rlhf_lab.rewards.scalar_model import ScalarModel
from rlhf_lab.types import Rollout

CPU = Hardware(device="cpu", dtype="float32", threads=1)
Folder = Callable[..., str]


def rollout_of(folder: str) -> tuple[Rollout, Template]:
    """Responses of which some end and some are cut."""
    model = load_policy(folder, device=torch.device("cpu"), dtype="float32", seed=0)
    template = Template(load_tokenizer(folder), "auto")
    output = model.get_output_embeddings()
    assert output is not None
    with torch.no_grad():  # a stop likely enough
        head = output.get_parameter("weight")
        head[template.eos] += head[template.eos].sign() * 0.2
    settings = Sampling(max_new_tokens=20, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=64)
    prompts = prompt_batch(
        template, [Prompt.from_text(text) for text in ("a joke", "is it safe to mix bleach ?", "go")]
    )
    rollout = Generator(model, template, settings).generate(prompts, 8, seed=3)
    assert 0 < rollout.finished.sum() < len(rollout)
    return rollout, template


def plain_scorer(folder: str) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = None
    return model.eval().requires_grad_(False)


def spoken(prompt: Prompt, response: str, tokenizer: transformers.PreTrainedTokenizerBase, finished: bool) -> list[int]:
    """The conversation in the scorer's own tokens, written out."""
    request = prompt.messages[0]["content"]
    if tokenizer.chat_template:
        text = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
    else:
        text = f"User: {request}\n\nAssistant:"
    answer = tokenizer(response, add_special_tokens=False).input_ids
    return tokenizer(text).input_ids + answer + ([tokenizer.eos_token_id] if finished else [])


@pytest.mark.parametrize("policy", ["qwen2", "gpt2"])
def test_a_scorer_with_another_tokenizer_reads_the_text_again(
    policy: str, architecture: str, hf_folder: Folder, scorer_folder: Folder
):
    rollout, template = rollout_of(hf_folder(policy))
    folder = scorer_folder(architecture)
    source = ScalarModel(folder, "auto", tokens_at_once=300).load(CPU, template)
    assert not source.reads_tokens
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), plain_scorer(folder)
    expected = [
        model(input_ids=torch.tensor([spoken(prompt, response, tokenizer, bool(finished))])).logits[0, 0]
        for prompt, response, finished in zip(rollout.prompts, rollout.responses, rollout.finished, strict=True)
    ]
    score = source.score(rollout)
    assert_close(score.value, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert torch.equal(score.members, score.value[:, None])


def test_a_scorer_with_the_policys_tokenizer_reads_its_tokens(
    architecture: str, hf_folder: Folder, scorer_folder: Folder, monkeypatch: pytest.MonkeyPatch
):
    rollout, template = rollout_of(hf_folder(architecture))
    folder = scorer_folder(architecture, merges=40)
    source = ScalarModel(folder, "auto", tokens_at_once=200).load(CPU, template)
    assert source.reads_tokens
    model, tokens = plain_scorer(folder), rollout.sequences
    expected = [
        model(input_ids=row[mask][None]).logits[0, 0]
        for row, mask in zip(tokens.tokens, tokens.attention_mask, strict=True)
    ]
    monkeypatch.setattr(scalar_model, "sequences", None)  # no text is tokenised
    assert_close(source.score(rollout).value, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_reading_tokens_or_text_gives_the_same_scores(scorer_folder: Folder, hf_folder: Folder):
    rollout, template = rollout_of(hf_folder("gpt2"))
    responses = [f"mix {i} times and wait ." for i in range(len(rollout))]
    rollout = replace(
        rollout,
        sequences=sequences(template, rollout.prompts, responses, rollout.finished.tolist()),
        responses=responses,
    )
    source = ScalarModel(scorer_folder("gpt2", merges=40), "auto", tokens_at_once=200).load(CPU, template)
    assert source.reads_tokens
    read = source.score(rollout).value
    source.reads_tokens = False
    assert_close(source.score(rollout).value, read, atol=1e-5, rtol=1e-5)


def test_only_a_finished_response_ends_with_an_eos(hf_folder: Folder, scorer_folder: Folder):
    rollout, template = rollout_of(hf_folder("gpt2"))
    source = ScalarModel(scorer_folder("llama"), "auto", tokens_at_once=10_000).load(CPU, template)
    as_it_was = source.score(rollout).value
    ended = source.score(replace(rollout, finished=torch.ones_like(rollout.finished))).value
    assert_close(ended[rollout.finished], as_it_was[rollout.finished], atol=1e-5, rtol=1e-5)
    assert ((ended - as_it_was)[~rollout.finished].abs() > 1e-3).all()


def test_the_calibration_of_the_config_is_applied(hf_folder: Folder, scorer_folder: Folder, tmp_path: Path):
    rollout, template = rollout_of(hf_folder("gpt2"))
    raw = ScalarModel(scorer_folder("opt"), "auto", tokens_at_once=500).load(CPU, template).score(rollout).value
    folder = tmp_path / "scorer"
    folder.mkdir()
    for path in Path(scorer_folder("opt")).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["score_calibration"] = {"scale": -3.0, "shift": 0.5, "method": "gold", "fitted_on": "val"}
    (folder / "config.json").write_text(json.dumps(config))
    score = ScalarModel(str(folder), "auto", tokens_at_once=500).load(CPU, template).score(rollout)
    assert_close(score.value, -3.0 * raw + 0.5, atol=1e-5, rtol=1e-5)


def test_scores_do_not_depend_on_the_token_budget(hf_folder: Folder, scorer_folder: Folder):
    rollout, template = rollout_of(hf_folder("gpt2"))
    sources = [ScalarModel(scorer_folder("qwen2"), "auto", budget).load(CPU, template) for budget in (1, 100, 10_000)]
    one, some, all_rows = (source.score(rollout).value for source in sources)
    assert_close(one, some, atol=1e-5, rtol=1e-5)
    assert_close(one, all_rows, atol=1e-5, rtol=1e-5)


def test_a_folder_that_is_not_there_is_refused_before_loading(tmp_path: Path):
    source = ScalarModel(str(tmp_path / "rm"), "auto", tokens_at_once=100)
    with pytest.raises(ValueError, match=r"reward model=.*rm: no such folder"):
        source.check()
    source.check(promised=[str(tmp_path / "rm")])


def test_a_scorer_never_reads_what_the_policy_was_told(hf_folder: Folder, scorer_folder: Folder):
    rollout, template = rollout_of(hf_folder("qwen2"))
    source = ScalarModel(scorer_folder("gpt2"), "auto", tokens_at_once=300).load(CPU, template)
    told = replace(rollout, prompts=[prompt.conditioned("bread bread", {"helpful": 1.0}) for prompt in rollout.prompts])
    assert torch.equal(source.score(told).value, source.score(rollout).value)


def test_a_conditioned_scorer_reads_its_own_condition(hf_folder: Folder, scorer_folder: Folder):
    rollout, template = rollout_of(hf_folder("qwen2"))
    folder = scorer_folder("qwen2")
    plain, asked = (
        ScalarModel(folder, "auto", 300, condition).load(CPU, template).score(rollout).value
        for condition in ("", "flour")
    )
    assert (asked - plain).abs().min() > 1e-6
