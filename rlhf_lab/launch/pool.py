"""A sweep in the background of this machine: one process that keeps so many workers busy until no run is left.

That process is a job of submitit's local executor, whose own process starts it, and is the job's id.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, chdir
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lab.launch.job import (
    FINISHED,
    POLL_S,
    STOPPED,
    JobFailed,
    Requests,
    Supervisor,
    Task,
    die_with_parent,
    missing,
    say,
)

if TYPE_CHECKING:
    from rlhf_lab.launch.executors import Pool
    from rlhf_lab.launch.sweep import Sweep

YEAR_MIN = 365 * 24 * 60  # submitit's local jobs have a time limit


@dataclass(frozen=True, kw_only=True)
class PoolJob:
    """The callable of the pool's process.

    Fields:
        digests: of the plans to do, each after those that it needs.
        at_once: how many at a time.
        devices: CUDA_VISIBLE_DEVICES of each worker, dealt in turn; None: not set.
        restarts: see `Supervisor`.
    """

    root: str
    digests: tuple[str, ...]
    at_once: int
    devices: tuple[str | None, ...]
    restarts: int

    def __call__(self) -> None:
        """Returns when every run is finished.

        Raises:
            JobFailed: some are not; the others are.
            SystemExit: the pool was asked to stop; every run that was under way is saved.
        """
        die_with_parent()
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # which submitit's local executor empties
        requests = Requests()
        requests.listen()
        waiting = [Task.read(Path(self.root), digest) for digest in self.digests]
        doing: dict[int, Supervisor] = {}
        codes: dict[str, int] = {}
        with ExitStack() as logs:
            while waiting or doing:
                for place, supervisor in list(doing.items()):
                    if (code := supervisor.poll()) is not None:
                        del doing[place]
                        codes[supervisor.task.digest] = code
                        say(f"{supervisor.task.directory}: {'finished' if code == FINISHED else f'exit code {code}'}")
                if requests.came:
                    waiting.clear()
                for task in ready(waiting, [supervisor.task for supervisor in doing.values()]):
                    if len(doing) == self.at_once:
                        break
                    waiting.remove(task)
                    place = next(place for place in range(self.at_once) if place not in doing)
                    log = logs.enter_context((Path(self.root) / log_of(task)).open("a"))
                    device = self.devices[place % len(self.devices)]
                    doing[place] = Supervisor(
                        task,
                        requests,
                        restarts=self.restarts,
                        limit_s=math.inf,
                        log=log,
                        environment={} if device is None else {"CUDA_VISIBLE_DEVICES": device},
                    )
                time.sleep(POLL_S)
        if requests.came:
            sys.exit(STOPPED)
        if bad := [digest for digest, code in codes.items() if code != FINISHED]:
            raise JobFailed(f"{len(bad)} of {len(codes)} runs and artifacts did not finish")


def ready(waiting: Sequence[Task], doing: Sequence[Task]) -> list[Task]:
    """Those that wait for none of the others; what they need is there, or failed, which they find out themselves."""
    ahead = {task.digest for task in (*waiting, *doing)}
    return [task for task in waiting if not ahead & set(task.needs)]


def log_of(task: Task) -> Path:
    """Where a worker of the pool writes what it says, from the sweep's directory."""
    return Path("log") / f"{task.directory.name}-{task.digest[:6]}.log"


def submit(settings: "Pool", sweep: "Sweep") -> list[dict[str, Any]]:
    """See `executors.Executor`."""
    with chdir(sweep.cwd):  # what is frozen may be relative to it
        return _submit(settings, sweep)


def _submit(settings: "Pool", sweep: "Sweep") -> list[dict[str, Any]]:
    from rlhf_lab.console import Console
    from rlhf_lab.launch.standing import take_back_stops, under_way
    from rlhf_lab.launch.sweep import jobs, record_job, shown

    console = Console()
    busy = under_way(sweep)
    runs = [task for task in (Task.read(sweep.root, run.plan) for run in sweep.runs) if task.directory not in busy]
    runs = [task for task in runs if not task.is_finished]
    if not runs:
        console.say(f"sweep {sweep.name}: every run is finished or under way; nothing was started")
        return []
    tasks = list({task.digest: task for run in runs for task in (*missing(run), run)}.values())
    take_back_stops(task.directory for task in runs)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    job = PoolJob(
        root=str(sweep.root),
        digests=tuple(task.digest for task in tasks),
        at_once=settings.at_once,
        devices=(visible,) if settings.devices is None else tuple(map(str, settings.devices)),
        restarts=settings.restarts,
    )
    process = _start(job, sweep)
    facts = {"host": socket.gethostname(), "process_started": process_started(int(process))}
    for task in tasks:
        record_job(sweep.root, job=process, executor="pool", plan=task.digest, log=str(log_of(task)), **facts)
    behind = f", after {len(tasks) - len(runs)} artifacts" if len(tasks) > len(runs) else ""
    console.say(f"{len(runs)} runs{behind}, {settings.at_once} at a time, in the background (process {process})")
    console.say(f"follow them with: python launch.py status={shown(sweep)}")
    return jobs(sweep.root)[-len(tasks) :]


def _start(job: PoolJob, sweep: "Sweep") -> str:
    """The process id of the pool, which the end of this process and of its terminal does not reach."""
    folder = sweep.root / "log" / f"pool-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(parents=True)
    with (folder / "start.log").open("w") as log:
        started = subprocess.run(
            [sys.executable, "-m", "rlhf_lab.launch.pool", str(folder), json.dumps(asdict(job))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=False,
        )
    if started.returncode != 0:
        raise ValueError(f"the pool could not be started; see {folder / 'start.log'}")
    return (folder / "process").read_text()


def main() -> None:
    """`python -m rlhf_lab.launch.pool <folder> <job>`: start the pool from a session without a terminal."""
    from submitit import LocalExecutor

    from rlhf_lab.launch.pool import PoolJob  # by its name in the package, so that it is pickled by reference

    folder, spelled = Path(sys.argv[1]), json.loads(sys.argv[2])
    job = PoolJob(**spelled | {"digests": tuple(spelled["digests"]), "devices": tuple(spelled["devices"])})
    executor = LocalExecutor(folder)
    executor.update_parameters(timeout_min=YEAR_MIN, stderr_to_stdout=True)
    (folder / "process").write_text(str(executor.submit(job).job_id))


def is_alive(job: Mapping[str, Any]) -> bool:
    """Whether the process of a pool's job is there; one on another machine counts as gone."""
    if job["executor"] != "pool" or job["host"] != socket.gethostname():
        return False
    return process_started(int(job["job"])) == job["process_started"]


def process_started(process: int) -> int | None:
    """When a process started, in the kernel's ticks since boot: with its number, what tells it from any other."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


if __name__ == "__main__":
    main()
