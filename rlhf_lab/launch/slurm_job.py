"""What a job of SLURM runs: one frozen plan, under a supervisor, requeued whenever it is cut short."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lab.launch.job import (
    FINISHED,
    STOPPED,
    JobFailed,
    Requests,
    Supervisor,
    Task,
    is_first_node,
    say,
    status,
)

AGAIN_S = 5
HURRY_S = 15  # kept of the time limit, for requeuing
ASKING_S = 10  # how long the controller may take to answer


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """The callable that SLURM's job runs: one frozen plan, as often as the job is started.

    Fields:
        restarts: see `Supervisor`; also how often the job is requeued after the whole of it was killed.
        limit_s: how long the job may last.
        log: the folder with the jobs' logs.
    """

    root: str
    digest: str
    restarts: int
    limit_s: float
    log: str

    def __call__(self) -> None:
        """Returns when the run is finished; requeues the job when it was asked to stop.

        Raises:
            JobFailed: the run failed, was refused, or was killed too often.
            SystemExit: it was stopped by a person.
        """
        requests = Requests()
        requests.listen()
        task = Task.read(Path(self.root), self.digest)
        if is_first_node():
            self._forget_kills(task)
        limit_s = min(self.limit_s, seconds_left()) - HURRY_S
        code = Supervisor(task, requests, restarts=self.restarts, limit_s=limit_s).wait()
        if code == FINISHED:
            return
        if code != STOPPED:
            raise JobFailed(f"{task.directory}: {status(task.directory).get('error') or 'failed'}")
        if not requests.came or (signal.SIGTERM in requests.came and _is_cancelled()):
            say(f"{task.directory} was stopped on request")
            sys.exit(STOPPED)
        while is_first_node():
            try:
                requests.pass_on(signal.SIGUSR2)  # to submitit, which requeues the job and does not return
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                say(f"the controller does not answer, asking again: {error}")
                time.sleep(AGAIN_S)
        time.sleep(2 * HURRY_S)  # the first node requeues the job, which ends this process

    def checkpoint(self) -> Any:
        """What submitit runs after a requeue: the same again, which continues the run."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _forget_kills(self, task: Task) -> None:
        """What the batch script counts begins anew once the run got further (see `slurm.TEARDOWN`)."""
        job = _this_job()
        killed, before = Path(self.log) / f"{job}.killed", Path(self.log) / f"{job}.made"
        if killed.exists() and before.exists() and task.made() - set(before.read_text().splitlines()):
            killed.unlink()
        before.write_text("\n".join(sorted(task.made())))


def _this_job() -> str:
    """Its name among the jobs of an array: by the number alone, the last of an array is all of them."""
    array, place = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{place}" if array else os.environ.get("SLURM_JOB_ID", "none")


def seconds_left() -> float:
    """Until this job's time limit, which began before this process did; infinity if nobody says.

    Setup, prolog and the imports before this may have taken long.
    """
    asked = ["squeue", "--noheader", "--format=%L", f"--jobs={_this_job()}"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=ASKING_S).stdout
    except (OSError, subprocess.SubprocessError):
        return math.inf
    said = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", answer.strip())  # else UNLIMITED, INVALID, NOT_SET
    if said is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in said.groups())
    return 86400.0 * days + 3600 * hours + 60 * minutes + seconds


def _is_cancelled() -> bool:
    """Whether SLURM ends this job for good; a job that it pre-empts is running until its grace is over."""
    asked = ["squeue", "--noheader", "--format=%T", f"--jobs={_this_job()}"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.returncode == 0 and answer.stdout.split() != ["RUNNING"]
