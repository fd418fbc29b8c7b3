"""vLLM as a rollout engine: how its process is spoken to, with a stand-in for vLLM; and what vLLM itself samples.

The latter are marked `vllm` and need RLHF_LAB_VLLM_PYTHON, the Python of an environment that has it.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
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
from rlhf_lab.engine.parameters import parameters_of, restore_parameters
from rlhf_lab.engine.rollouts import VLLM, BuiltIn
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.engine.vllm import VLLMEngine, Worker, check_python, environment, shared
from rlhf_lab.functional.sampled import penalised, restricted
from rlhf_lab.records import Prompt
from rlhf_lab.types import PromptBatch, Rollout

CPU = torch.device("cpu")
Folder = Callable[..., str]
WHOLE = ModelPaths(base="b", policy="p", reference="r", critic="c", learning_rates={})
ALONE = Hardware(device="cpu", dtype="float32", threads=1)
# of the interface that the worker calls, with faults on demand; a response's last token says its seed
STAND_IN = """
import json, os, pathlib, sys, time
from types import SimpleNamespace as Told

class SamplingParams:
    def __init__(self, **said):
        self.said = said

class LLM:
    def __init__(self, path, fault="", **options):
        print("loading", json.dumps(options, sort_keys=True), flush=True)
        if fault == "start":
            sys.exit("no such architecture")
        if fault == "slow":
            time.sleep(60)
        self.fault, self.weights, self.resets = fault, pathlib.Path(path, "weights").read_text(), 0
        self.llm_engine = Told(model_config=Told(max_model_len=64))

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.weights = pathlib.Path(kwargs["weights_path"], "weights").read_text()

    def apply_model(self, change):
        pass

    def reset_prefix_cache(self):
        return self.fault != "cache"

    def generate(self, prompts, params, use_tqdm):
        if self.fault == "die":
            print("out of luck", flush=True)
            os._exit(7)
        if self.fault == "busy":
            pathlib.Path("busy").touch()
            time.sleep(60)
        return [self.answer(prompt["prompt_token_ids"], one.said) for prompt, one in zip(prompts, params)]

    def answer(self, prompt, said):
        tokens = [*prompt, int(self.weights), said["seed"] % 50]
        logprobs = [{token: Told(logprob=-float(token))} for token in tokens]
        return Told(outputs=[Told(token_ids=tokens, logprobs=logprobs, finish_reason=said["ends"])])
"""


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


# --- how its process is spoken to


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """`worker(fault)` is a worker whose vLLM is the stand-in."""
    (tmp_path / "vllm.py").write_text(STAND_IN)
    made: list[Worker] = []

    def make(fault: str = "", start_timeout: float = 20.0) -> Worker:
        variables = {**environment(), "PYTHONPATH": str(tmp_path)}
        made.append(Worker(sys.executable, {"fault": fault, "dtype": "float32"}, start_timeout, variables))
        return made[-1]

    yield make
    for one in made:
        one.close()


def writes(number: int, into: list[Path] | None = None) -> Callable[[Path], None]:
    """What leaves weights that the stand-in reads."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text(str(number))
        if into is not None:
            into.append(folder)

    return write


def ended(process: subprocess.Popen[bytes] | None) -> bool:
    """Whether a process ends within a few seconds."""
    assert process is not None
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        return False
    return True


def said(one: Worker) -> list[Any]:
    return one.ask("generate", prompts=[[3], [4, 5]], seeds=[11, 12], sampling={"ends": "stop"})


def test_a_worker_answers_and_its_weights_follow_and_are_written_only_if_they_are_others(worker):
    one, folders = worker(), []
    one.take("a", 100, writes(20, folders))
    assert one.max_positions == 64
    assert said(one) == [[[3, 20, 11], [-3, -20, -11], True], [[4, 5, 20, 12], [-4, -5, -20, -12], True]]
    one.take("a", 100, writes(21, folders))
    assert said(one)[0][0] == [3, 20, 11]
    one.take("b", 100, writes(22, folders))
    assert said(one)[0][0] == [3, 22, 11]
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)  # a policy does not stay in memory twice
    process, place = one.process, one.folder
    one.close()
    assert ended(process)
    assert not place.exists()


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("start", r"has ended, exit status 1; it said last:\n(.*\n)*no such architecture"),
        ("die", r"has ended, exit status 7; it said last:\n(.*\n)*out of luck"),
        ("cache", "could not generate: RuntimeError: vLLM did not empty its cache"),
        ("slow", r"took longer than rollout\.start_timeout=0\.3 seconds to start"),
    ],
)
def test_a_worker_that_fails_is_said_at_once_with_its_last_words_and_leaves_nothing(fault: str, what: str, worker):
    one = worker(fault, start_timeout=0.3 if fault == "slow" else 20.0)

    def use() -> None:
        one.take("a", 100, writes(20))
        said(one)

    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"vLLM's process {what}"):
        use()
    assert time.monotonic() - begin < 5
    assert one.process is None
    assert not one.folder.exists()


