"""One file of rows of any kind that we read; what is broken is named by file, line or row, and remedy."""

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import csv, ipc, parquet

from rlhf_lab.data.hub import COMPRESSED, unpacked

Rows = list[dict[str, Any]]

# bytes of one line: a row of a megabyte is a long book, one of sixteen is a file that lost its line ends
LONGEST_LINE = 16 * 2**20
AS_UTF8 = "write the file as UTF-8, for instance with: iconv -f latin1 -t utf-8"

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


def _lines(file: BinaryIO, longest: int) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end); holds one line at a time."""
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        if len(line) > longest:
            raise ValueError(
                f"line {number} is longer than {longest:,} bytes, so it is hardly one row; write one row on each line, "
                "or a JSON list as .json, or the table as parquet"
            )
        yield number, line


def _text_of(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"line {number} is not UTF-8 (byte {error.start}: 0x{line[error.start]:02x}); {AS_UTF8}"
        ) from error


def _read_lines(file: BinaryIO, longest: int) -> Rows:
    rows: Rows = []
    for number, line in _lines(file, longest):
        if not line.strip():
            continue
        text = _text_of(line, number)
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            if not line.endswith(b"\n"):
                raise ValueError(
                    f"line {number} is not JSON and has no end, so the file is half written: write it again, or remove "
                    "that line"
                ) from error
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
            raise ValueError(f"line {number} is not JSON ({reason}); mend or remove it") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object of columns, but {text[:40].rstrip()}")
        rows.append(row)
    return rows


def _read_jsonl(file: Path, texts: Collection[str], longest: int) -> Rows:
    with file.open("rb") as source:
        return _read_lines(source, longest)


def _read_json(file: Path, texts: Collection[str], longest: int) -> Rows:
    """One list of objects; or, as many do, JSON lines under this name."""
    with file.open("rb") as source:
        head = source.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head and not head.startswith(b"["):
        return _read_jsonl(file, texts, longest)
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; {AS_UTF8}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is no JSON list, or a half-written one ({error}); write it again") from error
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"it is not a list of objects: row {i} is {str(row)[:40]}")
    return rows


def _read_csv(file: Path, texts: Collection[str], longest: int) -> Rows:
    """Types are guessed but for `texts`, which stay as they are written: 007, 1.50, NA."""
    try:
        table = csv.read_csv(
            file,
            # one thread, for several do not say in which row a fault is
            read_options=csv.ReadOptions(use_threads=False, block_size=longest),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
        )
    except pa.ArrowInvalid as error:
        if "straddling" in str(error):
            raise ValueError(
                f"a row is longer than {longest:,} bytes, or a quotation mark is not closed; look for a lone '\"'"
            ) from error
        remedy = AS_UTF8 if "invalid UTF8" in str(error) else "mend that row, or quote the texts"
        raise ValueError(f"{str(error).splitlines()[0][:200]}; {remedy}") from error
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"its columns {twice} are there twice; name each column differently")
    return _rows(table)


def _read_parquet(file: Path, texts: Collection[str], longest: int) -> Rows:
    return _rows(parquet.read_table(file))


def _read_arrow(file: Path, texts: Collection[str], longest: int) -> Rows:
    """The stream that `datasets` writes, or Arrow's file format."""
    with pa.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        return _rows(ipc.open_file(source).read_all() if is_file else ipc.open_stream(source).read_all())


def _rows(table: pa.Table) -> Rows:
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        for name in table.column_names:
            for i, value in enumerate(table[name]):
                try:
                    value.as_py()
                except UnicodeDecodeError:
                    raise ValueError(f"row {i}: {name} is not UTF-8; write it again from valid text") from error
        raise


_READERS: dict[str, Callable[[Path, Collection[str], int], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
SUFFIXES = tuple(_READERS)


def kind_of(file: Path) -> str:
    """What a file is by its name, compressed or not: one of `SUFFIXES`, "" if it is none that is read."""
    plain = file.with_suffix("") if file.suffix in COMPRESSED else file
    return plain.suffix if plain.suffix in SUFFIXES else ""


def read_table(file: Path, texts: Collection[str] = TEXTS, longest: int = LONGEST_LINE) -> Rows:
    """The rows of a file of a kind that its name says; an empty file has none.

    Args:
        texts: columns of texts, which a csv file does not tell from numbers.
        longest: bytes of a line of a jsonl or csv file; a longer one is refused before it is read.

    Raises:
        ValueError: it cannot be read as what its name says; names the file, the line or row, and what to do.
    """
    if file.stat().st_size == 0:
        return []
    if file.suffix in COMPRESSED:
        with unpacked(file) as plain:
            try:
                return read_table(plain, texts, longest)
            except ValueError as error:
                raise ValueError(str(error).replace(str(plain), str(file))) from error
    kind = kind_of(file)
    if not kind:
        raise ValueError(f"{file}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    try:
        return _READERS[kind](file, texts, longest)
    except (ValueError, OSError, pa.ArrowException) as error:
        # parquet and arrow say what they miss, but not that this is what a writer leaves that was killed
        remedy = "; it is half written or something else: write it again" if kind in (".parquet", ".arrow") else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read as {kind}: {reason}{remedy}") from error
