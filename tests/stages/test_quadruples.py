"""Pairs with margins become pairs of pairs, each still under its own condition, in tables that are told apart."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_lab.console import Console
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.tables import write_table
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.tiny import tiny_tokenizer
from rlhf_lab.run import Run
from rlhf_lab.stages.quadruples import Quadruples
from rlhf_lab.tracking import NoTracker

PAIRS = [
    {"prompt": "how do i mix", "condition": "please", "margin": 3.0},
    {"prompt": ["hello", "thanks", "how do i mix"], "condition": "first", "margin": 2.0},
    {"prompt": "how do i mix", "condition": None, "margin": 1.0},
]


def quadruples(folder: Path, splits: list[str], train_split: str) -> Quadruples:
    """The stage on a folder of tables of these splits, all alike."""
    folder.mkdir()
    for split in splits:
        write_table(
            [{"chosen": "the bread", "rejected": "the egg", **pair} for pair in PAIRS], folder / f"{split}.parquet"
        )
    return Quadruples(
        model=ModelPaths(
            **dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={}
        ),
        dataset=table(folder, train_split=train_split),
        hardware=Hardware(device="cpu", dtype="float32", threads=1),
        sampling="iterative",
        partners=2,
        strength_noise=0.0,
    )


def table(folder: Path, **settings: Any) -> Dataset:
    defaults: dict[str, Any] = {
        "revision": None,
        "columns": {},
        "template": "auto",
        "max_prompt_tokens": 64,
        "max_response_tokens": 64,
        "bad_rows": "error",
        "on_conflict": "keep",
        "train_size": None,
        "train_split": "train",
        "eval_splits": None,
        "eval_size": 256,
        "hold_out": 0.0,
        "seed": 0,
    }
    return Dataset(**{**defaults, "path": str(folder), **settings})


def carry_out(directory: Path, stage: Quadruples) -> None:
    run = Run.open(
        directory,
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


def test_each_pair_of_a_quadruple_keeps_its_prompt_and_its_condition(tmp_path: Path):
    stage = quadruples(tmp_path / "pairs", ["train"], "train")
    pairs = stage.dataset.preferences("train", Template(tiny_tokenizer(), "auto"))
    carry_out(tmp_path / "run", stage)
    read = table(tmp_path / "run/data").quadruples("train", Template(tiny_tokenizer(), "auto"))
    expected = [(pairs[strong].prompt, pairs[weak].prompt) for strong, weak in ((0, 1), (0, 2), (1, 2))]
    found = [(quadruple.strong.prompt, quadruple.weak.prompt) for quadruple in read]
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert {prompt.condition for couple in found for prompt in couple} == {"please", "first", ""}


def test_a_held_out_split_is_not_written_over_the_training_one(tmp_path: Path):
    carry_out(tmp_path / "run", quadruples(tmp_path / "pairs", ["kind", "test"], "kind"))
    assert {file.name for file in (tmp_path / "run/data").iterdir()} == {"train.parquet", "test.parquet"}
    stage = quadruples(tmp_path / "clash", ["kind", "train"], "kind")
    with pytest.raises(ValueError, match=r"training split 'kind' of .* is called 'train', but so is a held-out split"):
        carry_out(tmp_path / "other", stage)
    stage.dataset.eval_splits = ("train",)
    with pytest.raises(ValueError, match="so is a held-out split"):
        stage.check()
