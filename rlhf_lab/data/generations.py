"""The generation table: every response of a policy with all that was measured on it, one row each, as parquet.

Best of n, diversity, over-optimisation, win rates and plots read it, whoever sampled the responses. Its columns are
described where it is written, `generation_writer.py`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from rlhf_lab.data.generation_writer import FILE, METADATA, NEEDED, row_groups, write
from rlhf_lab.data.tables import prompt_of
from rlhf_lab.records import Prompt
from rlhf_lab.status import read_status

__all__ = ["FILE", "SUFFIX", "Generations", "find", "write"]

SUFFIX = ".parquet"


def find(path: str | Path) -> Path:
    """The table that `path` names: the file itself, or that of the finished run whose folder or output it is.

    Raises:
        ValueError: there is none, or the run has not finished.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if not place.exists():
        raise ValueError(f"generations={path}: no such file or folder; name a {FILE}, or a run that sampled responses")
    run = next((folder for folder in (place, place.parent) if (folder / "status.json").is_file()), None)
    if run is not None and (state := read_status(run).get("state")) != "finished":
        raise ValueError(f"generations={path}: the run is {state}, not finished; start it again, it goes on")
    for folder in (place, place / "data", *(() if run in (None, place) else (run, run / "data"))):
        if (folder / FILE).is_file():
            return folder / FILE
    held = sorted(entry.name for entry in place.iterdir() if not entry.name.startswith("."))
    raise ValueError(
        f"generations={path} holds no {FILE}, but {held}; stage=evaluate, best_of_n and training runs with held-out "
        "prompts leave one"
    )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is no whole parquet file ({str(error).splitlines()[0]}); make it again")