def test_a_worker_that_was_killed_meanwhile_is_said(worker):
    one = worker()
    one.take("a", 100, writes(20))
    one.process.kill()
    with pytest.raises(RuntimeError, match="vLLM's process has ended, exit status -9"):
        said(one)
    one.take("a", 100, writes(23))  # the state that it had is gone with it
    assert said(one)[0][0] == [3, 23, 11]


def test_weights_that_could_not_be_written_are_not_taken_for_those_it_has(worker):
    def fail(folder: Path) -> None:
        raise OSError("no space left")

    one = worker()
    one.take("a", 100, writes(20))
    with pytest.raises(OSError, match="no space"):
        one.take("b", 100, fail)
    one.take("a", 100, writes(24))
    assert said(one)[0][0] == [3, 24, 11]


def test_the_end_of_its_input_ends_a_worker_even_while_it_generates_and_removes_what_it_was_handed(worker):
    one = worker("busy")
    one.take("a", 100, writes(20))
    request = {"do": "generate", "prompts": [[3]], "seeds": [1], "sampling": {"ends": "stop"}}
    one.process.stdin.write(json.dumps(request).encode() + b"\n")
    one.process.stdin.flush()
    while not (one.folder / "busy").exists():
        time.sleep(0.01)
    one.process.stdin.close()  # as the kernel does when the process that holds it is killed
    assert ended(one.process)
    assert not one.folder.exists()


def test_a_worker_lives_as_long_as_its_model_and_engines_of_one_model_share_it(worker):
    model, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    one = shared(model, "settings", worker)
    assert shared(model, "settings", worker) is one
    assert shared(model, "other settings", worker) is not one
    assert shared(other, "settings", worker) is not one
    one.take("a", 100, writes(20))
    process = one.process
    del model
    assert ended(process)


def test_a_worker_is_told_no_secrets_and_nothing_of_this_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("ENDPOINT", "sk-" + "a1" * 10)
    monkeypatch.setenv("PYTHONPATH", "/here")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SOMETHING", "else")
    found = environment()
    assert not {"WANDB_API_KEY", "ENDPOINT", "PYTHONPATH", "WORLD_SIZE"} & found.keys()
    assert found["SOMETHING"] == "else"
    assert found["VLLM_NO_USAGE_STATS"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert environment(torch.device("cuda", 1))["CUDA_VISIBLE_DEVICES"] == "6"


def test_whatever_changes_the_policy_changes_what_is_taken_for_its_state(hf_folder: Folder):
    model = load_policy(hf_folder("llama"), device=CPU, dtype="float32", seed=0)
    template = Template(load_tokenizer(hf_folder("llama")), "auto")
    states: list[Any] = []
    recorder = SimpleNamespace(take=lambda state, size, write: states.append(state), max_positions=96)
    engine = VLLMEngine(model, template, sampling(), cast(Worker, recorder))
    before = {name: tensor.clone() for name, tensor in parameters_of(model).items()}

    def changed(change: Callable[[], Any]) -> bool:
        change()
        engine.sync()
        return len(states) < 2 or states[-1] != states[-2]

    def step(**kind: Any) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(model.parameters(), lr=1e-3, **kind).step()

    assert changed(lambda: None)
    assert not changed(lambda: None)
    model(input_ids=torch.tensor([[3, 4]]))
    assert not changed(lambda: None)
    assert changed(lambda: step(foreach=False))
    assert changed(lambda: step(foreach=True))
    assert changed(lambda: step(fused=True))
    assert changed(lambda: restore_parameters(model, before))
    assert changed(lambda: model.load_state_dict(model.state_dict()))
    parameter = next(model.parameters())
    assert changed(lambda: setattr(parameter, "data", parameter.data * 1.5))
    assert changed(lambda: parameter.data.mul_(1.5))


def settings(python: str | None, **changes: Any) -> VLLM:
    given: dict[str, Any] = {
        "importance_cap": 2.0,
        "python": python,
        "dtype": "float32",
        "gpu_memory_utilization": 0.3,
        "kv_cache_gib": 0.25,
        "max_model_len": None,
        "enforce_eager": True,
        "start_timeout": 300.0,
    }
    return VLLM(**(given | changes))


def test_what_vllm_could_not_do_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlhf_lab.engine.rollouts.check_python", lambda python: python)
    engines = settings("somewhere")
    engines.check(sampling(top_k=3, top_p=0.5, min_new_tokens=2, repetition_penalty=1.2), WHOLE, ALONE)
    engines.check(sampling(stop_strings=["x"]), WHOLE, ALONE)
    with pytest.raises(ValueError, match=r"stop_strings=\['x'\] and sampling.min_new_tokens=2 together; use"):
        engines.check(sampling(stop_strings=["x"], min_new_tokens=2), WHOLE, ALONE)
    with pytest.raises(ValueError, match=r"vllm does not work with hardware\.distribution=fsdp; use rollout=built_in"):
        engines.check(sampling(), WHOLE, replace(ALONE, distribution="fsdp"))
    with pytest.raises(ValueError, match=r"does not work with model\.peft=lora; use"):
        engines.check(sampling(), cast(ModelPaths, SimpleNamespace(peft="lora")), ALONE)
    with ranks.planned(3), pytest.raises(ValueError, match=r"does not work with num_processes=3; use"):
        engines.check(sampling(), WHOLE, ALONE)


def test_a_python_without_vllm_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"rollout\.python=/no/such/python is no program that can be run; install"):
        settings("/no/such/python").check(sampling(), WHOLE, ALONE)
    with pytest.raises(ValueError, match=r"rollout\.python=null, but this environment has no vLLM; install"):
        settings(None).check(sampling(), WHOLE, ALONE)
    with pytest.raises(ValueError, match=rf"rollout\.python={sys.executable} has no vLLM; install"):
        settings(sys.executable).check(sampling(), WHOLE, ALONE)
    (tmp_path / "vllm.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert check_python(str(python)) == str(python)


# --- what vLLM samples


TEXTS = ["bread ?", "is it safe to mix bleach and acid ?", "x", "tell me a joke about bread and water and flour"]
real = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        "RLHF_LAB_VLLM_PYTHON" not in os.environ,
        reason="needs vLLM: RLHF_LAB_VLLM_PYTHON names the Python that has it",
    ),
]


