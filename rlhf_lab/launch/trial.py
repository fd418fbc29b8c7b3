"""A few short steps of a run, timed: what `plan=calibrate` extrapolates from.

Started as a process of its own, so that its memory is that of such a run.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rlhf_lab.console import Console
from rlhf_lab.engine import high_water
from rlhf_lab.launch.check import locate
from rlhf_lab.launch.compose import Plan
from rlhf_lab.launch.history import seconds_of_phases, shares
from rlhf_lab.launch.job import die_with_parent

STEPS = (3,)  # or batches, or shards: one that warms up, one that is timed, one that is followed by an evaluation
OF_REFERENCE = (2, 2, 5)  # where all data are read before the first step; the first trial warms up
AS_MEASURABLE = {"calibration": {"gold": "standardised", "labels": "standardised"}, "ties": {"drop": "coin"}}


class NotTried(ValueError):
    """A kind of run that no short trial tells anything of; says why."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What short runs took.

    Fields:
        begin: seconds outside of the steps, the first evaluation included; of a run whose amount is `units`.
        unit: seconds of a step, or of a row.
        evaluation: seconds of one evaluation in the middle of a run with steps.
        split: phase -> share of the time of the steps but the evaluations; {} of a run that logs none.
    """

    begin: float
    units: int
    unit: float
    evaluation: float
    memory_mib: float
    device_memory_mib: float
    split: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, units: int, evaluations: int) -> float:
        """Of a whole run."""
        return self.begin + (units - self.units) * self.unit + evaluations * self.evaluation


class _Stopwatch(Console):
    """Notes when each step began and the last one ended, and keeps quiet."""

    def __init__(self) -> None:
        super().__init__()
        self.loops: list[list[float]] = []

    def say(self, message: str) -> None:
        pass

    def steps(self, what: str, first: int, total: int, latest: Mapping[str, float]) -> Iterator[int]:
        marks: list[float] = []
        self.loops.append(marks)
        for step in super().steps(what, first, total, latest):
            marks.append(time.monotonic())
            yield step
        marks.append(time.monotonic())


def has_steps(stage: Mapping[str, Any]) -> bool:
    return "steps" in stage


def units_of(stage: Mapping[str, Any]) -> int:
    """Of how many steps, or else rows, a run consists.

    Raises:
        NotTried: nobody knows before its data are there, or its parts are not in proportion to anything.
    """
    if has_steps(stage):
        return stage["steps"]
    size = stage.get("prompts") or stage.get("dataset", {}).get("train_size")
    if (
        "offline_steps" in stage
        or "dataset" not in stage
        or ("epochs" not in stage and "prompts_per_shard" not in stage)
    ):
        raise NotTried(f"{stage['_target_'].rpartition('.')[2]} has no steps that could be tried alone")
    if size is None:
        raise NotTried(f"the size of {stage['dataset']['path']} is not known; set dataset.train_size")
    return size * stage.get("epochs", 1)


def _reads_ahead(stage: Mapping[str, Any]) -> bool:
    """Whether a reference reads all data before the first step."""
    return "epochs" in stage and getattr(locate(stage["algorithm"]["_target_"]), "uses_reference", False)


def shortened(stage: Mapping[str, Any], size: int) -> tuple[dict[str, Any], int]:
    """The stage of a run of so few steps, batches or shards, and how many rows are in one of these."""
    whole, short = units_of(stage), deepcopy(dict(stage))
    for key, smaller in AS_MEASURABLE.items():
        if key in short:
            short[key] = smaller.get(short[key], short[key])
    if has_steps(stage):
        steps = min(size, whole)
        return short | {"steps": steps, "evaluate_every": 0, "checkpoint_every": steps}, 1
    if "epochs" in stage:
        short |= {"epochs": 1, "evaluate_every": 0}
        short["dataset"] |= {"train_size": min(size * stage["batch_size"], whole)}
        return short, stage["batch_size"]
    batch = max(1, stage.get("sampling", {}).get("batch_size", 1) // stage.get("samples_per_prompt", 2))
    batch = min(batch, stage["prompts_per_shard"])
    rows = min(size * batch, whole)
    short["dataset"] |= {"train_size": rows, "eval_size": min(batch, stage["dataset"]["eval_size"])}
    return short | {"prompts_per_shard": batch} | ({"prompts": rows} if stage.get("prompts") else {}), batch


@dataclass(frozen=True)
class _Taken:
    """One trial: its seconds, its units, and the seconds of each step of each of its loops."""

    seconds: float
    units: int
    loops: list[list[float]]


def measure(plan: Plan) -> Trial:
    """Do the short runs of a plan below its directory; their output stays there, for what needs it."""
    stage = plan.config["stage"]
    taken: list[_Taken] = []
    batch = 1
    for i, size in enumerate(OF_REFERENCE if _reads_ahead(stage) else STEPS):
        short, batch = shortened(stage, size)
        taken.append(_timed(plan, short, plan.directory / str(i)))
    first, last = taken[0], taken[-1]
    laps = [lap for loop in first.loops for lap in loop]
    if len(taken) > 1:
        if last.units == taken[1].units:
            raise NotTried(f"its trial had {last.units} rows to work on, too few to be timed")
        unit = max(0.0, (last.seconds - taken[1].seconds) / (last.units - taken[1].units))
    elif len(laps) < 2:
        raise NotTried(f"its trial had {first.units} rows to work on, too few to be timed")
    else:
        unit = median(laps[1:-1] or laps[1:]) / (1 if has_steps(stage) else batch)
    evaluation = max(0.0, laps[-1] - unit) if has_steps(stage) else 0.0
    main, devices = high_water.since_begin()
    return Trial(
        begin=first.seconds,
        units=first.units,
        unit=unit,
        evaluation=evaluation,
        memory_mib=main,
        device_memory_mib=devices,
        split=shares(seconds_of_phases(plan.directory / "0")),
    )


def _timed(plan: Plan, stage: dict[str, Any], directory: Path) -> _Taken:
    from rlhf_lab.launch.execute import carry_out

    config = plan.config | {"stage": stage, "tracker": {"_target_": "rlhf_lab.tracking.NoTracker"}}
    console = _Stopwatch()
    begun = time.monotonic()
    carry_out(Plan(directory=directory, config=config, overrides=(), num_processes=1), console)
    seconds = time.monotonic() - begun
    units = units_of(stage)
    if "epochs" in stage:  # the table may have had fewer rows
        units = int(json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["episode"])
    return _Taken(seconds, units, [[after - before for before, after in pairwise(marks)] for marks in console.loops])


def main() -> None:
    """`python -m rlhf_lab.launch.trial <directory>`: measure the plan.json there, write trial.json beside it."""
    die_with_parent()
    directory = Path(sys.argv[1])
    config = json.loads((directory / "plan.json").read_text())
    trial = measure(Plan(directory=directory, config=config, overrides=(), num_processes=1))
    (directory / "trial.json").write_text(json.dumps(asdict(trial)))


if __name__ == "__main__":
    main()
