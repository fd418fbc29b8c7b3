"""What a sweep's directory holds, read back: what varied, and every run in whatever state it is."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rlhf_lab.report.run import UNKNOWN, Run, read_json, read_metrics, read_overrides

SEEDS = ("seed", "artifact_seed")
ABSENT = "\N{EM DASH}"  # the value of a factor that a run does not set


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One run of a sweep.

    Fields:
        name: within the sweep.
        place: its directory relative to the sweep's, for links.
        factors: every factor of the sweep, in order -> value as typed.
        seeds: every kind of seed that varies -> value as typed.
        run: what its directory holds so far; without its samples.
        state: of status.json; "pending" before there is one, "unreadable" if a file is not what its name says.
        error: why it failed or cannot be read, in its first line.
        has_page: whether it has a report of its own.
    """

    name: str
    place: str
    factors: Mapping[str, str]
    seeds: Mapping[str, str]
    run: Run
    state: str
    error: str
    has_page: bool

    @property
    def link(self) -> str:
        return quote(f"{self.place}/report.html")

    @property
    def combination(self) -> tuple[str, ...]:
        return tuple(self.factors.values())

    @property
    def seed(self) -> tuple[str, ...]:
        return tuple(self.seeds.values())

    @property
    def last_step(self) -> int | None:
        return max(self.run.metrics, default=None)

    @cached_property
    def evaluations(self) -> Mapping[str, tuple[int, ...]]:
        """split -> iterations at which it was evaluated, ascending."""
        found: dict[str, dict[int, None]] = {}
        for step, line in self.run.metrics.items():
            for name in line:
                if name.startswith("eval/"):
                    found.setdefault(name.split("/", 2)[1], {})[step] = None
        return {split: tuple(steps) for split, steps in found.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepRuns:
    """A sweep and its runs.

    Fields:
        factors: what varies, without the seeds -> values as typed, in order.
        seeds: the kinds of seeds that vary -> values as typed.
        facts: what sweep.json says else: command, created, git, executor.
    """

    root: Path
    name: str
    factors: Mapping[str, tuple[str, ...]]
    seeds: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, Any]
    members: tuple[Member, ...]

    @cached_property
    def states(self) -> Mapping[str, int]:
        """state -> how many runs are in it; finished first."""
        counts: dict[str, int] = {}
        for member in self.members:
            counts[member.state] = counts.get(member.state, 0) + 1
        order = ("finished", "running", "pending", "stopped", "failed")
        return dict(sorted(counts.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))

    @cached_property
    def counted(self) -> tuple[Member, ...]:
        """The runs that are compared: those that are finished; while there is none, all that logged something."""
        finished = tuple(member for member in self.members if member.state == "finished")
        return finished or tuple(member for member in self.members if member.run.metrics)

    @property
    def is_provisional(self) -> bool:
        return not self.states.get("finished")

    @cached_property
    def combinations(self) -> Mapping[tuple[str, ...], tuple[Member, ...]]:
        """Values of the factors, seeds aside -> the runs, in the order in which the values were typed."""
        groups: dict[tuple[str, ...], list[Member]] = {}
        for member in self.members:
            groups.setdefault(member.combination, []).append(member)
        places = [{value: place for place, value in enumerate(values)} for values in self.factors.values()]

        def typed(combination: tuple[str, ...]) -> list[int]:
            return [place.get(value, len(place)) for place, value in zip(places, combination, strict=True)]

        return {combination: tuple(groups[combination]) for combination in sorted(groups, key=typed)}

    @cached_property
    def counts_episodes(self) -> bool:
        """Whether curves are drawn over episodes: every run counts them."""
        logged = [member.run for member in self.members if member.run.metrics]
        return bool(logged) and all(run.counts_episodes for run in logged)

    def label(self, combination: Sequence[str]) -> str:
        """A combination as a person says it: `ppo_lag · single · kl_coef=.03`; one without factors is all runs."""
        return " · ".join(self.say(*item) for item in zip(self.factors, combination, strict=True)) or "all runs"

    def say(self, factor: str, value: str) -> str:
        """A level as a person says it: an option of a group by its name, anything else with the end of its key."""
        speaks = as_number(value) is None and "." not in factor and value not in ("true", "false", "null", ABSENT)
        return value if speaks else f"{self.short_names[factor]}={value}"

    @cached_property
    def short_names(self) -> Mapping[str, str]:
        """factor -> as much of the end of its key as tells it from the others: `algorithm.kl_coef` is kl_coef."""
        parts = {factor: factor.split(".") for factor in self.factors}

        def name(factor: str, num: int) -> str:
            return ".".join(parts[factor][-num:])

        return {
            factor: next(
                name(factor, num)
                for num in range(1, len(parts[factor]) + 1)
                if num == len(parts[factor]) or [name(other, num) for other in parts].count(name(factor, num)) == 1
            )
            for factor in parts
        }


