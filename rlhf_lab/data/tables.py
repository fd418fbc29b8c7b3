"""Local files, folders and hub data sets -> rows with known columns; what is missing or bad is said before any work."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets

from rlhf_lab.records import Message, Prompt

datasets.disable_progress_bars()

SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
BadRows = Literal["error", "drop"]
Rows = list[dict[str, Any]]


def check_table(path: str) -> None:
    """Refuse a data path that is not there, before anything is loaded; a hub id (owner/name) is let pass.

    Raises:
        ValueError: naming the path and what is expected.
    """
    place = Path(path).expanduser()
    if place.is_file() and place.suffix not in SUFFIXES:
        raise ValueError(f"dataset.path={path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    if not place.exists() and (path.startswith(("/", ".", "~")) or place.suffix in SUFFIXES or path.count("/") != 1):
        raise ValueError(f"dataset.path={path}: no such file or folder; give a file, a folder, or a hub id (owner/name)")
    if place.is_dir() and not _split_files(place):
        raise ValueError(f"dataset.path={path}: the folder holds no file of the kinds {', '.join(SUFFIXES)}")


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """split -> its files: `train.parquet`, `train-00000-of-00002.parquet`, or a folder `train/`."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in SUFFIXES:
            split = file.stem.split("-")[0] if file.parent == folder else file.parent.name
            found.setdefault(split, []).append(file)
    return found


def read_splits(path: str, revision: str | None) -> dict[str, Rows]:
    """split -> rows of a file (one split, "train"), a folder of files named by split, or a hub data set.

    Raises:
        ValueError: there is nothing to read, or a file cannot be read as what its name says.
    """
    check_table(path)
    place = Path(path).expanduser()
    if place.is_file():
        files = {"train": [place]}
    elif place.is_dir():
        files = _split_files(place)
    else:
        loaded = datasets.load_dataset(path, revision=revision, trust_remote_code=False)
        return {str(split): [dict(row) for row in rows] for split, rows in loaded.items()}
    try:
        return {split: _read(parts) for split, parts in files.items()}
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"dataset.path={path} cannot be read: {str(cause).splitlines()[0]}") from error


def _read(files: Sequence[Path]) -> Rows:
    rows: Rows = []
    for file in files:
        if file.stat().st_size == 0:
            continue
        kind = SUFFIXES[file.suffix]
        table = datasets.load_dataset(kind, data_files=str(file), split="train", keep_in_memory=True)
        rows += [dict(row) for row in table]
    return rows


def hold_out(rows: Rows, prompt_column: str, share: float) -> tuple[Rows, Rows]:
    """Split rows by a hash of their prompt: (the rest, about `share` of the prompts). A prompt is on one side only."""
    kept: Rows = []
    held: Rows = []
    for row in rows:
        digest = hashlib.sha256(f"hold out {row.get(prompt_column)}".encode()).digest()
        (held if int.from_bytes(digest[:4], "big") < share * 2**32 else kept).append(row)
    return kept, held


def need(rows: Rows, columns: Mapping[str, str], wanted: Sequence[str], source: str, purpose: str) -> None:
    """Refuse rows that lack a column.

    Args:
        columns: name here -> name in the data.

    Raises:
        ValueError: there are no rows, or a column is missing; says what is there and how to map it.
    """
    if not rows:
        raise ValueError(f"{source} is empty; {purpose} needs at least one row")
    for name in wanted:
        if columns.get(name, name) not in rows[0]:
            raise ValueError(
                f"{source} has the columns {sorted(rows[0])}, but {purpose} needs {columns.get(name, name)!r}; "
                f"say which one it is with dataset.columns.{name}=<column>"
            )


def prompt_of(value: Any) -> Prompt:
    """A string (one user turn), a list of strings (turns, the user's first), or a list of role/content messages."""
    if isinstance(value, str):
        return Prompt.from_text(value)
    roles = ("user", "assistant")
    return Prompt.from_messages(
        [
            Message(role=turn["role"], content=turn["content"])
            if isinstance(turn, Mapping)
            else Message(role=roles[i % 2], content=str(turn))
            for i, turn in enumerate(value)
        ]
    )


class RowFilter:
    """Finds bad rows and either refuses the data set or drops them and says how many, by reason."""

    def __init__(self, source: str, policy: BadRows) -> None:
        self.source, self.policy = source, policy
        self.reasons: dict[str, list[int]] = {}

    def reject(self, row: int, reason: str) -> None:
        """Row number `row` is bad."""
        self.reasons.setdefault(reason, []).append(row)

    def report(self, total: int) -> str:
        """What was dropped, or "" if nothing was.

        Raises:
            ValueError: rows are bad and the policy is to refuse, or nothing is left.
        """
        if not self.reasons:
            return ""
        found = "; ".join(f"{len(rows)} with {reason} (first: row {rows[0]})" for reason, rows in self.reasons.items())
        dropped = sum(map(len, self.reasons.values()))
        if self.policy == "error":
            raise ValueError(f"{self.source}: {found}, of {total} rows; mend them, or drop them with dataset.bad_rows=drop")
        if dropped == total:
            raise ValueError(f"{self.source}: no row is left of {total}: {found}")
        return f"{self.source}: dropped {dropped} of {total} rows: {found}"
