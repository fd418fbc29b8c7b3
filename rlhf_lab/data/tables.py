"""Local files, folders and hub data sets -> rows with known columns; what is missing or bad is said before any work."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import csv, ipc, parquet

from rlhf_lab.data.hub import COMPRESSED, Named, files_of, from_hub, unpacked
from rlhf_lab.records import Message, Prompt

BadRows = Literal["error", "drop"]
Rows = list[dict[str, Any]]

# names of columns that hold texts, and numbers only by their look
TEXTS = (
    "prompt",
    "response",
    "chosen",
    "rejected",
    "response_0",
    "response_1",
    "condition",
    *(f"{side}_{name}" for side in ("strong", "weak") for name in ("prompt", "chosen", "rejected", "condition")),
)
# what `datasets.save_to_disk` writes beside the rows
_DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "state.json")


def _read_jsonl(file: Path) -> Rows:
    rows: Rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object of columns, but {line[:40]}")
        rows.append(row)
    return rows


def _read_json(file: Path) -> Rows:
    """One list of objects; or, as many do, JSON lines under this name."""
    if not (text := file.read_text(encoding="utf-8")).lstrip().startswith("["):
        return _read_jsonl(file)
    rows = json.loads(text)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is not a list of objects")
    return rows


def _read_arrow(file: Path) -> Rows:
    """The stream that `datasets` writes, or Arrow's file format."""
    with pa.memory_map(str(file)) as source:
        try:
            return ipc.open_stream(source).read_all().to_pylist()
        except pa.ArrowInvalid:
            return ipc.open_file(source).read_all().to_pylist()


def _read_csv(file: Path, texts: Collection[str] = TEXTS) -> Rows:
    """Types are guessed but for `texts`, which stay as they are written: 007, 1.50, NA."""
    convert = csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()))
    return csv.read_csv(file, parse_options=_CSV, convert_options=convert).to_pylist()


_CSV = csv.ParseOptions(newlines_in_values=True)
_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": lambda file: parquet.read_table(file).to_pylist(),
    ".arrow": _read_arrow,
}
SUFFIXES = tuple(_READERS)


def read_table(file: Path, texts: Collection[str] = TEXTS) -> Rows:
    """The rows of a file of a kind that its name says; an empty file has none.

    Args:
        texts: columns of texts, which a csv file does not tell from numbers.

    Raises:
        ValueError: it cannot be read as what its name says.
    """
    if file.stat().st_size == 0:
        return []
    if file.suffix in COMPRESSED:
        with unpacked(file) as plain:
            try:
                return read_table(plain, texts)
            except ValueError as error:
                raise ValueError(str(error).replace(str(plain), str(file))) from error
    try:
        return _read_csv(file, texts) if file.suffix == ".csv" else _READERS[file.suffix](file)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read as {file.suffix}: {str(error).splitlines()[0]}") from error


def write_table(rows: Rows, file: Path) -> None:
    """Write rows as a parquet file, with every column that any of them has, empty in the others.

    A column has one type: prompts of which some are texts and some conversations are all written as conversations.
    """
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    for name, values in columns.items():
        if {type(value) for value in values} >= {str, list}:
            columns[name] = [_conversation(value) for value in values]
    parquet.write_table(pa.table(columns), file)


def _conversation(prompt: Any) -> list[Message] | None:
    return None if prompt is None else list(prompt_of(prompt).messages)


def join_tables(parts: Sequence[Path], file: Path) -> None:
    """Write the rows of several parquet files of equal columns as one, holding one of them at a time.

    A column of texts in some and of conversations in others becomes one of conversations.
    """
    kinds = {(field.name, pa.types.is_list(field.type)) for part in parts for field in parquet.read_schema(part)}
    mixed = {name for name, is_list in kinds if (name, not is_list) in kinds}

    def alike(part: Path) -> pa.Table:
        table = parquet.read_table(part)
        for name in mixed:
            told = pa.array([_conversation(value) for value in table[name].to_pylist()])
            table = table.set_column(table.schema.get_field_index(name), name, told)
        return table

    with parquet.ParquetWriter(file, alike(parts[0]).schema) as writer:
        for part in parts:
            writer.write_table(alike(part))


