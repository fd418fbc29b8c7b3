"""What a job of the cluster or of the pool does: start a worker, pass requests on to it, and outlive its death.

Only the standard library is imported here, so that a job is listening long before its worker has loaded torch.
"""

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import IO, Any

FINISHED, FAILED, REFUSED, STOPPED = 0, 1, 2, 75  # what a worker's exit code says
REQUESTS = (signal.SIGUSR2, signal.SIGTERM)
POLL_S = 0.2
OF_EACH_START = ("wandb",)  # folders of a run in which there is something new whenever a process begins
_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class JobFailed(RuntimeError):
    """The run of this job will not get further by itself; for SLURM the job is FAILED."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A frozen plan, as far as a job needs to know it."""

    root: Path
    digest: str
    directory: Path
    num_processes: int
    needs: tuple[str, ...]

    @classmethod
    def read(cls, root: Path, digest: str) -> "Task":
        """The plan with that digest in the sweep `root`."""
        stored = json.loads((root / "plans" / f"{digest}.json").read_text())
        return cls(
            root=root,
            digest=digest,
            directory=Path(stored["directory"]),
            num_processes=stored["num_processes"],
            needs=tuple(stored["needs"]),
        )

    @property
    def is_finished(self) -> bool:
        return status(self.directory).get("state") == "finished"

    def unfinished(self) -> "Task | None":
        """The first of what it needs that is not there."""
        return next((one for one in (Task.read(self.root, need) for need in self.needs) if not one.is_finished), None)

    def made(self) -> frozenset[str]:
        """What the run has written so far, by name: a file that is new is work that was not lost."""
        submission = self.root.absolute()  # inside of the run's directory, if the run was submitted alone
        directory = self.directory.absolute()
        found = (path for path in directory.rglob("*") if not path.name.startswith("."))
        found = (path for path in found if path.relative_to(directory).parts[0] not in OF_EACH_START)
        alone = submission.is_relative_to(directory)
        return frozenset(str(path) for path in found if not (alone and path.is_relative_to(submission)))

    def command(self) -> list[str]:
        """What does the run: one process, or as many as it wants on all nodes together."""
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) if in_slurm() else 1
        module = "worker" if self.num_processes == 1 and nodes == 1 else "processes"
        return [sys.executable, "-u", "-m", f"rlhf_lab.launch.{module}", str(self.root), self.digest]


def missing(run: Task) -> Iterator[Task]:
    """What a run needs, itself or through others, that is not finished; each after its own needs."""
    for digest in run.needs:
        needed = Task.read(run.root, digest)
        if not needed.is_finished:
            yield from missing(needed)
            yield needed


