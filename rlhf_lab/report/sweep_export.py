"""A sweep's numbers as tables for other programs: every logged line of every run, and one line a run."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from rlhf_lab.report.sweep_runs import ABSENT, Member, SweepRuns, as_number
from rlhf_lab.report.sweep_values import Values

KNOWN = ("run", "state", "step", "episode")


def export(values: Values) -> None:
    """Write metrics.parquet, metrics.csv and runs.csv into the sweep's directory, each at once.

    `metrics`: a line for each logged step of each run: run, state, every factor, every seed, step, episode, then a
    column for each metric, empty where a run did not log it. `runs`: a line for each run.
    """
    root = values.sweep.root
    metrics = metrics_table(values.sweep)
    write(root / "metrics.parquet", lambda file: parquet.write_table(metrics, file, compression="zstd"))
    write(root / "metrics.csv", lambda file: csv.write_csv(metrics, file))
    runs = runs_table(values)
    write(root / "runs.csv", lambda file: csv.write_csv(runs, file))


def write(path: Path, fill: Callable[[str], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fill(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def typed(column: Sequence[str]) -> list[Any]:
    """Values as typed: whole numbers, else numbers, if all of them are; a run that does not set it has none."""
    numbers = [None if value == ABSENT else as_number(value) for value in column]
    if any(number is None and value != ABSENT for number, value in zip(numbers, column, strict=True)):
        return [None if value == ABSENT else value for value in column]
    whole = all(number is None or (number.is_integer() and value.lstrip("+-").isdigit())
                for number, value in zip(numbers, column, strict=True))  # fmt: skip
    return [int(number) if whole and number is not None else number for number in numbers]


def varied(sweep: SweepRuns) -> Mapping[str, Sequence[Any]]:
    """Factor or seed -> its value in each run; a name that the tables use otherwise is marked as a factor."""
    metrics = {name for member in sweep.members for name in member.run.names}
    columns: dict[str, Sequence[Any]] = {}
    for key in (*sweep.factors, *sweep.seeds):
        name = f"{key} (factor)" if key in metrics or key in KNOWN else key
        columns[name] = typed([{**member.factors, **member.seeds}[key] for member in sweep.members])
    return columns


def metrics_table(sweep: SweepRuns) -> pa.Table:
    factors = varied(sweep)
    names = dict.fromkeys(name for m in sweep.members for line in m.run.metrics.values() for name in line)
    measured = [name for name in names if name not in ("step", "episode")]
    lengths = [len(member.run.metrics) for member in sweep.members]

    def repeated(values: Sequence[Any]) -> pa.Array:
        return pa.array([value for value, length in zip(values, lengths, strict=True) for _ in range(length)])

    def logged(name: str) -> pa.Array:
        lines = (line for member in sweep.members for line in member.run.metrics.values())
        return pa.array([line.get(name) for line in lines], type=pa.float64())

    columns = {
        "run": repeated([member.name for member in sweep.members]),
        "state": repeated([member.state for member in sweep.members]),
        **{name: repeated(values) for name, values in factors.items()},
        "step": pa.array([step for member in sweep.members for step in member.run.metrics], type=pa.int64()),
        "episode": logged("episode"),
        **{name: logged(name) for name in measured},
    }
    return pa.table(columns)


def runs_table(values: Values) -> pa.Table:
    members = values.sweep.members
    held_out = [metric for of_split in values.metrics.values() for metric in of_split]

    def status(key: str) -> list[Any]:
        return [number_of(member, key) for member in members]

    columns: dict[str, Any] = {
        "run": [member.name for member in members],
        **varied(values.sweep),
        "state": [member.state for member in members],
        "step": pa.array([member.last_step for member in members], type=pa.int64()),
        **{
            (f"eval/{metric.split}/{metric.key}" if metric.split else metric.key): pa.array(
                [values.of(member, metric).after for member in members], type=pa.float64(), from_pandas=True
            )
            for metric in held_out
        },
        "seconds": pa.array(status("seconds"), type=pa.float64()),
        "peak_memory_mib": pa.array(status("peak_memory_mib"), type=pa.float64()),
        "sittings": pa.array(status("sittings"), type=pa.int64()),
        "error": [member.error for member in members],
        "directory": [member.place for member in members],
    }
    return pa.table(columns)


def number_of(member: Member, key: str) -> float | None:
    value = member.run.status.get(key)
    return value if isinstance(value, int | float) else None
