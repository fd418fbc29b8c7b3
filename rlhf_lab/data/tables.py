"""Local files, folders and hub data sets -> rows with known columns; what is missing or bad is said before any work."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from rlhf_lab.data.hub import Named, files_of, from_hub
from rlhf_lab.data.readers import SUFFIXES, TEXTS, Rows, kind_of, read_table
from rlhf_lab.records import Message, Prompt

__all__ = ["SUFFIXES", "TEXTS", "Rows", "read_table"]

# what `datasets.save_to_disk` writes beside the rows
_DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "state.json")


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
    is_table = bool(kind_of(place))
    if place.is_file() and not is_table:
        raise ValueError(f"dataset.path={path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    if not place.exists() and (path.startswith(("/", ".", "~")) or is_table or path.count("/") != 1):
        raise ValueError(f"dataset.path={path}: no such file or folder; give one, or a hub id (owner/name)")
    if place.is_dir() and not _split_files(place):
        raise ValueError(f"dataset.path={path}: the folder holds no file of the kinds {', '.join(SUFFIXES)}")


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """split -> its files: `train.parquet`, `train-00000-of-00002.parquet`, or a folder `train/`.

    A folder that `save_to_disk` left holds splits as folders, or one data set, which is "train".

    Raises:
        ValueError: of the files that their names count, one is missing.
    """
    found: dict[str, list[Path]] = {}
    single = (folder / "state.json").exists()
    for file in sorted(folder.rglob("*")):
        if (kind := kind_of(file)) and file.name not in _DESCRIPTIONS:
            name = file.name[: file.name.rindex(kind)]
            split = name.split("-")[0] if file.parent == folder else file.parent.name
            found.setdefault("train" if single else split, []).append(file)
    for split, files in found.items():
        counted = [match for file in files if (match := re.search(r"-(\d+)-of-(\d+)\.", file.name))]
        there, total = {int(match[1]) for match in counted}, {int(match[2]) for match in counted}
        if len(total) == 1 and (missing := sorted(set(range(max(total))) - there)):
            raise ValueError(
                f"{folder} ({split}) has {len(there)} of {max(total)} files, number {missing[0]} is missing: it is "
                "half written or half copied; make or fetch it again"
            )
    return found


def read_files(
    path: str, revision: str | None, texts: Collection[str] = TEXTS, named: Named | None = None
) -> dict[str, list[tuple[str, Rows]]]:
    """split -> (name of a file, its rows), in order; see `read_splits`."""
    check_table(path)
    place = Path(path).expanduser()
    if place.is_file():
        files = {next(iter(named)) if named is not None and len(named) == 1 else "train": [place]}
    elif place.is_dir():
        files = _split_files(place) if named is None else files_of(place, named)
    else:
        read = _from_hub(path, revision) if named is None else from_hub(path, revision, named)
        return {split: [(path, rows)] for split, rows in read.items()}
    read = {split: [(part.name, read_table(part, texts)) for part in parts] for split, parts in files.items()}
    for split, parts in read.items():
        if len(parts) > 1 and (empty := [name for name, rows in parts if not rows]):
            raise ValueError(
                f"{path} ({split}): the file {empty[0]} of {len(parts)} is empty: it is half written; make it again, "
                "or remove it if it is to be left out"
            )
    return read


def read_splits(
    path: str, revision: str | None, texts: Collection[str] = TEXTS, named: Named | None = None
) -> dict[str, Rows]:
    """split -> rows of a file, a folder of files named by split, or a hub data set.

    A file is one split: the only one that is named, or "train".

    Args:
        texts: columns of texts, see `read_table`.
        named: split -> patterns of its files in the folder or the hub data set; None for those that are named by split.

    Raises:
        ValueError: there is nothing to read, or a file cannot be read as what its name says, or is missing.
    """
    read = read_files(path, revision, texts, named)
    return {split: [row for _, rows in parts for row in rows] for split, parts in read.items()}


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


def need(rows: Rows, columns: Mapping[str, str], wanted: Sequence[str], source: str, purpose: str) -> None:
    """Refuse rows that lack a column.

    Args:
        columns: name here -> name in the data.

    Raises:
        ValueError: there are no rows, or a column is missing in all of them; says what is there and how to map it. Rows
            that alone lack it are no fault here: their cell is empty.
    """
    if not rows:
        raise ValueError(f"{source} is empty; {purpose} needs at least one row")
    for name in wanted:
        if not any(columns.get(name, name) in row for row in rows):
            raise ValueError(
                f"{source} has the columns {sorted(set().union(*rows))}, but {purpose} needs "
                f"{columns.get(name, name)!r}; "
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
