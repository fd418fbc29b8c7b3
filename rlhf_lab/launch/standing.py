"""How each run of a sweep stands: what it last said of itself, held against who is working on it now."""

import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_lab.console import headline
from rlhf_lab.launch.claims import claimed
from rlhf_lab.launch.controller import live_jobs
from rlhf_lab.launch.job import Task
from rlhf_lab.launch.pool import is_alive
from rlhf_lab.launch.queue import Queued, queued
from rlhf_lab.launch.sweep import Frozen, Member, Sweep, jobs
from rlhf_lab.launch.terminal import duration
from rlhf_lab.run import STOP
from rlhf_lab.status import read_status

State = Literal["pending", "running", "stopped", "cancelled", "failed", "lost", "finished"]
TO_RETRY: tuple[State, ...] = ("stopped", "cancelled", "failed", "lost")
CANCELLED = "cancelled.jsonl"  # in a sweep's directory: the jobs that cancel= ended
PROGRESS = ("what", "step", "steps", "per_second")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One run or artifact.

    Fields:
        live: whether something works on it, or will without being asked again.
        detail: why it waits, how far it is, why it ended, or what it measured.
        job: the latest that was submitted for it, an artifact's by whatever sweep; {} if none was.
        requeued: how often another process took it up again.
        seconds_left: by its pace so far; 0 if it is over or has none.
    """

    name: str
    directory: Path
    plan: str
    state: State
    live: bool
    detail: str
    job: Mapping[str, Any]
    requeued: int
    seconds_left: float


def is_held(directory: Path) -> bool:
    """Whether a process of this machine has the run's directory open.

    The kernel's table of locks is read where there is one: to try the lock would for a moment keep out the run itself.
    """
    lock = directory / ".lock"
    try:
        file = lock.stat()
        locks = Path("/proc/locks").read_text()
    except FileNotFoundError:
        return lock.exists() and _cannot_take(lock)
    # `1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`
    entries = [line.split() for line in locks.splitlines() if " FLOCK " in line and "->" not in line]
    of_inode = [entry for entry in entries if entry[5].rpartition(":")[2] == str(file.st_ino)]
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
    # layered file systems give other device numbers than stat does: there the process that the lock names must hold it
    said = lock.read_text() if of_inode else ""
    return any(entry[5].startswith(f"{device}:") or f"process {entry[4]} " in said for entry in of_inode)


def take_back_stops(directories: Iterable[Path]) -> None:
    """Before runs are started: a request to stop that nobody heeded was meant for an earlier attempt."""
    for directory in directories:
        if not is_held(directory):
            (directory / STOP).unlink(missing_ok=True)


def _cannot_take(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def standings(sweep: Sweep) -> tuple[list[Standing], list[Standing]]:
    """How the artifacts and the runs of a sweep stand."""
    latest: dict[str, Mapping[str, Any]] = {job["plan"]: job for job in jobs(sweep.root)}
    for one in sweep.artifacts:  # which another sweep's job may build, on a node whose locks are not seen
        ours, theirs = latest.get(one.plan, {}), claimed(one.directory)
        if theirs.get("submitted", "") > ours.get("submitted", ""):
            latest[one.plan] = theirs
    queue = queued({job["job"] for job in latest.values() if job["executor"] == "slurm"})
    gone = cancelled(sweep.root)

    def stand(one: Frozen) -> Standing:
        name = one.name if isinstance(one, Member) else _short(one.directory, sweep)
        job = latest.get(one.plan, {})
        return standing(name, one.directory, one.plan, job, _told(job, queue), job.get("job") in gone)

    return [stand(one) for one in sweep.artifacts], [stand(run) for run in sweep.runs]


def under_way(sweep: Sweep) -> set[Path]:
    """The directories of runs and artifacts that a live job of the sweep is for, of whatever executor.

    By directories: what a run needs may have been mended meanwhile, and its plan be another.

    Raises:
        ValueError: there were jobs of SLURM, and no cluster answers.
    """
    noted = [(job, Task.read(sweep.root, job["plan"])) for job in jobs(sweep.root)]
    # of a run that is done nobody asks, so that a sweep may be added to where there is no cluster
    of_slurm = {str(job["job"]) for job, task in noted if job["executor"] == "slurm" and not task.is_finished}
    try:
        live = live_jobs(of_slurm)
    except ValueError as error:
        raise ValueError(
            f"sweep {sweep.name} was submitted to SLURM, which does not say here whether its jobs are over ({error}); "
            "type this where it does, or give the sweep another name with sweep="
        ) from error
    return {task.directory for job, task in noted if is_alive(job) or str(job["job"]) in live}


def _short(directory: Path, sweep: Sweep) -> str:
    """An artifact's directory as a person would type it where the sweep was typed."""
    return os.path.relpath(directory, sweep.cwd) if directory.is_relative_to(sweep.cwd) else str(directory)


def cancelled(root: Path) -> set[str]:
    """The jobs that were cancelled."""
    file = root / CANCELLED
    return {json.loads(line)["job"] for line in file.read_text().splitlines()} if file.exists() else set()