def status(directory: Path) -> dict[str, Any]:
    """What the run in a directory last said of itself; {} if nothing, or nothing that can be read."""
    try:
        return json.loads((directory / "status.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def now_as_said() -> str:
    """As status.json says when."""
    return time.strftime("%F %T")


def note_failure(directory: Path, error: str, *, since: str) -> None:
    """Say in status.json why the run is over, unless it said so itself or another process is at work on it.

    Args:
        since: when this attempt began; what was said of an earlier one's failure does not count.
    """
    before = status(directory)
    has_said_so = before.get("state") == "failed" and before.get("updated", "") >= since
    if before.get("state") == "finished" or has_said_so or _is_held(directory):
        return
    now = now_as_said()
    after = {"started": now, "seconds": 0.0, "sittings": 0, **before, "state": "failed", "updated": now, "error": error}
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".status.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(after, indent=1))
    temporary.replace(directory / "status.json")


def _is_held(directory: Path) -> bool:
    """Whether a process has the run's directory open."""
    try:
        with (directory / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however that ends."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _as_a_worker() -> None:
    """In the new process, before it runs: deaf until it listens, since the default answer to USR2 is to die."""
    die_with_parent()
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)


def in_slurm() -> bool:
    """Whether this process was started by a job of SLURM that was submitted here, and not merely inside of one."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def is_first_node() -> bool:
    """Whether this is the node of a job that speaks for it."""
    return not in_slurm() or os.environ.get("SLURM_PROCID", "0") == "0"


class Requests:
    """The signals that asked this process to stop, since `listen`."""

    def __init__(self) -> None:
        self.came: list[signal.Signals] = []
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        self._before = {number: signal.signal(number, self._note) for number in REQUESTS}

    def restore(self) -> None:
        """Leave the signals to whoever handled them before."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came.append(signal.Signals(number))

    def pass_on(self, number: signal.Signals) -> None:
        """To whoever handled that signal before; submitit's handler requeues the job and does not return."""
        before = self._before[number]
        assert callable(before), f"nobody handled {number.name} before"
        before(number, None)


class Supervisor:
    """Does the run of a task in a worker of its own, started again when it is killed.

    Args:
        restarts: how often a worker that was killed is started again without having made anything new in between.
        limit_s: from now; when that is over, a worker that was asked to stop is not waited for any longer.
        log: where what it says goes; none: where this process says its own.
        environment: of the worker, beside what this process has.
    """

    def __init__(
        self,
        task: Task,
        requests: Requests,
        *,
        restarts: int,
        limit_s: float,
        log: IO[str] | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.task, self.requests, self.restarts = task, requests, restarts
        self.log, self.environment = log, environment
        self._since = now_as_said()
        self._until = time.monotonic() + limit_s
        self._kills = 0
        self._made: frozenset[str] = frozenset()
        self._worker: subprocess.Popen[bytes] | None = None

    def wait(self) -> int:
        """Until it is over; returns what `poll` does."""
        while (code := self.poll()) is None:
            time.sleep(POLL_S)
        return code

    def poll(self) -> int | None:
        """How it ended, as a worker's exit code, or None if it goes on; to be called several times a second.

        STOPPED is also said when the time ran out.
        """
        if self._worker is None:
            return self._begin()
        code = self._worker.poll()
        if code is None:
            return self._pass_on() if self.requests.came else None
        if self.requests.came and code not in (FINISHED, FAILED, REFUSED):
            return STOPPED
        if code < 0:
            return self._again(signal.Signals(-code).name)
        if code not in (FINISHED, REFUSED, STOPPED):
            note_failure(self.task.directory, f"the worker ended with exit code {code}; see its log", since=self._since)
            return FAILED
        return code

    def _begin(self) -> int | None:
        if self.requests.came:
            return STOPPED
        if needed := self.task.unfinished():
            said = status(needed.directory)
            reason = said.get("error") or f"it is {said.get('state', 'not there')}"
            error = f"it needs {needed.directory}, which did not finish: {reason}"
            note_failure(self.task.directory, error, since=self._since)
            say(f"error: {self.task.directory}: {error}", self.log)
            return FAILED
        self._made = self.task.made()
        self._worker = subprocess.Popen(
            self.task.command(),
            env={**os.environ, **self.environment},
            preexec_fn=_as_a_worker,
            start_new_session=True,  # a group of its own, so that a request reaches every rank
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        return None

    def _pass_on(self) -> int | None:
        """Ask the worker, again and again, since it may only just have begun to listen."""
        assert self._worker is not None
        with suppress(ProcessLookupError):
            os.killpg(self._worker.pid, signal.SIGTERM if signal.SIGTERM in self.requests.came else signal.SIGUSR2)
        if time.monotonic() <= self._until:
            return None
        say("no step ended before the time was over; the last checkpoint counts", self.log)
        return STOPPED

    def _again(self, name: str) -> int | None:
        self._kills = 1 if self.task.made() - self._made else self._kills + 1
        if self._kills > self.restarts:
            error = f"killed by {name} {self._kills} times without getting any further"
            note_failure(self.task.directory, error, since=self._since)
            return FAILED
        say(f"the worker was killed by {name}; starting it again ({self._kills} of {self.restarts})", self.log)
        self._worker = None
        return None


def say(line: str, log: IO[str] | None = None) -> None:
    """A line in the log of the job."""
    print(f"{time.strftime('%F %T')} {line}", file=log or sys.stdout, flush=True)
