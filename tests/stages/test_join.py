"""Pairs of several judges in one table: every row under its own condition, held-out ones together and apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_lab.console import Console
from rlhf_lab.data.tables import read_table, write_table
from rlhf_lab.run import Run
from rlhf_lab.stages.join import Join
from rlhf_lab.tracking import NoTracker

Tables = Callable[..., str]


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    """`tables(name, train=rows, …)` is a folder of tables by split."""

    def make(name: str, **splits: list[dict[str, Any]]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for split, rows in splits.items():
            write_table(rows, folder / f"{split}.parquet")
        return str(folder)

    return make


def joined(tmp_path: Path, stage: Join) -> dict[str, list[dict[str, Any]]]:
    stage.check()
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
    return {file.stem: read_table(file) for file in (run.directory / "data").iterdir()}


def pair(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": f"{prompt} yes", "rejected": "no", **more}


def test_rows_stand_together_under_their_conditions_and_held_out_ones_apart_too(tmp_path: Path, tables: Tables):
    kind = tables("kind", train=[pair("a"), pair("b")], test=[pair("c")])
    funny = tables("funny", train=[pair("a", extra=1)], test=[pair("d", extra=2)])
    found = joined(
        tmp_path,
        Join(
            sources={"kind": kind, "funny": funny},
            conditions={"kind": "be kind", "funny": "<funny>"},
            train_split="train",
        ),
    )
    assert found["train"] == [
        pair("a", condition="be kind"),
        pair("b", condition="be kind"),
        pair("a", condition="<funny>"),
    ]
    assert found["test"] == [pair("c", condition="be kind"), pair("d", condition="<funny>")]
    assert found["test_kind"] == [pair("c", condition="be kind")]
    assert found["test_funny"] == [pair("d", extra=2, condition="<funny>")]
    assert found.keys() == {"train", "test", "test_kind", "test_funny"}


def test_tables_that_do_not_match_are_refused(tmp_path: Path, tables: Tables):
    kind, funny = tables("kind", train=[pair("a")], test=[pair("c")]), tables("funny", train=[pair("a")])
    conditions = {"kind": "k", "funny": "f"}
    stage = Join(sources={"kind": kind, "funny": funny}, conditions=conditions, train_split="train")
    with pytest.raises(ValueError, match=r"funny has the splits \['train'\]; expected \['test', 'train'\]"):
        joined(tmp_path, stage)
    with pytest.raises(ValueError, match="no such file or folder"):
        Join(sources={"kind": str(tmp_path / "gone")}, conditions={"kind": "k"}, train_split="train").check()
    Join(sources={"kind": "/gone"}, conditions={"kind": "k"}, train_split="train").check(promised=["/gone"])


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"kind": "k"}, "each table needs both"),
        ({"kind": "k", "funny": "k"}, "must differ"),
        ({"kind": "k", "funny": " "}, "say"),
    ],
)
def test_conditions_that_do_not_tell_the_tables_apart_are_refused(conditions: dict[str, str], said: str):
    with pytest.raises(ValueError, match=said):
        Join(sources={"kind": "a", "funny": "b"}, conditions=conditions, train_split="train")
