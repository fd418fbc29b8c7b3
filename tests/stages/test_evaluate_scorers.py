"""Pairs of a table are measured by the columns that are named; a bad name is refused; what was scored is kept."""

import json

import pytest
import torch

from rlhf_lab.console import Console
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.tables import read_table
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.evaluation.value_models import Assessor, Yardstick
from rlhf_lab.run import Run
from rlhf_lab.stages.evaluate_scorers import EvaluateScorers
from rlhf_lab.tracking import NoTracker
from rlhf_lab.types import Score

PATHS = ModelPaths(**dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={})


class Words:
    """Two members: how many words a response has, and twice that."""

    def __init__(self):
        self.asked = 0

    def check(self, promised=()): ...

    def load(self, hardware, policy):
        return self

    def score(self, rollout):
        self.asked += len(rollout)
        count = torch.tensor([float(len(text.split())) for text in rollout.responses])
        members = torch.stack([count, 2 * count], dim=1)
        return Score(value=members.mean(1), members=members)


def row(prompt, response_0, response_1, better, gold):
    return {
        "prompt": prompt,
        "response_0": response_0,
        "response_1": response_1,
        "better": better,
        "gold_0": gold[0],
        "gold_1": gold[1],
    }


LONGER = [row(f"p{i}", "a b c"[: 2 * (i % 3) + 1], "a b c d", 1, (float(i % 3), 5.0)) for i in range(6)]
MIXED = [row("q", "a b", "a", 0, (1.0, 0.0)), row("r", "a b", "a", 1, (0.0, 1.0)), row("s", "a b", "a", 1, (2.0, 2.0))]


@pytest.fixture
def evaluated(tmp_path):
    """`evaluated(source, yardstick)` is the run directory and its metrics."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, rows in (("train", LONGER), ("home", LONGER), ("away", MIXED)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))

    def evaluate(source, name="run", costs=(), in_distribution="home", **yardstick):
        nothing = dict.fromkeys(("preferred", "gold", "margin", "safe"))
        dataset = Dataset(
            path=str(folder),
            revision=None,
            columns={},
            template="auto",
            max_prompt_tokens=64,
            max_response_tokens=64,
            bad_rows="error",
            on_conflict="keep",
            train_size=None,
            train_split="train",
            eval_splits=["away", "home"],
            eval_size=10,
            hold_out=0.0,
            seed=0,
        )
        stage = EvaluateScorers(
            model=PATHS,
            dataset=dataset,
            rewards={"words": source, "off": None},
            costs=costs,
            yardsticks={"words": Yardstick(**{**nothing, **yardstick})} if yardstick else {},
            assessor=Assessor(draws=50, bins=5, margin_bins=2, seed=0),
            in_distribution=in_distribution,
            hardware=Hardware(device="cpu", dtype="float32", threads=1),
            rows_per_shard=4,
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


def test_accuracy_gap_and_table_are_those_of_the_rows(evaluated):
    directory, metrics = evaluated(Words(), preferred="better", gold="gold")
    assert metrics["eval/home/value_model/words/accuracy/mean"] == 1.0
    assert metrics["eval/away/value_model/words/accuracy/mean"] == pytest.approx(1 / 3)
    assert metrics["gap/words/away/accuracy/mean"] == pytest.approx(2 / 3)
    assert metrics["eval/home/value_model/words/members/agreement/mean"] == 1.0
    table = read_table(directory / "data/scores.parquet")
    assert [each["split"] for each in table] == ["away"] * 3 + ["home"] * 6
    for each in table:
        for side in "01":
            words = len(each[f"response_{side}"].split())
            assert each[f"score_words_{side}"] == 1.5 * words
            assert each[f"members_words_{side}"] == [words, 2 * words]
    drawn = json.loads((directory / "value_models.json").read_text())["words"]["home"]
    assert sum(drawn["histogram"]["counts"]["preferred"]) == 6


def test_without_labels_the_gold_score_decides_and_ties_are_left_out(evaluated):
    directory, metrics = evaluated(Words(), gold="gold")
    assert metrics["eval/away/value_model/words/pairs"] == 2
    assert metrics["eval/away/value_model/words/accuracy/mean"] == 0.5
    assert "1 of 3 pairs" in (directory / "warnings.jsonl").read_text()
    _, cost = evaluated(Words(), "cost", costs=["words"], gold="gold")
    assert cost["eval/home/value_model/words/accuracy/mean"] == 1.0  # the shorter has the lower gold cost


def test_what_was_scored_is_not_scored_again(evaluated):
    source, again = Words(), Words()
    _, first = evaluated(source, preferred="better")
    _, second = evaluated(again, preferred="better")
    assert source.asked == 18
    assert again.asked == 0
    assert first == second


def test_labels_that_are_none_are_refused_before_anything_is_scored(evaluated):
    source = Words()
    with pytest.raises(ValueError, match=r"gold_0.*safe, is 2\.0 in row 2, and neither 0 nor 1 in 1 of 3"):
        evaluated(source, preferred="better", safe="gold")
    with pytest.raises(ValueError, match=r"gold_0.*preferred, is 2\.0 in row 2"):
        evaluated(source, preferred="gold_0")
    assert not source.asked


def test_a_score_that_is_no_number_is_refused(evaluated):
    class Broken(Words):
        def score(self, rollout):
            score = super().score(rollout)
            return Score(value=score.value / 0, members=score.members)

    with pytest.raises(ValueError, match="score_words_0, row 0: inf; expected a finite number"):
        evaluated(Broken(), preferred="better")


def test_a_column_that_is_not_there_and_a_source_without_a_yardstick_are_refused(evaluated):
    with pytest.raises(ValueError, match=r"yardsticks\.words\.gold needs 'truth_0'"):
        evaluated(Words(), preferred="better", gold="truth")
    with pytest.raises(ValueError, match=r"stage\.yardsticks\.words="):
        evaluated(Words())
    with pytest.raises(ValueError, match="in_distribution=elsewhere"):
        evaluated(Words(), in_distribution="elsewhere", preferred="better")
