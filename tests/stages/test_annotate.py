"""Ties of the deciding score are decided by a coin or left out."""

import pytest

from rlhf_lab.console import Console
from rlhf_lab.data.dataset import GOLD
from rlhf_lab.data.tables import read_table
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.models import Hardware, ModelPaths
from rlhf_lab.run import Run
from rlhf_lab.stages.annotate import Annotate
from rlhf_lab.tracking import NoTracker

PATHS = ModelPaths(**dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={})


@pytest.fixture
def annotated(tmp_path, world):
    """`annotated(ties, better_by)` is the training table and the metrics."""

    def annotate(ties, better_by):
        stage = Annotate(
            model=PATHS,
            dataset=world(train_size=24, train_split="preferences", eval_splits=[]),
            sampling=Sampling(max_new_tokens=6, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=64),
            hardware=Hardware(device="cpu", dtype="float32", threads=1),
            better_by=better_by,
            safer_by="cost",
            ties=ties,
            safe_below=0.0,
            preference_noise=0.0,
            safety_noise=0.0,
            verdict_noise=0.0,
            prompts_per_shard=100,
        )
        run = Run.open(
            tmp_path / f"{ties}_{better_by}",
            config={"seed": 0},
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
