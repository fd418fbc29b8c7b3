"""What a run read of its data and what it left out, as tables of its page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DataRow:
    """One split, read for one kind of record; cells are written out, "" for what does not apply."""

    split: str
    reads: str
    total: str
    dropped: Sequence[str]
    kept: str
    prompts: str
    prompt_tokens: str
    response_tokens: str
    labels: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """One data set of the run, by split."""

    name: str
    path: str
    rows: Sequence[DataRow]


def data_tables(run_dir: Path) -> Sequence[DataTable]:
    """The tables of `data.json`; none if the run left none.

    Raises:
        ValueError: the file is not what its name says.
    """
    path = run_dir / "data.json"
    if not path.is_file():
        return ()
    try:
        found = json.loads(path.read_text())["datasets"]
        return [
            DataTable(name=each["name"], path=each["path"], rows=[_row(split) for split in each["splits"]])
            for each in found
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no account of data ({error!r}); remove it, and draw the report again") from error


def _row(split: Mapping[str, Any]) -> DataRow:
    labels = [f"{what}: {100 * share:.0f} %" for what, share in split["labels"].items()]
    if (flipped := split["flipped"]) is not None:
        labels.append(f"wrong on purpose: {len(flipped):,}")
    return DataRow(
        split=split["split"],
        reads=split["reads"].replace("_", " "),
        total=f"{split['total']:,}",
        dropped=[f"{count:,} {reason}" for reason, count in split["dropped"].items()],
        kept=f"{split['kept']:,}",
        prompts=f"{split['prompts']:,}",
        prompt_tokens=_lengths(split["prompt_tokens"]),
        response_tokens=_lengths(split["response_tokens"]),
        labels=labels,
    )


def _lengths(lengths: Mapping[str, float] | None) -> str:
    if lengths is None:
        return ""
    return " · ".join(f"{lengths[key]:,.4g}" for key in ("min", "median", "p95", "max"))
