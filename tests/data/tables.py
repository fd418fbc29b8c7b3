"""Small data sets that tests write."""

import json
from pathlib import Path
from typing import Any

from rlhf_lab.data.dataset import Dataset

PLAIN: dict[str, Any] = {
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
    "eval_size": 10_000,
    "hold_out": 0.0,
    "seed": 0,
}

Row = dict[str, Any]


def written(folder: Path, splits: dict[str, list[Row]], **settings: Any) -> Dataset:
    """A data set of these rows, split -> rows."""
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(**{**PLAIN, "path": str(folder), **settings})


def numbered(n: int, tag: str = "prompt", **columns: str) -> list[Row]:
    """Rows whose texts hold their number."""
    return [{"prompt": f"{tag} {i}", **{name: text.format(i) for name, text in columns.items()}} for i in range(n)]