def as_number(value: str) -> float | None:
    """The finite number that a typed value is, or None."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read_sweep(root: Path) -> SweepRuns:
    """Read what the page of a sweep needs; runs may be pending, running, stopped, failed, finished or damaged.

    Raises:
        ValueError: there is no sweep, or its sweep.json is not one.
    """
    file = root / "sweep.json"
    if not file.is_file():
        raise ValueError(f"{root} is not a sweep: it has no sweep.json; give the directory of a sweep")
    stored = read_json(file)
    if missing := {"name", "factors", "runs"} - stored.keys():
        raise ValueError(f"{file} lacks {sorted(missing)}; it has {sorted(stored)}")
    typed = {key: tuple(map(str, values)) for key, values in stored["factors"].items()}
    members = tuple(read_member(root, row, typed) for row in stored["runs"])
    rows = [{**member.factors, **member.seeds} for member in members]
    varied = {key: with_those_met(values, (row[key] for row in rows)) for key, values in typed.items()}
    return SweepRuns(
        root=root,
        name=str(stored["name"]),
        factors={key: values for key, values in varied.items() if key not in SEEDS},
        seeds={key: values for key, values in varied.items() if key in SEEDS},
        facts={key: stored.get(key) for key in ("command", "created", "git", "executor")},
        members=members,
    )


def with_those_met(typed: Sequence[str], met: Iterable[str]) -> tuple[str, ...]:
    """The values of a factor as typed, the first being what others are compared with; others that runs have last."""
    return tuple(dict.fromkeys([*typed, *met]))


def read_member(root: Path, row: Mapping[str, Any], typed: Mapping[str, Sequence[str]]) -> Member:
    place = os.path.normpath(row["directory"])
    if Path(place).is_absolute():
        place = os.path.relpath(place, root)
    folder = root / place
    # a sweep that was added to has factors that the first runs did not name
    overrides = dict(override.lstrip("+").split("=", 1) for override in row.get("overrides", ()) if "=" in override)
    values = {key: str(row.get("factors", {}).get(key, overrides.get(key, ABSENT))) for key in typed}
    try:
        run = read_run_of_sweep(folder)
        state = str(run.status["state"]) if (folder / "status.json").is_file() else "pending"
        error = str(run.status["error"] or "") if state == "failed" else ""
    except (ValueError, OSError) as broken:
        run, state, error = empty_run(folder), "unreadable", str(broken)
    return Member(
        name=str(row["name"]),
        place=place,
        factors={key: value for key, value in values.items() if key not in SEEDS},
        seeds={key: value for key, value in values.items() if key in SEEDS},
        run=run,
        state=state,
        error=error.strip().split("\n")[0],
        has_page=(folder / "report.html").is_file(),
    )


def read_run_of_sweep(folder: Path) -> Run:
    """A run's numbers and status alone: two hundred runs' samples and configurations would fill the memory."""
    return Run(
        name=folder.name,
        config="",
        overrides=read_overrides(folder / "overrides.yaml"),
        environment={},
        status=UNKNOWN | read_json(folder / "status.json"),
        metrics=read_metrics(folder / "metrics.jsonl"),
        samples={},
        warnings=(),
    )


def empty_run(folder: Path) -> Run:
    return Run(
        name=folder.name, config="", overrides=(), environment={}, status=UNKNOWN, metrics={}, samples={}, warnings=()
    )
