"""Ties of the deciding score are decided by a coin or left out; noise turns exactly its share of pairs that differ."""

import json
from dataclasses import replace

import pytest

from rlhf_lab.console import Console
from rlhf_lab.data.dataset import GOLD, Dataset
from rlhf_lab.data.tables import read_table
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.run import Run
from rlhf_lab.stages.annotate import Annotate
from rlhf_lab.tracking import NoTracker

PATHS = ModelPaths(**dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={})


@pytest.fixture
def annotated(tmp_path, world):
    """`annotated(ties, better_by)` is the training table and the metrics."""

    def annotate(ties, better_by, size=24, share=0.0):
        stage = Annotate(
            model=PATHS,
            dataset=world(train_size=size, train_split="preferences", eval_splits=[]),
            sampling=Sampling(max_new_tokens=6, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=64),
            hardware=Hardware(device="cpu", dtype="float32", threads=1),
            better_by=better_by,
            safer_by="cost",
            ties=ties,
            safe_below=0.0,
            preference_noise=share,
            safety_noise=share,
            verdict_noise=share,
            prompts_per_shard=100,
        )
        run = Run.open(
            tmp_path / f"{ties}_{better_by}",
            config={"seed": 0, "keep_checkpoints": 2},
            overrides=[],
            artifacts={},
            tracker=NoTracker(),
            console=Console(),
        )
        try:
            metrics = stage.run(run)
        finally:
            run.close()
        return read_table(run.directory / "data/train.parquet"), metrics

    return annotate


def test_dropped_ties_are_the_pairs_of_equal_gold_and_no_others(annotated, monkeypatch):
    monkeypatch.setitem(GOLD, "helpfulness", lambda request, response: float(len(response) % 2))
    every, _ = annotated("coin", "helpfulness")
    kept, metrics = annotated("drop", "helpfulness")
    assert kept == [row for row in every if row["gold_helpfulness_0"] != row["gold_helpfulness_1"]]
    assert 0 < len(kept) < len(every)
    assert metrics["train/tied_pairs"] + metrics["train/empty_pairs"] + len(kept) == 24
    assert all(row["better"] == (row["gold_helpfulness_1"] > row["gold_helpfulness_0"]) for row in kept)


def test_a_score_that_every_pair_ties_in_is_refused(annotated):
    with pytest.raises(ValueError, match=r"no pair of preferences is left of 24: humour ties in 24 .*stage.ties=coin"):
        annotated("drop", "humour")


def test_noise_turns_exactly_its_share_of_the_pairs_that_differ(annotated, monkeypatch):
    generate = Generator.generate

    def some_equal(self, *arguments):
        rollout = generate(self, *arguments)
        texts = ["same" if i % 4 < 2 else f"{i} {text}" for i, text in enumerate(rollout.responses)]
        return replace(rollout, responses=texts)

    monkeypatch.setattr(Generator, "generate", some_equal)
    kept, metrics = annotated("coin", "helpfulness", size=40, share=0.25)
    assert (metrics["train/empty_pairs"], metrics["train/equal_pairs"], len(kept)) == (0, 20, 20)
    for label in ("better", "safer", "safe_0", "safe_1"):
        assert sum(row[label] != row[f"clean_{label}"] for row in kept) == 5


def test_what_the_data_set_has_to_say_is_said(annotated, monkeypatch, tmp_path):
    monkeypatch.setattr(Dataset, "prompts", noting(Dataset.prompts))
    annotated("coin", "helpfulness")
    warned = (tmp_path / "coin_helpfulness/warnings.jsonl").read_text().splitlines()
    assert [json.loads(line)["message"] for line in warned] == ["read preferences"]


def noting(read):
    """Reads, and leaves a note of it."""

    def prompts(self, split, template):
        self.notes.append(f"read {split}")
        return read(self, split, template)

    return prompts
