"""A sweep on disk: everything that its runs will be, frozen before the first of them starts.

A run that starts late, or again, reads its frozen plan and never composes from the configuration files of that day.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from rlhf_lab.engine.checkpoint import append_line, write_atomically
from rlhf_lab.launch.check import near
from rlhf_lab.launch.compose import Plan, in_order, key_of
from rlhf_lab.run import INCIDENTAL, RunRefused, difference, read_config

SUBMISSION = "submission"  # inside the directory of a single run: what a sweep has in its own
SEEDS = ("seed", "artifact_seed")


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A run or an artifact of a sweep: where it lies, and the digest of its plan."""

    directory: Path
    plan: str


@dataclass(frozen=True, kw_only=True)
class Member(Frozen):
    """A run of a sweep.

    Fields:
        name: within the sweep.
        overrides: what this point sets.
        factors: of what varies in the sweep, what this run has; key -> value as typed.
    """

    name: str
    overrides: tuple[str, ...]
    factors: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What sweep.json says.

    Fields:
        root: the sweep's directory.
        command, cwd: what was typed, and where; the configurations hold paths relative to that.
        git: commit and whether files differed from it.
        factors: what varies: key -> values as typed, in their order.
        artifacts: what the runs need, each once and after its own needs.
        executor: kind and settings of what runs it.
    """

    root: Path
    name: str
    command: str
    cwd: Path
    created: str
    git: Mapping[str, Any]
    factors: Mapping[str, tuple[str, ...]]
    runs: tuple[Member, ...]
    artifacts: tuple[Frozen, ...]
    executor: Mapping[str, Any]

    @classmethod
    def read(cls, root: Path) -> "Sweep":
        """The sweep in a directory.

        Raises:
            ValueError: there is none.
        """
        file = root / "sweep.json"
        if not file.is_file():
            raise ValueError(f"{root} is not a sweep: it has no sweep.json")
        stored = json.loads(file.read_text())
        return cls(
            root=root,
            name=stored["name"],
            command=stored["command"],
            cwd=Path(stored["cwd"]),
            created=stored["created"],
            git=stored["git"],
            factors={key: tuple(values) for key, values in stored["factors"].items()},
            runs=tuple(
                Member(
                    directory=Path(os.path.normpath(root / run["directory"])),
                    plan=run["plan"],
                    name=run["name"],
                    overrides=tuple(run["overrides"]),
                    factors=run["factors"],
                )
                for run in stored["runs"]
            ),
            artifacts=tuple(Frozen(directory=Path(one["directory"]), plan=one["plan"]) for one in stored["artifacts"]),
            executor=stored["executor"],
        )

    def plan(self, digest: str) -> Plan:
        """The frozen plan of a run or an artifact, and of all that it needs.

        Raises:
            ValueError: there is no such plan, or the file is not what was frozen.
        """
        return _thaw(self.root, digest, {})


def _thaw(root: Path, digest: str, known: dict[str, Plan]) -> Plan:
    if digest not in known:
        file = root / "plans" / f"{digest}.json"
        if not file.is_file():
            raise ValueError(f"{root} has no plan {digest}")
        spelled = file.read_text()
        if _digest(spelled) != digest:
            raise ValueError(f"{file} is not what was frozen: its digest is {_digest(spelled)}; submit the sweep again")
        stored = json.loads(spelled)
        known[digest] = Plan(
            directory=Path(stored["directory"]),
            config=stored["config"],
            overrides=tuple(stored["overrides"]),
            num_processes=stored["num_processes"],
            needs=tuple(_thaw(root, needed, known) for needed in stored["needs"]),
        )
    return known[digest]


def _digest(spelled: str) -> str:
    return sha256(spelled.encode()).hexdigest()[:16]


def _freeze_plan(root: Path, plan: Plan, digests: dict[Path, str]) -> str:
    """Write the plan, after those that it needs; returns its digest."""
    if plan.directory not in digests:
        needs = [_freeze_plan(root, needed, digests) for needed in plan.needs]
        spelled = json.dumps(
            {
                "directory": str(plan.directory),
                "config": plan.config,
                "overrides": plan.overrides,
                "num_processes": plan.num_processes,
                "needs": needs,
            },
            indent=1,
        )
        digest = digests[plan.directory] = _digest(spelled)
        file = root / "plans" / f"{digest}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, spelled)
    return digests[plan.directory]


def factors(points: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """What varies between the points of a sweep: key -> its values as typed, in order of appearance.

    What only some of them set varies too, as between the runs that a sweep had and those that were added to it.
    """
    values: dict[str, dict[str, None]] = {}
    for point in points:
        for override in point:
            values.setdefault(key_of(override), {})[override.partition("=")[2]] = None
    everywhere = set.intersection(*({key_of(override) for override in point} for point in points))
    return {key: tuple(typed) for key, typed in values.items() if len(typed) > 1 or key not in everywhere}


def freeze(
    root: Path, plans: Sequence[Plan], *, command: str, git: Mapping[str, Any], executor: Mapping[str, Any]
) -> Sweep:
    """Write down what a sweep is. What the directory holds already stays: runs that are new to it are added.

    Args:
        git: commit, whether files differ from it, and how.

    Raises:
        RunRefused: as `refuse_taken`.
    """
    refuse_taken(plans)
    # absolute, as the new runs' directories are: by these the same run is known
    before = Sweep.read(root.absolute()) if (root / "sweep.json").exists() else None
    digests: dict[Path, str] = {}
    varying = factors([plan.overrides for plan in plans])
    runs = {
        plan.directory.absolute(): Member(
            directory=plan.directory.absolute(),
            plan=_freeze_plan(root, plan, digests),
            name=plan.directory.name,
            overrides=plan.overrides,
            factors={key_of(o): o.partition("=")[2] for o in plan.overrides if key_of(o) in varying},
        )
        for plan in plans
    }
    needed = [Frozen(directory=plan.directory.absolute(), plan=digests[plan.directory]) for plan in in_order(*plans)]
    if before is not None:
        runs = {run.directory: run for run in before.runs} | runs
        needed = list({one.directory: one for one in (*before.artifacts, *needed)}.values())
        varying = factors([run.overrides for run in runs.values()])
    for plan in plans:
        _freeze_config(plan)
    sweep = Sweep(
        root=root.absolute(),
        name=root.name if root.name != SUBMISSION else root.parent.name,
        command=command,
        cwd=Path.cwd() if before is None else before.cwd,
        created=time.strftime("%F %T") if before is None else before.created,
        git={"sha": git["sha"], "dirty": git["dirty"]},
        factors=varying,
        runs=tuple(runs.values()),
        artifacts=tuple(needed),
        executor=executor,
    )
    write_atomically(root / "code.diff", git["diff"])
    stored = {key: value for key, value in asdict(sweep).items() if key != "root"}
    for run in stored["runs"]:
        run["directory"] = os.path.relpath(run["directory"], sweep.root)  # so that the folder may be moved
    write_atomically(root / "sweep.json", json.dumps(stored, indent=1, default=str))
    return sweep


def refuse_taken(plans: Sequence[Plan]) -> None:
    """Refuse runs that cannot have the directories that they would have.

    Raises:
        RunRefused: two would share one, or there is a run of that name with another configuration.
    """
    places: dict[Path, Plan] = {}
    for plan in plans:
        if (other := places.setdefault(plan.directory, plan)) is not plan:
            raise RunRefused(
                f"two runs of the sweep would share {plan.directory}: {' '.join(other.overrides)} and "
                f"{' '.join(plan.overrides)}; vary what belongs to a run, and leave name= away (sweep= names the sweep)"
            )
        _refuse_another(plan)


def _refuse_another(plan: Plan) -> None:
    frozen = plan.directory / "config.yaml"
    if frozen.exists():
        changed = list(difference(read_config(frozen), plan.config))
        changed = [line for line in changed if not line.startswith(INCIDENTAL)]
        if changed:
            raise RunRefused(
                f"{plan.directory} holds a run with another configuration ({'; '.join(changed[:8])}); "
                "give the sweep another name with sweep=, or remove that directory"
            )


def _freeze_config(plan: Plan) -> None:
    """The run's own copy of what it will be, before it starts."""
    plan.directory.mkdir(parents=True, exist_ok=True)
    if not (plan.directory / "config.yaml").exists():
        write_atomically(plan.directory / "overrides.yaml", yaml.safe_dump(list(plan.overrides)))
        write_atomically(plan.directory / "config.yaml", yaml.safe_dump(plan.config, sort_keys=False))