class Generations:
    """A generation table on the disk, read by column or in order, never whole.

    A number of every row of a split may be held at once, 8 bytes each; texts are streamed.

    Fields:
        path: of the file.
        columns, num_rows: what it has.
        metadata: what was said of all rows when it was written.
    """

    def __init__(self, path: Path, file: parquet.ParquetFile) -> None:
        self.path, self._file = path, file
        self.columns: tuple[str, ...] = tuple(file.schema_arrow.names)
        self.num_rows: int = file.metadata.num_rows
        self.metadata: dict[str, Any] = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"{}"))
        self._starts: dict[str, NDArray[np.int64]] = {}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Look at a table, or at that of a finished run; see `find`.

        Raises:
            ValueError: there is none, it is damaged, or it lacks a column that every such table has.
        """
        place = find(path)
        try:
            table = cls(place, parquet.ParquetFile(place))
        except (pa.ArrowException, OSError) as error:
            raise _damaged(place, error) from error
        if missing := [name for name in NEEDED if name not in table.columns]:
            raise ValueError(f"{place} has the columns {list(table.columns)}; a generation table needs {missing} too")
        if not table.num_rows:
            raise ValueError(f"{place} has no rows; a generation table needs at least one")
        return table

    def _named(self, prefix: str) -> tuple[str, ...]:
        return tuple(name.removeprefix(prefix) for name in self.columns if name.startswith(prefix))

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the sources that scored the responses."""
        return self._named("score_")

    @property
    def gold(self) -> tuple[str, ...]:
        """Names of the true scores."""
        return self._named("gold_")

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Criteria by which a judge compared the responses."""
        return self._named("verdict_")

    @property
    def splits(self) -> tuple[str, ...]:
        """In the order in which they begin."""
        found: dict[str, None] = {}
        for group in self._groups(["split"]):
            found |= dict.fromkeys(group["split"].unique().to_pylist())
        return tuple(found)

    def _groups(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        try:
            yield from row_groups(self._file, columns)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path, error) from error

    def _parts(self, split: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of a split, a row group at a time.

        Raises:
            ValueError: the table has no such column or split.
        """
        if missing := [name for name in columns if name not in self.columns]:
            raise ValueError(f"{self.path} has no column {missing[0]!r}; it has {list(self.columns)}")
        is_there = False
        for group in self._groups(list(dict.fromkeys(["split", *columns]))):
            part = group.filter(pa.array(group["split"].to_numpy() == split))
            if part.num_rows:
                is_there = True
                yield part.select(list(columns))
        if not is_there:
            raise ValueError(f"{self.path} has no split {split!r}; it has {list(self.splits)}")

    def rows(self, split: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows of a split, one by one."""
        for part in self._parts(split, columns):
            yield from part.to_pylist()

    def keys(self, split: str) -> list[tuple[str, str]]:
        """(prompt_id, condition) of every prompt, in order: what tables of several policies are joined by."""
        starts = self.starts(split)[:-1]
        found: list[tuple[str, str]] = []
        done = 0
        for part in self._parts(split, ["prompt_id", "condition"]):
            here = starts[(starts >= done) & (starts < done + part.num_rows)] - done
            taken = part.take(pa.array(here))
            found += zip(taken["prompt_id"].to_pylist(), taken["condition"].to_pylist(), strict=True)
            done += part.num_rows
        return found

    def starts(self, split: str) -> NDArray[np.int64]:
        """(P + 1,) at which row of the split each prompt begins, and the number of its rows.

        Raises:
            ValueError: the rows of a prompt are not side by side, or not numbered from 0.
        """
        if split not in self._starts:
            parts = list(self._parts(split, ["condition", "prompt_id", "sample"]))
            table = pa.concat_tables(parts)
            ids, told = (table[name].combine_chunks().dictionary_encode() for name in ("prompt_id", "condition"))
            codes = ids.indices.to_numpy() * len(told.dictionary) + told.indices.to_numpy()
            begins = np.flatnonzero(np.diff(codes, prepend=-1))
            starts = np.append(begins, len(codes)).astype(np.int64)
            _, firsts = np.unique(codes[begins], return_index=True)
            if len(again := np.setdiff1d(np.arange(len(begins)), firsts)):
                row = int(begins[again[0]])
                raise ValueError(
                    f"{self.path}, row {row} of {split}: prompt {table['prompt_id'][row]} came before, with others "
                    "between; sort the table by prompt_id, condition and sample"
                )
            expected = np.arange(len(codes)) - np.repeat(begins, np.diff(starts))
            if len(wrong := np.flatnonzero(table["sample"].to_numpy() != expected)):
                row = int(wrong[0])
                raise ValueError(
                    f"{self.path}, row {row} of {split} is sample {table['sample'][row]}; expected {expected[row]}: "
                    "the samples of a prompt stand side by side, numbered from 0, each once"
                )
            self._starts[split] = starts
        return self._starts[split]

    def column(self, name: str, split: str) -> NDArray[Any]:
        """(rows,) of one column in order; NaN where a number is null."""
        parts = [part[name].to_numpy(zero_copy_only=False) for part in self._parts(split, [name])]
        return np.concatenate(parts)

    def texts(self, split: str) -> Iterator[tuple[Prompt, list[str]]]:
        """Each prompt, with its condition, and its responses."""
        ends = iter(self.starts(split)[1:].tolist())
        responses: list[str] = []
        end = next(ends)
        for done, row in enumerate(self.rows(split, ["prompt_id", "prompt", "condition", "response"]), start=1):
            responses.append(row["response"])
            if done == end:
                asked = replace(prompt_of(row["prompt"]), id=row["prompt_id"], condition=row["condition"])
                yield asked, responses
                responses, end = [], next(ends, 0)

    def num_samples(self, split: str) -> int:
        """N, of every prompt.

        Raises:
            ValueError: prompts have different numbers of samples.
        """
        starts = self.starts(split)
        counts = np.diff(starts)
        if len(odd := np.flatnonzero(counts != counts[0])):
            raise ValueError(
                f"{self.path}: the first prompt of {split} has {counts[0]} samples, prompt {odd[0]} (row "
                f"{starts[odd[0]]}) has {counts[odd[0]]}; sample as many of each, stage.samples_per_prompt"
            )
        return int(counts[0])

    def matrix(self, name: str, split: str) -> NDArray[np.float64]:
        """(P, N) float64 of one column: row p is the prompt `keys(split)[p]`, column j its sample j.

        Raises:
            ValueError: prompts have different numbers of samples, or a value is missing or not finite; verdicts may
                be missing, which is NaN.
        """
        return self._whole(name, split)

    def members(self, reward: str, split: str, of: str = "members") -> NDArray[np.float64]:
        """(P, N, M) float64: what each member said of each response; with `of="variances"` how sure it was.

        Raises:
            ValueError: as `matrix`, or rows have different numbers of members.
        """
        return self._whole(f"{of}_{reward}", split)

    def _whole(self, name: str, split: str) -> NDArray[np.float64]:
        [block] = self.blocks(split, [name], len(self.starts(split)))
        return block[name]

    def blocks(self, split: str, names: Sequence[str], prompts: int) -> Iterator[dict[str, NDArray[np.float64]]]:
        """The same of several columns, of so many prompts at a time: column -> (p, N), or (p, N, M) of members.

        Raises:
            ValueError: as `matrix` and `members`.
        """
        per_prompt, first, widths = self.num_samples(split), 0, {}
        waiting = pa.table({})
        for part in self._parts(split, names):
            waiting = pa.concat_tables([waiting, part]) if waiting.num_rows else part
            while waiting.num_rows >= prompts * per_prompt:
                yield self._block(waiting.slice(0, prompts * per_prompt), split, first, per_prompt, widths)
                waiting, first = waiting.slice(prompts * per_prompt), first + prompts * per_prompt
        if waiting.num_rows:
            yield self._block(waiting, split, first, per_prompt, widths)

    def _block(
        self, table: pa.Table, split: str, first: int, per_prompt: int, widths: dict[str, int]
    ) -> dict[str, NDArray[np.float64]]:
        block = {}
        for name in table.column_names:
            column = table[name].combine_chunks()
            if pa.types.is_list(column.type):
                counts = column.value_lengths().fill_null(0).to_numpy()
                width = widths.setdefault(name, int(counts[0]))
                if len(odd := np.flatnonzero((counts != width) | (counts == 0))):
                    raise ValueError(
                        f"{self.path}, row {first + odd[0]} of {split}: {name} has {counts[odd[0]]} values, the first "
                        f"row {width}; every response is scored by the same members"
                    )
                values = np.array(column.flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)
            else:
                values = column.to_numpy(zero_copy_only=False).astype(np.float64)
            holes = np.unique(np.nonzero(~np.isfinite(values))[0])
            if len(holes) and not name.startswith("verdict_"):
                raise ValueError(
                    f"{self.path}: {name} is {values[holes[0]]} in row {first + holes[0]} of {split}, and missing or "
                    f"not finite in {len(holes)} of {len(values)} rows; score these responses again, or leave their "
                    "prompts out"
                )
            block[name] = values.reshape(-1, per_prompt, *values.shape[1:])
        return block