def needs_vllm(test: Any) -> Any:
    for mark in real:
        test = mark(test)
    return test


class Policy:
    """A Llama whose heads are 64 wide, and not 16, which vLLM cannot read on a CPU; its worker starts once."""

    def __init__(self, folder: str) -> None:
        self.model = load_policy(folder, device=CPU, dtype="float32", seed=0)
        self.template = Template(load_tokenizer(folder), "auto")
        assert self.model.generation_config is not None
        self.model.generation_config.eos_token_id = [self.template.eos, *range(20, 30)]
        self.prompts = prompt_batch(self.template, [Prompt.from_text(text) for text in TEXTS])
        self.engines = settings(os.environ["RLHF_LAB_VLLM_PYTHON"])

    def sampled(self, samples: int = 3, seed: int = 5, prompts: PromptBatch | None = None, **changes: Any) -> Rollout:
        engine = self.engines.engine(self.model, self.template, sampling(**changes))
        engine.sync()
        return engine.generate(prompts or self.prompts, samples, seed)

    def built_in(self, samples: int = 3, prompts: PromptBatch | None = None, **changes: Any) -> Rollout:
        engine = BuiltIn().engine(self.model, self.template, sampling(**changes))
        return engine.generate(prompts or self.prompts, samples, seed=5)

    def logits(self, rollout: Rollout) -> torch.Tensor:
        """(B, T, V) of the learner, before each token of the responses."""
        sequences = rollout.sequences
        with torch.no_grad():
            return self.model(
                input_ids=sequences.tokens, attention_mask=sequences.attention_mask, position_ids=sequences.position_ids
            ).logits[:, sequences.prompt_width - 1 : -1]


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory, write_tokenizer) -> Policy:
    """The model with random weights, its engine and prompts."""
    folder = tmp_path_factory.mktemp("heads_of_64")
    tokenizer = write_tokenizer("llama", 40)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Policy(str(folder))


def assert_same(theirs: Rollout, ours: Rollout) -> None:
    assert torch.equal(theirs.sequences.tokens, ours.sequences.tokens)
    assert torch.equal(theirs.sequences.response_mask, ours.sequences.response_mask)
    assert torch.equal(theirs.finished, ours.finished)
    assert torch.equal(theirs.group, ours.group)
    assert theirs.responses == ours.responses
    assert_close(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=0)


