"""What one run directory holds, read back: finished, unfinished or failed, any of its files may be missing."""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from rlhf_lab.data.tables import read_table

NOT_FINITE = ("nan", "inf", "-inf")  # how a run spells them, since JSON cannot
UNKNOWN: dict[str, Any] = {
    "state": "unknown",
    "stage": "",
    "started": "",
    "ended": "",
    "seconds": None,
    "peak_memory_mib": None,
    "error": "",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One metric over the run, at the steps that logged it.

    Args:
        step: (n,) iterations, ascending.
        x: (n,) where it is drawn: episodes when the run counted them, else iterations.
        value: (n,) in the metric's own units; NaN where it was not finite.
    """

    step: NDArray[np.float64]
    x: NDArray[np.float64]
    value: NDArray[np.float64]

    @property
    def exists(self) -> bool:
        return bool(np.isfinite(self.value).any())

    def at(self, step: int) -> float:
        """The value that was logged at this iteration, NaN if none was."""
        found = self.value[self.step == step]
        return float(found[0]) if len(found) else math.nan


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response to a held-out prompt, with what every source said of it, each in its own units."""

    split: str
    id: str
    prompt: str
    response: str
    finished: bool
    kl: float
    scores: Mapping[str, float]
    members: Mapping[str, tuple[float, ...]]
    gold: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something that the run said about itself; `step` is None when it was said outside an iteration."""

    step: int | None
    message: str


def same_stream(first: str, second: str) -> bool:
    """Whether two names speak of one thing: equal, or one begins with the other (helpful, helpfulness)."""
    return first.startswith(second) or second.startswith(first)


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run directory in memory.

    Args:
        name: of the directory.
        config: the text of config.yaml.
        overrides: what the person typed.
        environment: environment.json.
        status: status.json, completed by `UNKNOWN`.
        metrics: iteration -> metric -> value; a value that is not a number is left out, null is NaN.
        samples: iteration -> responses; only of the first and the last evaluation.
        warnings: in the order in which they were given.
        trade_offs: rows of preference_grid.parquet: what each preference asked for and obtained; none for most runs.
        value_models: value_models.json: source -> split -> its curves of calibration and accuracy; {} for most runs.
        generalisation: generalisation.json: what several methods score on several splits; {} for most runs.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    environment: Mapping[str, Any]
    status: Mapping[str, Any]
    metrics: Mapping[int, Mapping[str, float]]
    samples: Mapping[int, tuple[Sample, ...]]
    warnings: tuple[Notice, ...]
    trade_offs: Sequence[Mapping[str, Any]] = ()
    value_models: Mapping[str, Any] = field(default_factory=dict)
    generalisation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return str(self.status["state"])

    @cached_property
    def counts_episodes(self) -> bool:
        """Whether the x axis is episodes: every iteration says how many responses it had seen."""
        return bool(self.metrics) and all("episode" in line for line in self.metrics.values())

    @cached_property
    def last(self) -> Mapping[str, float]:
        """What was logged at the last iteration; nothing of a run that has none."""
        return self.metrics[max(self.metrics)] if self.metrics else {}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every metric that has a finite value somewhere, in order of first appearance."""
        return tuple(
            dict.fromkeys(key for line in self.metrics.values() for key, value in line.items() if math.isfinite(value))
        )

    def series(self, name: str) -> Series:
        """The metric of this name; an empty series when nothing logged it."""
        steps = [step for step, line in self.metrics.items() if name in line]
        x = [self.metrics[step]["episode"] if self.counts_episodes else step for step in steps]
        value = np.array([self.metrics[step][name] for step in steps], dtype=np.float64)
        return Series(
            step=np.array(steps, dtype=np.float64),
            x=np.array(x, dtype=np.float64),
            value=np.where(np.isfinite(value), value, np.nan),
        )

    def streams(self, pattern: str) -> tuple[str, ...]:
        """The names that stand for `<name>` in a pattern such as `rewards/<name>/mean`, in order of appearance."""
        regex = re.compile(re.escape(pattern).replace("<name>", "([^/]+)"))
        return tuple(dict.fromkeys(found[1] for name in self.names if (found := regex.fullmatch(name))))

    @cached_property
    def rewards(self) -> tuple[str, ...]:
        return self.streams("rewards/<name>/mean")

    @cached_property
    def costs(self) -> tuple[str, ...]:
        """Streams of which less is better: those with a cost or with a multiplier."""
        return tuple(dict.fromkeys(self.streams("cost/<name>/mean") + self.streams("lagrange/<name>/lambda")))

    @cached_property
    def gold(self) -> tuple[str, ...]:
        """Gold scores of which more is better."""
        return tuple(name for name in self.gold_of_any_sign if not self.is_gold_cost(name))

    @cached_property
    def gold_costs(self) -> tuple[str, ...]:
        """Gold scores of which less is better."""
        return tuple(name for name in self.gold_of_any_sign if self.is_gold_cost(name))

    @cached_property
    def gold_of_any_sign(self) -> tuple[str, ...]:
        held_out = [name for split in self.splits for name in self.streams(f"eval/{split}/gold/<name>/mean")]
        return tuple(dict.fromkeys([*self.streams("gold/<name>/mean"), *held_out]))

    def is_gold_cost(self, name: str) -> bool:
        """Whether a gold score is a cost: it is called one, or shares the name of a priced stream."""
        return same_stream(name, "cost") or any(same_stream(name, cost) for cost in self.costs)

    @cached_property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(reward, gold) that speak of one thing, by name; a lone reward and a lone gold score are a pair too."""
        named = tuple((reward, gold) for gold in self.gold for reward in self.rewards if same_stream(reward, gold))
        if not named and len(self.rewards) == len(self.gold) == 1:
            return ((self.rewards[0], self.gold[0]),)
        return named

    @cached_property
    def headline_gold(self) -> str | None:
        """The gold score that the run is judged by: the first that a reward stands for, else the first."""
        paired = [gold for _, gold in self.pairs]
        return next(iter([*paired, *self.gold]), None)

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Held-out splits: `test` first, those out of distribution last."""
        logged = {found[1] for name in self.names if (found := re.match(r"eval/([^/]+)/", name))}
        return tuple(sorted(logged, key=lambda split: (split != "test", split.startswith("ood"), split)))

    def limit(self, cost: str) -> float:
        """What the mean of this cost may not exceed, in its own units, as last logged; NaN if it has no limit."""
        if self.series(f"lagrange/{cost}/unsafe_rate").exists:  # the limit is of that rate, not of the cost
            return math.nan
        limits = self.series(f"lagrange/{cost}/limit")
        return float(limits.value[np.isfinite(limits.value)][-1]) if limits.exists else math.nan


def read_run(run_dir: Path) -> Run:
    """Read what a report needs of a run directory.

    Raises:
        FileNotFoundError: the directory is not there.
        ValueError: a file is not what its name says, except a last line that was cut off while being written.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run directory at {run_dir}; give the directory that holds metrics.jsonl")
    config = run_dir / "config.yaml"
    return Run(
        name=run_dir.resolve().name,
        config=config.read_text() if config.is_file() else "",
        overrides=read_overrides(run_dir / "overrides.yaml"),
        environment=read_json(run_dir / "environment.json"),
        status=UNKNOWN | read_json(run_dir / "status.json"),
        metrics=read_metrics(run_dir / "metrics.jsonl"),
        samples=read_samples(run_dir / "samples"),
        warnings=tuple(
            Notice(step=line.get("step"), message=str(line.get("message", "")))
            for line in read_lines(run_dir / "warnings.jsonl")
        ),
        trade_offs=read_table(grid) if (grid := run_dir / "data/preference_grid.parquet").is_file() else (),
        value_models=read_json(run_dir / "value_models.json"),
        generalisation=read_json(run_dir / "generalisation.json"),
    )


def read_overrides(path: Path) -> tuple[str, ...]:
    overrides = (yaml.safe_load(path.read_text()) or []) if path.is_file() else []
    if not isinstance(overrides, list):
        raise ValueError(f"{path} holds a {type(overrides).__name__}; expected a list of overrides")
    return tuple(str(override) for override in overrides)


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def read_lines(path: Path) -> Sequence[dict[str, Any]]:
    """The objects of a JSON-lines file; none if it is not there."""
    if not path.is_file():
        return ()
    text = path.read_text()
    lines = text.split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            # the run is still writing, or died while writing: only the last line has no newline yet
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}); repair or remove that line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is a {type(row).__name__}; expected an object")
        rows.append(row)
    return rows


def read_metrics(path: Path) -> Mapping[int, Mapping[str, float]]:
    metrics: dict[int, dict[str, float]] = {}
    for line in read_lines(path):
        if "step" not in line:
            raise ValueError(f"{path} has a line without a step: {sorted(line)[:5]}; every line needs one")
        numbers = {
            sys.intern(key): as_float(value)  # two hundred runs' names, once
            for key, value in line.items()
            if value is None or is_number(value) or value in NOT_FINITE
        }
        metrics.setdefault(int(line["step"]), {}).update(numbers)
    return dict(sorted(metrics.items()))


def read_samples(folder: Path) -> Mapping[int, tuple[Sample, ...]]:
    by_step = {int(path.stem.removeprefix("step_")): path for path in folder.glob("step_*.jsonl")}
    ends = sorted({min(by_step), max(by_step)}) if by_step else []
    return {step: tuple(as_sample(row, by_step[step]) for row in read_lines(by_step[step])) for step in ends}


def as_sample(row: Mapping[str, Any], path: Path) -> Sample:
    missing = {"id", "prompt", "response"} - row.keys()
    if missing:
        raise ValueError(f"{path} has a row without {sorted(missing)}; it has {sorted(row)}")
    return Sample(
        split=str(row.get("split", "")),
        id=str(row["id"]),
        prompt=str(row["prompt"]),
        response=str(row["response"]),
        finished=bool(row.get("finished", True)),
        kl=as_float(row.get("kl")),
        scores={name: as_float(score) for name, score in (row.get("scores") or {}).items()},
        members={name: tuple(map(as_float, scores)) for name, scores in (row.get("members") or {}).items()},
        gold={name: as_float(score) for name, score in (row.get("gold") or {}).items()},
    )


def is_number(value: object) -> bool:
    return isinstance(value, int | float)


def as_float(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
