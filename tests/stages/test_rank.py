"""Rankings by a judge: what is kept, in which order, and how much of it the noise turns."""

import json
from typing import Any

import pytest

from rlhf_lab.console import Console
from rlhf_lab.data.dataset import GOLD
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.records import Prompt
from rlhf_lab.run import Run
from rlhf_lab.stages.rank import Rank
from rlhf_lab.tracking import NoTracker


@pytest.fixture
def rank(world):
    """`rank(**settings)` is the stage."""

    def make(**settings: Any) -> Rank:
        defaults = {"samples_per_prompt": 4, "ranked_by": "helpfulness", "noise": 0.0, "prompts_per_shard": 8}
        return Rank(
            model=ModelPaths(
                **dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={}
            ),
            dataset=world(train_size=8, eval_splits=["test"], eval_size=8),
            sampling=Sampling(max_new_tokens=8, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=8),
            hardware=Hardware(device="cpu", dtype="float32", threads=1),
            **{**defaults, **settings},
        )

    return make


def test_responses_are_ordered_by_the_judge_and_of_those_that_tie_the_first_is_kept(rank):
    prompts = [Prompt.from_text("one"), Prompt.from_text("two")]
    responses = ["poor", "best", "good", "as good", " ", "only", "only", ""]
    rows = rank()._rows(prompts, responses, [-1.0, 3.0, 2.0, 2.0, 9.0, 1.0, 1.0, 5.0])
    assert [(row["prompt"], row["responses"], row["gold"]) for row in rows] == [
        ("one", ["best", "good", "poor"], [3.0, 2.0, -1.0]),
        ("two", ["only"], [1.0]),
    ]


def test_noise_exchanges_two_neighbours_in_exactly_its_share_of_the_rankings(rank):
    rows = [
        {"id": i, "responses": ["a", "b", "c"][: 2 + i % 2], "gold": [3.0, 2.0, 1.0][: 2 + i % 2]} for i in range(40)
    ]
    noisy = rank(noise=0.25)._noisy(rows, seed=0)
    turned = [row for row, before in zip(noisy, rows, strict=True) if row != before]
    assert len(turned) == 10
    for row in turned:
        assert row["responses"] in (["b", "a"], ["b", "a", "c"], ["a", "c", "b"])
        assert [{"a": 3.0, "b": 2.0, "c": 1.0}[response] for response in row["responses"]] == row["gold"]
    assert {tuple(row["responses"]) for row in turned} > {("b", "a")}
    assert all(row["responses"] == ["a", "b", "c"][: len(row["responses"])] for row in rows)  # as they were
    assert noisy == rank(noise=0.25)._noisy(rows, seed=0) != rank(noise=0.25)._noisy(rows, seed=1)


def test_what_the_data_set_has_to_say_is_said(rank, tmp_path, monkeypatch):
    monkeypatch.setitem(GOLD, "helpfulness", lambda request, response: float(len(response)))
    stage = rank()
    stage.dataset.notes.append("some rows were dropped")
    run = Run.open(
        tmp_path / "run",
        config={"seed": 0, "keep_checkpoints": 2},
        overrides=[],
        artifacts={},
        tracker=NoTracker(),
        console=Console(),
    )
    try:
        stage.run(run)
    finally:
        run.close()
    [line] = (tmp_path / "run/warnings.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 0, "message": "some rows were dropped"}


def test_what_cannot_rank_is_refused(rank):
    with pytest.raises(ValueError, match=r"stage.ranked_by=wit, but .* \['cost', 'helpfulness', 'humour'\]"):
        rank(ranked_by="wit").check()
    with pytest.raises(ValueError, match="samples_per_prompt=1; a ranking needs 2 or more"):
        rank(samples_per_prompt=1).check()
    rank().check()
    stage = rank()
    stage.dataset.train_split, stage.dataset.eval_splits = "sft", ("train",)
    with pytest.raises(ValueError, match="is called 'train', but so is a held-out split"):
        stage.check()