@contextmanager
def submitting(root: Path) -> Iterator[None]:
    """While this is open nobody else starts jobs of the sweep: who comes second waits, and sees those of the first."""
    with (root / ".submitting").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def record_job(root: Path, *, job: str, executor: str, plan: str, **more: Any) -> None:
    """Note that a job was submitted for a plan of the sweep."""
    line = {"job": job, "executor": executor, "plan": plan, "submitted": time.strftime("%F %T"), **more}
    append_line(root / "jobs.jsonl", json.dumps(line))


def jobs(root: Path) -> list[dict[str, Any]]:
    """What `record_job` noted, the latest last."""
    file = root / "jobs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def find(name: str, sweeps_dir: Path, runs_dir: Path) -> Sweep:
    """The sweep of a name or a path; a run that was submitted alone is one too.

    Raises:
        ValueError: there is none; with the closest name.
    """
    places = (Path(name), sweeps_dir / name, runs_dir / name)
    for root in (root for place in places for root in (place, place / SUBMISSION)):
        if (root / "sweep.json").is_file():
            return Sweep.read(root.absolute())
    known = list(names(sweeps_dir, runs_dir))
    what = near(name, known) if known else f"there are none in {sweeps_dir}"
    raise ValueError(f"there is no sweep {name!r}; {what}")


def names(sweeps_dir: Path, runs_dir: Path) -> Iterable[str]:
    """Of every sweep, and of every run that was submitted alone, as `find` takes them; the latest first."""
    found = {root: os.path.relpath(_named(root), place) for place in (runs_dir, sweeps_dir) for root in _sweeps(place)}
    for root in sorted(found, key=lambda root: (root / "sweep.json").stat().st_mtime, reverse=True):
        yield found[root]


def _named(root: Path) -> Path:
    """The folder that a person names: of a run that was submitted alone, the run's."""
    return root.parent if root.name == SUBMISSION else root


def _sweeps(place: Path) -> Iterator[Path]:
    """The sweeps below a directory, however deep; within a run there is at most its submission."""
    for folder, children, files in os.walk(place):
        if "sweep.json" in files:
            yield Path(folder)
        if Path(folder).name == SUBMISSION:
            children.clear()
        elif "config.yaml" in files:
            children[:] = [child for child in children if child == SUBMISSION]
        elif "sweep.json" in files:
            children[:] = [child for child in children if child not in ("plans", "log", "code", "plots")]


def shown(sweep: Sweep) -> str:
    """How a person names the sweep."""
    root = sweep.root.parent if sweep.root.name == SUBMISSION else sweep.root
    shown = os.path.relpath(root)
    first, _, rest = shown.partition("/")
    return str(root) if first == ".." else rest if rest and first in ("sweeps", "runs") else shown
