"""The columns of the generation table, and how it is written: in bounded memory, whole or not at all.

run, step                             whose policy it is; one table holds one policy
split, condition, prompt_id, prompt   what was asked: a text or a conversation, and what was told beside it
sample                                0, 1, ... of one prompt, whose rows stand side by side
response, finished, finish_reason     the text, and why it ended: "stop" by itself, "length" at the limit
tokens, logprob                       how many, and their log-probability as they were drawn, nats
kl_k1, kl_k2, kl_k3                   estimates against the reference, summed over the response's tokens, nats
score_<reward>                        of a source, raw: of an ensemble the aggregate
members_<reward>                      what each of its members said; [score] if it is no ensemble
variances_<reward>                    how sure each member was, if they say so
objective                             what the best is best by
gold_<name>                           the truth
text_<name>                           of the words alone: refusal, rouge_1, …; null where it does not apply
verdict_<criterion>                   against a named opponent: 1 won, .5 tied, 0 lost, null if not judged
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from rlhf_lab.data.tables import prompt_of
from rlhf_lab.records import Message

FILE = "generations.parquet"
ROWS_PER_GROUP = 8192  # held at once, by writers and readers: a few dozen MB at 2000 characters a response
NEEDED = ("split", "condition", "prompt_id", "prompt", "sample", "response")
METADATA = b"rlhf_lab.generations"  # the key of what was said of all rows

_NAMED: Mapping[str, pa.DataType] = {
    "run": pa.string(),
    "step": pa.int64(),
    "split": pa.string(),
    "condition": pa.string(),
    "prompt_id": pa.string(),
    "prompt": pa.string(),
    "sample": pa.int64(),
    "response": pa.string(),
    "finished": pa.bool_(),
    "finish_reason": pa.string(),
    "tokens": pa.int64(),
    "logprob": pa.float64(),
    "kl_k1": pa.float64(),
    "kl_k2": pa.float64(),
    "kl_k3": pa.float64(),
    "objective": pa.float64(),
}
_NUMBERS = ("score_", "gold_", "text_", "verdict_")  # a number for each response
_LISTS = ("members_", "variances_")  # a number for each member
_CONVERSATION = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

Row = Mapping[str, Any]


def write(path: Path, rows: Iterable[Row], metadata: Mapping[str, Any]) -> None:
    """Write a table, whole or not at all, holding a row group of it at a time.

    Args:
        rows: of equal columns; those of one prompt side by side, numbered from 0 by `sample`.
        metadata: what holds for every row: sampling, units of the scores; anything that JSON can say.

    Raises:
        ValueError: there are no rows, or one does not belong: its columns, their types, its place, or whose it is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _Writing(path, temporary).all(iter(rows), metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Writing:
    """One table on its way to the disk: what its rows so far have in common."""

    def __init__(self, path: Path, temporary: Path) -> None:
        self.path, self.temporary = path, temporary
        self.written = 0
        self.seen: set[tuple[Any, ...]] = set()
        self.last: tuple[Any, ...] = ()
        self.samples = 0
        self.whose: tuple[Any, Any] = ("", 0)

    def all(self, rows: Iterator[Row], metadata: Mapping[str, Any]) -> None:
        block = list(islice(rows, ROWS_PER_GROUP))
        if not block:
            raise ValueError(f"{self.path}: there is no response to write; a generation table needs at least one")
        self.whose = (block[0].get("run"), block[0].get("step"))
        schema = self._schema(block)
        noted = schema.with_metadata({METADATA: json.dumps(dict(metadata)).encode()})
        writer = parquet.ParquetWriter(self.temporary, noted, compression="zstd")
        try:
            while block:
                if schema.field("prompt").type == pa.string() and any(not isinstance(r["prompt"], str) for r in block):
                    writer.close()
                    schema = schema.set(schema.get_field_index("prompt"), pa.field("prompt", _CONVERSATION))
                    noted = schema.with_metadata(noted.metadata)
                    writer = self._again(noted)
                writer.write_table(self._group(block, schema).cast(noted))
                self.written += len(block)
                block = list(islice(rows, ROWS_PER_GROUP))
        finally:
            writer.close()

    def _again(self, schema: pa.Schema) -> parquet.ParquetWriter:
        """A writer that has written the rows so far once more, their prompts as conversations: one was met."""
        before = self.temporary.with_suffix(".before.tmp")
        os.replace(self.temporary, before)
        writer = parquet.ParquetWriter(self.temporary, schema, compression="zstd")
        try:
            for group in row_groups(parquet.ParquetFile(before), None):
                told = pa.array([_messages(text) for text in group["prompt"].to_pylist()], _CONVERSATION)
                writer.write_table(group.set_column(schema.get_field_index("prompt"), "prompt", told).cast(schema))
        finally:
            before.unlink()
        return writer

    def _schema(self, block: Sequence[Row]) -> pa.Schema:
        if missing := [name for name in NEEDED if name not in block[0]]:
            raise ValueError(f"{self.path}: row 0 has no {missing}; it has {sorted(block[0])}")
        fields = []
        for name in block[0]:
            kind = _NAMED.get(name)
            kind = pa.float64() if kind is None and name.startswith(_NUMBERS) else kind
            kind = pa.list_(pa.float64()) if kind is None and name.startswith(_LISTS) else kind
            if kind is None:
                prefixes = ", ".join(f"{prefix}<name>" for prefix in (*_NUMBERS, *_LISTS))
                raise ValueError(
                    f"{self.path}: a generation table has no column {name!r}; expected {', '.join(_NAMED)}, {prefixes}"
                )
            fields.append(pa.field(name, kind))
        return pa.schema(fields)

    def _group(self, block: Sequence[Row], schema: pa.Schema) -> pa.Table:
        names = set(schema.names)
        for i, row in enumerate(block, start=self.written):
            self._place(i, row, names)
        columns = []
        for field in schema:
            values = [row[field.name] for row in block]
            if field.type == _CONVERSATION:
                values = [_messages(value) for value in values]
            try:
                columns.append(pa.array(values, field.type))
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                i = next(i for i, value in enumerate(values) if not _fits(value, field.type))
                raise ValueError(
                    f"{self.path}: row {self.written + i} has {field.name}={values[i]!r}, which is no {field.type}"
                ) from error
        return pa.table(columns, schema=schema)

    def _place(self, i: int, row: Row, names: set[str]) -> None:
        """Refuse a row that stands in the wrong place, or in the wrong table."""
        if row.keys() != names:
            other = sorted(row.keys() ^ names)
            raise ValueError(f"{self.path}: row {i} and those before it do not both have the columns {other}")
        if (row.get("run"), row.get("step")) != self.whose:
            raise ValueError(
                f"{self.path}: row {i} is of run {row.get('run')!r} at step {row.get('step')}, those before of "
                f"{self.whose[0]!r} at step {self.whose[1]}; write a table for each policy"
            )
        key = (row["split"], row["condition"], row["prompt_id"])
        if key == self.last:
            self.samples += 1
        elif key in self.seen:
            raise ValueError(f"{self.path}: row {i}: prompt {key[2]} of {key[0]} came before, with others between")
        else:
            self.seen.add(key)
            self.last, self.samples = key, 0
        if row["sample"] != self.samples:
            raise ValueError(
                f"{self.path}: row {i} is sample {row['sample']} of prompt {key[2]}; expected {self.samples}: the "
                "samples of a prompt stand side by side, numbered from 0"
            )


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return True


def _messages(written: Any) -> list[Message]:
    return list(prompt_of(written).messages)


def row_groups(file: parquet.ParquetFile, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """The row groups of a file, one at a time; null for all columns."""
    for i in range(file.num_row_groups):
        yield file.read_row_group(i, columns=None if columns is None else list(columns), use_threads=False)
