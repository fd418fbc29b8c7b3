"""What a command would start, and what that takes: every run and artifact, how it stands, its time and memory.

Times are of runs that are done or of steps that were measured, never of a formula; where there is neither, they are
unknown, and a person is told how to measure them.
"""

import math
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from rlhf_lab.engine.checkpoint import checkpoints
from rlhf_lab.launch.compose import Plan, in_order
from rlhf_lab.launch.history import Estimate, History
from rlhf_lab.launch.schedule import makespan, waves
from rlhf_lab.launch.weights import UnknownWeights, least_memory_mib
from rlhf_lab.run import is_finished
from rlhf_lab.status import read_status

Standing = Literal["new", "continued", "finished"]


class Basis(Protocol):
    """What estimates are made from."""

    def estimate(self, plan: Plan) -> Estimate | None:
        """What a plan takes from its beginning, None if nothing tells."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """One run or artifact, and what it will take.

    Fields:
        step: after which it goes on; 0 for one that is new.
        runs: that need it; 0 for a run.
        estimate: from its beginning, None if nothing tells.
        least_mib: what its weights take alone, None if they are not on this machine.
    """

    plan: Plan
    standing: Standing
    step: int
    runs: int
    estimate: Estimate | None
    least_mib: float | None

    @property
    def seconds(self) -> float:
        """What is still to come of it; NaN if nothing tells."""
        if self.standing == "finished":
            return 0.0
        if self.estimate is None:
            return math.nan
        steps = self.plan.config["stage"].get("steps")
        return self.estimate.seconds * (1 - self.step / steps if steps else 1.0)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Everything that a command would start; artifacts each once and after their own needs."""

    artifacts: tuple[Outlook, ...]
    runs: tuple[Outlook, ...]

    @property
    def to_do(self) -> list[Outlook]:
        return [one for one in (*self.artifacts, *self.runs) if one.standing != "finished"]

    @property
    def unknown(self) -> int:
        """How many take nobody knows how long."""
        return sum(math.isnan(one.seconds) for one in self.to_do)

    @property
    def device_seconds(self) -> float:
        """Of all processes together, as far as known."""
        return sum(one.seconds * one.plan.num_processes for one in self.to_do if not math.isnan(one.seconds))

    def wall_seconds(self, at_once: int) -> float:
        """Until the last one is done, as far as known, if so many run at once from now on."""
        known = {one.plan.directory: 0.0 if math.isnan(one.seconds) else one.seconds for one in self.to_do}
        return makespan(known, self._needs, at_once)

    @property
    def rounds(self) -> list[list[Outlook]]:
        """The missing artifacts, each round needing only earlier ones, and the runs as the last round."""
        by_place = {one.plan.directory: one for one in self.to_do}
        building = {one.plan.directory for one in self.artifacts}
        needs = {place: needed for place, needed in self._needs.items() if place in building}
        rounds = [[by_place[place] for place in round_] for round_ in waves(needs)]
        runs = [one for one in self.runs if one.standing != "finished"]
        return [*rounds, *([runs] if runs else [])]

    @property
    def _needs(self) -> dict[Path, list[Path]]:
        return {one.plan.directory: [needed.directory for needed in one.plan.needs] for one in self.to_do}


def _standing(directory: Path) -> tuple[Standing, int]:
    if is_finished(directory):
        return "finished", 0
    step = next((step for step, _ in checkpoints(directory / "checkpoints")), 0)
    return ("continued" if step or read_status(directory).get("progress") else "new"), step


def forecast(plans: Sequence[Plan], basis: Basis) -> Forecast:
    """What the plans and all that they need will take."""
    needed = list(in_order(*plans))
    promised = {str(one.output): one for one in needed}

    def outlook(plan: Plan, runs: int) -> Outlook:
        standing, step = _standing(plan.directory)
        try:
            least = least_memory_mib(plan, promised)
        except UnknownWeights:
            least = None
        return Outlook(
            plan=plan, standing=standing, step=step, runs=runs, estimate=basis.estimate(plan), least_mib=least
        )

    count = Counter(one.directory for plan in plans for one in in_order(plan))
    return Forecast(
        artifacts=tuple(outlook(one, runs=count[one.directory]) for one in needed),
        runs=tuple(outlook(plan, runs=0) for plan in plans),
    )


@dataclass(frozen=True)
class EarlierRuns:
    """Estimates from what is below some directories."""

    history: History

    @classmethod
    def below(cls, places: Sequence[Path]) -> "EarlierRuns":
        return cls(History(places, socket.gethostname()))

    def estimate(self, plan: Plan) -> Estimate | None:
        return self.history.estimate(plan.config, plan.num_processes)


def described(config: Mapping[str, Any]) -> dict[str, str]:
    """What a run is, in a few words: method, rewards, model, data, size; what it has of them."""
    stage: Mapping[str, Any] = config["stage"]
    target = (stage.get("algorithm") or stage)["_target_"]
    words = {"method": target.rpartition(".")[2]}
    sources = {name: source for name, source in stage.get("rewards", {}).items() if source}
    if sources:
        words["rewards"] = ", ".join(_source(name, source) for name, source in sources.items())
    if "model" in stage:
        words["model"] = _place(stage["model"]["policy"], config)
    if "dataset" in stage:
        words["data"] = ", ".join(dict.fromkeys(_place(path, config) for path in _paths(stage["dataset"])))
    return words | {"size": _size(stage)}


def _paths(dataset: Mapping[str, Any]) -> list[str]:
    """Where a data set is, or where all parts of a mixture are."""
    parts = dataset.get("parts")
    return [path for part in parts.values() for path in _paths(part["dataset"])] if parts else [dataset["path"]]


def _source(name: str, source: Mapping[str, Any]) -> str:
    aggregate = source.get("aggregate", {}).get("_target_", "").rpartition(".")[2]
    return f"{name} ({source['k']}, {aggregate})" if source.get("k", 1) > 1 else name


def _place(path: str, config: Mapping[str, Any]) -> str:
    return str(path).removeprefix(f"{str(config['runs_dir']).rstrip('/')}/")


def _size(stage: Mapping[str, Any]) -> str:
    if "prompts_per_step" in stage:
        return f"{stage['steps']} × {stage['prompts_per_step'] * stage['samples_per_prompt']}"
    if "offline_steps" in stage:
        steps = stage["offline_steps"] + stage["online_iterations"] * stage["online_steps"]
        return f"{steps} × {stage['batch_size']}"
    rows = stage["dataset"]["train_size"] if "dataset" in stage else None
    if "epochs" in stage and rows:
        return f"{stage['epochs'] * -(-rows // stage['batch_size'])} × {stage['batch_size']}"
    if "epochs" in stage:
        return f"{stage['epochs']} × all rows by {stage['batch_size']}"
    return f"{stage.get('prompts') or rows} prompts" if rows else ""