def _told(job: Mapping[str, Any], queue: Mapping[str, Queued] | None) -> Queued | None:
    """What is known of a job from elsewhere than its run: state UNKNOWN if nobody can be asked."""
    if not job:
        return None
    if job["executor"] == "slurm":
        return Queued(state="UNKNOWN", reason="no cluster answers here") if queue is None else queue.get(job["job"])
    if job["host"] != socket.gethostname():
        return Queued(state="UNKNOWN", reason=f"not seen from here; look on {job['host']}")
    return Queued(state="POOL", reason="waits for a free place") if is_alive(job) else None


def standing(
    name: str, directory: Path, plan: str, job: Mapping[str, Any], told: Queued | None, is_cancelled: bool
) -> Standing:
    """How one run stands.

    Args:
        job: the latest that was submitted for it; {} if none was.
        told: what is said of that job; None if it is over and nobody remembers it.
    """
    status = read_status(directory)
    held = is_held(directory)
    state, live, detail = _judged(directory, status, job, told, held, is_cancelled)
    progress = status.get("progress", {})
    left = 0.0
    if state == "running" and progress.get("per_second"):
        left = (progress["steps"] - progress["step"]) / progress["per_second"]
    return Standing(
        name=name,
        directory=directory,
        plan=plan,
        state=state,
        live=live,
        detail=detail,
        job=job,
        requeued=max(0, status.get("sittings", 1) - 1),
        seconds_left=left,
    )


def _judged(
    directory: Path,
    status: Mapping[str, Any],
    job: Mapping[str, Any],
    told: Queued | None,
    held: bool,
    is_cancelled: bool,
) -> tuple[State, bool, str]:
    said = status.get("state")
    # of an earlier attempt, if a job was submitted since
    old = bool(job) and said in ("stopped", "failed") and status.get("updated", "") < job["submitted"]
    if said == "finished":
        return "finished", False, headline(_finite(status.get("metrics", {})))
    if held:
        return "running", True, progress_of(status)
    if told is not None and told.state == "UNKNOWN" and (said in (None, "running") or old):
        return ("pending" if said is None else "running"), True, f"{progress_of(status)} ({told.reason})".strip()
    if told is not None and (told.is_live or told.state == "POOL"):
        return _of_live_job(directory, status, told, old)
    if is_cancelled and said != "failed":
        return "cancelled", False, progress_of(status)
    ended = f"job {job['job']} ended: {told.state}, {told.reason}" if told else ""
    if told is not None and told.state == "CANCELLED" and said != "failed":
        return "cancelled", False, ended
    if said == "failed":
        return "failed", False, status.get("error", "")
    if said == "stopped":
        return "stopped", False, f"{progress_of(status)}; {_reason(directory, status)}"
    if said == "running" and not job and not _is_of_here(status):
        return "running", True, f"{progress_of(status)} (not seen from here; look on {status['host']})"
    if said == "running":
        return "lost", False, f"{progress_of(status)}; its process {status.get('process')} is gone"
    if not job:
        return "pending", False, "never started"
    return "lost", False, ended or "its job is gone, and it never began"


def _of_live_job(directory: Path, status: Mapping[str, Any], told: Queued, old: bool) -> tuple[State, bool, str]:
    """Of a run that nobody holds at this moment, though its job is there."""
    said = status.get("state")
    if told.state == "PENDING":
        begun = said is not None and not old
        return "pending", True, f"goes on {progress_of(status)}: {told.reason}" if begun else told.reason
    if said is None or old:
        return (
            ("pending", True, told.reason) if told.state == "POOL" else ("running", True, f"starting on {told.reason}")
        )
    if said == "failed":
        return "failed", told.state != "POOL", status.get("error", "")
    if said == "stopped":
        where = f"{progress_of(status)}; {_reason(directory, status)}"
        return (
            ("stopped", False, where)
            if told.state == "POOL"
            else ("running", True, f"{progress_of(status)}, to be requeued")
        )
    # nobody holds it: of a process of this machine that says that it is gone, of another node's nothing
    return "running", True, progress_of(status) + (", starting again" if _is_of_here(status) else "")


def _is_of_here(status: Mapping[str, Any]) -> bool:
    """Whether the process that last spoke for the run is one of this machine, whose locks are seen."""
    return status.get("host", socket.gethostname()) == socket.gethostname()


def _reason(directory: Path, status: Mapping[str, Any]) -> str:
    """Why it stopped, without what its row says already."""
    said = status.get("reason", "").removeprefix(f"{directory} stopped: ").partition("; the same command")[0]
    return said.replace(f"{directory}/", "")


def progress_of(status: Mapping[str, Any]) -> str:
    """`step 12/80 · reward 1.2 …`, as far as the run said."""
    progress = status.get("progress", {})
    if not progress:
        return "starting" if status.get("state") == "running" else ""
    values = " ".join(f"{key} {_number(value)}" for key, value in progress.items() if key not in PROGRESS)
    return f"{progress['what']} {progress['step']}/{progress['steps']}" + (f" · {values}" if values else "")


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float | int) else str(value)


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


def totals(runs: Sequence[Standing]) -> Iterator[str]:
    """How many runs are in which state, and how long the longest of those that run still takes."""
    states: dict[str, int] = {}
    for one in runs:
        states[one.state] = states.get(one.state, 0) + 1
    yield f"{len(runs)} runs: " + ", ".join(f"{count} {state}" for state, count in states.items())
    if left := max((one.seconds_left for one in runs), default=0.0):
        yield f"the longest of those that run takes about {duration(left)} more"