def chosen(logprobs: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    """(N,) of the tokens of the responses, from (N, V)."""
    sequences = rollout.sequences
    tokens = sequences.tokens[:, sequences.prompt_width :][sequences.response_mask]
    return logprobs.gather(1, tokens[:, None])[:, 0]


@needs_vllm
def test_vllm_is_greedy_token_for_token_as_the_built_in_engine(policy: Policy):
    ours = policy.built_in(temperature=0, max_new_tokens=16)
    assert 0 < ours.finished.sum() < len(ours)  # some end before the others
    assert_same(policy.sampled(temperature=0, max_new_tokens=16), ours)


@needs_vllm
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_what_vllm_records_is_the_learners(temperature: float, policy: Policy):
    rollout = policy.sampled(samples=6, temperature=temperature)
    learnt, figures = policy.engines.measured(rollout, policy.model, 4096)
    assert_close(learnt.logprobs, rollout.logprobs, atol=1e-4, rtol=0)
    assert figures["rollout/mismatch_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert learnt.log_ratio[0].shape == rollout.logprobs.shape


@needs_vllm
@pytest.mark.parametrize(
    "change",
    [{"top_k": 4}, {"top_p": 0.6}, {"top_k": 30, "top_p": 0.8}, {"repetition_penalty": 1.5}],
    ids=str,
)
def test_what_vllm_records_is_of_the_restricted_distribution(change: dict[str, Any], policy: Policy):
    rollout = policy.sampled(samples=4, temperature=0.7, **change)
    sequences, logits = rollout.sequences, policy.logits(rollout)
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, column in sequences.response_mask.nonzero().tolist():
        place = sequences.prompt_width + column
        before = sequences.tokens[row, :place][sequences.attention_mask[row, :place].bool()]
        seen[row, column, before] = True
    at = penalised(logits, seen, change.get("repetition_penalty", 1.0))[sequences.response_mask]
    expected = restricted(at, 0.7, change.get("top_k", 0), change.get("top_p", 1.0)).log_softmax(-1)
    assert_close(rollout.logprobs[sequences.response_mask], chosen(expected, rollout), atol=1e-4, rtol=0)


@needs_vllm
def test_vllms_samples_come_as_often_as_the_learner_says(policy: Policy):
    alone = policy.prompts.select(torch.tensor([1]))
    rollout = policy.sampled(samples=1500, max_new_tokens=1, temperature=0.7, prompts=alone)
    first = rollout.sequences.tokens[:, rollout.sequences.prompt_width]
    vocabulary = policy.model.config.vocab_size
    found = torch.bincount(first, minlength=vocabulary) / len(first)
    expected = (policy.logits(rollout)[0, 0] / 0.7).softmax(-1)
    # four standard deviations of the share of each token, and room for those that come once
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / len(first)).sqrt() + 1 / len(first)).all()


@needs_vllm
def test_the_weights_of_vllm_follow_the_policys(policy: Policy):
    # longer than a page of the cache of prefixes, 128 on a CPU: what older weights computed would be found there
    prompts = prompt_batch(policy.template, [Prompt.from_text(" ".join(TEXTS * 3)), Prompt.from_text("bread ?")])
    assert 150 < prompts.attention_mask[0].sum() < 450
    before = {name: tensor.clone() for name, tensor in parameters_of(policy.model).items()}
    first = policy.sampled(temperature=0, prompts=prompts)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(-1.1)
    try:
        changed = policy.sampled(temperature=0, prompts=prompts)
        assert_same(changed, policy.built_in(temperature=0, prompts=prompts))
        assert changed.responses != first.responses
    finally:
        restore_parameters(policy.model, before)
    assert_same(policy.sampled(temperature=0, prompts=prompts), first)


@needs_vllm
def test_equal_seeds_give_equal_responses_whatever_was_sampled_before_or_beside(policy: Policy):
    rollout = policy.sampled(seed=5)
    other = policy.sampled(seed=6)
    again = policy.sampled(seed=5)
    assert torch.equal(again.sequences.tokens, rollout.sequences.tokens)
    assert torch.equal(again.logprobs, rollout.logprobs)
    assert other.responses != rollout.responses
    assert len(set(rollout.responses)) == len(rollout)  # each row has random numbers of its own
    alone = policy.sampled(seed=5, prompts=policy.prompts.select(torch.tensor([0])))
    assert alone.responses == rollout.responses[:3]


@needs_vllm
def test_a_stop_string_ends_a_response_of_vllm_with_the_token_that_completes_it(policy: Policy):
    free = policy.built_in(temperature=0, max_new_tokens=16)
    stops = sorted(pair for text in free.responses for pair in re.findall("[!-~]{2}", text))[::2]
    assert len(stops) > 1
    ours = policy.built_in(temperature=0, max_new_tokens=16, stop_strings=stops)
    assert ours.responses != free.responses
    assert_same(policy.sampled(temperature=0, max_new_tokens=16, stop_strings=stops), ours)


@needs_vllm
def test_vllm_draws_no_stop_before_the_least_length(policy: Policy):
    assert policy.built_in(temperature=0).sequences.response_mask.sum(1).min() < 6
    ours = policy.built_in(temperature=0, min_new_tokens=6)
    theirs = policy.sampled(temperature=0, min_new_tokens=6)
    assert theirs.sequences.response_mask.sum(1).min() >= 6
    assert_same(theirs, ours)


@needs_vllm
def test_prompts_that_leave_no_room_in_vllm_are_refused(policy: Policy):
    with pytest.raises(ValueError, match=r"need \d+ positions, the model has 512"):
        policy.sampled(max_new_tokens=500)