def check_table(path: str) -> None:
    """Refuse a data path that is not there, before anything is loaded; a hub id (owner/name) is let pass.

    Raises:
        ValueError: naming the path and what is expected.
    """
    place = Path(path).expanduser()
    if place.is_file() and _plain(place).suffix not in SUFFIXES:
        raise ValueError(f"dataset.path={path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    if not place.exists() and (path.startswith(("/", ".", "~")) or place.suffix in SUFFIXES or path.count("/") != 1):
        raise ValueError(f"dataset.path={path}: no such file or folder; give one, or a hub id (owner/name)")
    if place.is_dir() and not _split_files(place):
        raise ValueError(f"dataset.path={path}: the folder holds no file of the kinds {', '.join(SUFFIXES)}")


def _plain(file: Path) -> Path:
    """A file's name without the end that says that it is compressed."""
    return file.with_suffix("") if file.suffix in COMPRESSED else file


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """split -> its files: `train.parquet`, `train-00000-of-00002.parquet`, or a folder `train/`.

    A folder that `save_to_disk` left holds splits as folders, or one data set, which is "train".
    """
    found: dict[str, list[Path]] = {}
    single = (folder / "state.json").exists()
    for file in sorted(folder.rglob("*")):
        if _plain(file).suffix in SUFFIXES and file.name not in _DESCRIPTIONS:
            split = _plain(file).stem.split("-")[0] if file.parent == folder else file.parent.name
            split = "train" if single else split
            found.setdefault(split, []).append(file)
    return found


def read_splits(
    path: str, revision: str | None, texts: Collection[str] = TEXTS, named: Named | None = None
) -> dict[str, Rows]:
    """split -> rows of a file, a folder of files named by split, or a hub data set.

    A file is one split: the only one that is named, or "train".

    Args:
        texts: columns of texts, see `read_table`.
        named: split -> patterns of its files in the folder or the hub data set; None for those that are named by split.

    Raises:
        ValueError: there is nothing to read, or a file cannot be read as what its name says.
    """
    check_table(path)
    place = Path(path).expanduser()
    if place.is_file():
        files = {next(iter(named)) if named is not None and len(named) == 1 else "train": [place]}
    elif place.is_dir():
        files = _split_files(place) if named is None else files_of(place, named)
    elif named is not None:
        return from_hub(path, revision, named)
    else:
        return _from_hub(path, revision)
    return {split: [row for part in parts for row in read_table(part, texts)] for split, parts in files.items()}


def _from_hub(path: str, revision: str | None) -> dict[str, Rows]:
    import datasets  # half a second, which local files need not pay
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(path, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"dataset.path={path}: no such file or folder here, and not from the hub: {reason}") from error
    return {str(split): [dict(row) for row in rows] for split, rows in loaded.items()}


def hold_out(rows: Rows, prompt_column: str, share: float) -> tuple[Rows, Rows]:
    """Split rows by a hash of their prompt: (the rest, about `share` of the prompts, at least one of several).

    A prompt is on one side only, and stays there when rows are added or their order changes.
    """
    places = [_place(row.get(prompt_column)) for row in rows]
    if len(set(places)) < 2:
        return rows, []
    border = max(share, min(places))
    held = [row for row, place in zip(rows, places, strict=True) if place <= border]
    kept = [row for row, place in zip(rows, places, strict=True) if place > border]
    return kept, held


def _place(prompt: Any) -> float:
    """A number in [0, 1) that a prompt has by its content."""
    digest = hashlib.sha256(f"hold out {prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


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
    """A string (one user turn), a list of strings (turns, the user's first), or a list of role/content messages.

    Raises:
        ValueError: it is none of these, or the user does not have the last word.
    """
    if isinstance(value, str):
        return Prompt.from_text(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"a prompt is {value!r}; expected a text, a list of texts, or a list of messages")
    roles = ("user", "assistant")
    turns: list[Message] = []
    for i, turn in enumerate(value):
        if isinstance(turn, str):
            turns.append(Message(role=roles[i % 2], content=turn))
        elif isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str):
            turns.append(Message(role=turn["role"], content=turn["content"]))
        else:
            raise ValueError(f"a turn of a conversation is {turn!r}; expected a text, or its role and its content")
    if not turns or turns[-1]["role"] != "user":
        raise ValueError(f"a conversation ends with {turns[-1]['role'] if turns else 'nothing'}; the user speaks last")
    return Prompt.from_messages(turns)


def apart(row: Mapping[str, Any], messages: str, prompt: str, response: str) -> dict[str, Any]:
    """A row whose conversation ends with the response, in the column `messages`, with both in columns of their own.

    Raises:
        ValueError: the assistant does not have the last word.
    """
    turns = row[messages]
    if not isinstance(turns, list | tuple) or len(turns) < 2:
        raise ValueError(f"{messages} is {turns!r}; expected a list of turns, the assistant's last")
    *before, last = turns
    spoken = isinstance(last, str) and len(turns) % 2 == 0  # texts alternate, and the user begins
    if not spoken and not (isinstance(last, Mapping) and last.get("role") == "assistant"):
        raise ValueError(f"{messages} ends with {last!r}; the assistant speaks last in what is to be imitated")
    return {**row, prompt: before, response: last if isinstance(last, str) else last["content"]}


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
            raise ValueError(f"{self.source}: {found}, of {total} rows; mend or drop them (dataset.bad_rows=drop)")
        if dropped == total:
            raise ValueError(f"{self.source}: no row is left of {total}: {found}")
        return f"{self.source}: dropped {dropped} of {total} rows: {found}"
