"""The harness on a task of our own: its figures are those of a loop over the policy's probabilities."""

import importlib.util
import json

import pytest
import torch

from rlhf_lab.console import Console
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.models import load_frozen
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.benchmarks import Benchmarks
from rlhf_lab.tracking import NoTracker

PATHS = ModelPaths(**dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={})
HERE = Hardware(device="cpu", dtype="float32", threads=1)
QUESTIONS = [("sure ! first", ["wipe the sponge .", "good luck !"], 0), ("of course !", ["enjoy !", "first"], 1)] * 3
TASK = """
task: openers
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""

needs_the_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")


def stage(**changes):
    default = {"few_shot": None, "limit": None, "batch_size": 4, "chat_template": False, "max_length": None}
    return Benchmarks(
        **{"model": PATHS, "hardware": HERE, "tasks": ["openers"], "task_folders": [], **default, **changes}
    )


@needs_the_harness
@pytest.mark.slow
def test_accuracy_is_that_of_the_likelier_answers_and_a_task_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/openers.yaml").write_text(TASK.replace("QUESTIONS", str(questions)))
    found = []
    for _ in range(2):
        benchmarks = stage(task_folders=[str(tmp_path / "tasks")])
        benchmarks.check()
        run = Run.open(
            tmp_path / "run",
            config={"seed": 0, "keep_checkpoints": 2},
            overrides=[],
            artifacts={},
            tracker=NoTracker(),
            console=Console(),
        )
        try:
            found.append(benchmarks.run(run))
        finally:
            run.close()
        questions.write_text("")  # the second time there is nothing to read
    tokenizer = load_tokenizer("embedded:tiny")
    policy = load_frozen(
        "embedded:tiny", device=torch.device("cpu"), dtype="float32", seed=derive(0, "initial weights"), new_tokens={}
    )
    right = 0
    for question, choices, answer in QUESTIONS:
        scores = [_logprob(policy, tokenizer, question, f" {choice}") for choice in choices]
        right += scores.index(max(scores)) == answer
    assert found[0]["benchmark/openers/acc/mean"] == pytest.approx(right / len(QUESTIONS))
    assert found[0] == found[1]
    assert len((tmp_path / "run/benchmarks/openers.jsonl").read_text().splitlines()) == len(QUESTIONS)


def _logprob(policy, tokenizer, question, answer):
    asked = tokenizer(question, add_special_tokens=True)["input_ids"]
    whole = tokenizer(question + answer, add_special_tokens=True)["input_ids"]
    logprobs = policy(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logprobs[t - 1, whole[t]].item() for t in range(len(asked), len(whole)))


@needs_the_harness
def test_what_cannot_work_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"stage\.tasks is empty"):
        stage(tasks=[]).check()
    with pytest.raises(ValueError, match="names a task twice"):
        stage(tasks=["a", "a"]).check()
    with pytest.raises(ValueError, match="no folder"):
        stage(task_folders=["nowhere"]).check()
