"""A policy against the data's own responses: on their prompts, in shards, judged, and sampled once."""

import json
from typing import Any

import pytest

from rlhf_lab.console import Console
from rlhf_lab.data.conditions import NoConditions
from rlhf_lab.data.generations import Generations
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.rollouts import BuiltIn
from rlhf_lab.evaluation.refusals import RefusalPhrases
from rlhf_lab.evaluation.text_overlap import TextOverlap
from rlhf_lab.judges.none import NoJudge
from rlhf_lab.records import Verdict
from rlhf_lab.run import Run
from rlhf_lab.stages.evaluate import Evaluate
from rlhf_lab.stages.evaluate_policy import EvaluatePolicy
from rlhf_lab.tracking import NoTracker

PATHS = ModelPaths(**dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={})
SAMPLING = Sampling(max_new_tokens=6, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=64)

SETTINGS: dict[str, Any] = {
    "model": PATHS,
    "rewards": {},
    "evaluation_sampling": SAMPLING,
    "hardware": Hardware(device="cpu", dtype="float32", threads=1),
    "tokens_at_once": 4096,
    "conditions": NoConditions(),
}


class Longest:
    """Prefers the longer text; says nothing of one prompt."""

    def __init__(self):
        self.asked = []

    def check(self, criteria, promised=()): ...

    def load(self, hardware, template):
        return self

    def compare(self, comparisons, criterion):
        self.asked += comparisons
        mute = comparisons[0].prompt.id
        wins = [None if c.prompt.id == mute else float(len(c.responses[0]) > len(c.responses[1])) for c in comparisons]
        return [Verdict(by_order=(each, None), asked=1) for each in wins]


@pytest.fixture
def evaluated(tmp_path, world):
    """`evaluated(judge=…)` is the run directory, its metrics and the data set."""

    def evaluate(name="run", judge=None, **changes):
        dataset = world(train_size=4, eval_splits=["test"], eval_size=5)
        stage = EvaluatePolicy(
            **{
                **SETTINGS,
                "dataset": dataset,
                "rollout": BuiltIn(),
                "samples_per_prompt": 2,
                "prompts_per_shard": 3,
                "refusals": True,
                "refusal_phrases": RefusalPhrases(["sorry"], 100),
                "references": judge is not None,
                "overlap": TextOverlap("ascii", False),
                "judge": judge or NoJudge(),
                "criteria": ["length"] if judge else [],
                **changes,
            }
        )
        stage.check()
        run = Run.open(
            tmp_path / name,
            config={"seed": 0, "keep_checkpoints": 2},
            overrides=[],
            artifacts={},
            tracker=NoTracker(),
            console=Console(),
        )
        try:
            return tmp_path / name, stage.run(run)
        finally:
            run.close()

    return evaluate


def test_the_prompts_are_those_that_the_data_answer_and_every_measure_reaches_the_table(evaluated):
    judge = Longest()
    directory, metrics = evaluated(judge=judge)
    table = Generations.open(directory / "generations.parquet")  # not the folder: the run is open still
    rows = list(table.rows("test", ["prompt_id", "text_rouge_1", "text_refusal", "verdict_length", "response"]))
    assert len(rows) == len(judge.asked) == 10
    answered = {each.responses[1] for each in judge.asked}
    assert [c.prompt.id for c in judge.asked] == [row["prompt_id"] for row in rows]
    assert all(text for text in answered)
    assert sum(row["verdict_length"] is None for row in rows) == metrics["eval/test/win_rate/length/excluded"] == 4
    assert "could not be read" in (directory / "warnings.jsonl").read_text()
    assert 0 <= metrics["eval/test/text/rouge_1/mean"] <= 1


def test_a_split_of_one_shard_is_what_training_runs_report(evaluated, world):
    directory, metrics = evaluated(prompts_per_shard=8, samples_per_prompt=1)
    rows = [json.loads(line) for line in (directory / "samples/step_000000.jsonl").read_text().splitlines()]
    alone = Evaluate(**SETTINGS, dataset=world(train_size=4, eval_splits=["test"], eval_size=5))
    theirs, said = alone.bench("embedded:tiny", 0).measure("embedded:tiny")
    assert [row["response"] for row in rows] == [row["response"] for row in said]
    assert theirs == {name: metrics[name] for name in theirs}


def test_what_was_sampled_is_not_sampled_again(evaluated, monkeypatch):
    directory, first = evaluated()
    monkeypatch.setattr("rlhf_lab.evaluation.evaluator.Evaluator.sample", None)
    _, second = evaluated()
    assert first == second
    rows = [json.loads(line) for line in (directory / "samples/step_000000.jsonl").read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0, 1] * 5


def test_a_judge_needs_references_and_many_samples_a_temperature(evaluated):
    with pytest.raises(ValueError, match=r"stage\.references=true"):
        evaluated(judge=Longest(), references=False)
    with pytest.raises(ValueError, match=r"samples_per_prompt=1"):
        evaluated(evaluation_sampling=Sampling(**{**SAMPLING.__dict__, "temperature": 0.0}))
