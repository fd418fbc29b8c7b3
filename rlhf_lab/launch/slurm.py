"""A sweep as jobs of SLURM, through submitit: rounds of missing artifacts, then every run, as arrays."""

import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from rlhf_lab.console import Console
from rlhf_lab.launch.claims import claim, claiming
from rlhf_lab.launch.compose import ROOT
from rlhf_lab.launch.controller import array_of, largest_array
from rlhf_lab.launch.executors import Slurm
from rlhf_lab.launch.job import Task, missing
from rlhf_lab.launch.processes import per_node
from rlhf_lab.launch.schedule import waves
from rlhf_lab.launch.slurm_job import RunJob
from rlhf_lab.launch.snapshot import environment, snapshot
from rlhf_lab.launch.standing import take_back_stops, under_way
from rlhf_lab.launch.sweep import Sweep, jobs, record_job, shown

# SLURM itself requeues after a node's failure, a run asks for it when it is warned; but not when the step is killed
# (137), or warned before it can listen (140: ended by USR2)
TEARDOWN = """\
ended=$?
if [ "$ended" -eq 137 ] || [ "$ended" -eq 140 ]; then
  job="${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
  echo "$(date '+%F %T') the step of $job was killed" | tee -a {log}/"$job".killed
  if [ "$(wc -l < {log}/"$job".killed)" -le {restarts} ]; then
    for wait in 60 60 60 60 60; do scontrol requeue "$job" && break; sleep "$wait"; done  # its controller may be down
    sleep 60  # until this job is ended
  fi
fi
exit "$ended"
"""
OURS = ("array", "chdir", "dependency", "error", "job-name", "open-mode", "output", "requeue", "signal")
NAMED = {"mem": "mem_gb", "time": "time_min", "cpus-per-task": "cpus"} | {
    name: name for name in ("partition", "account", "qos", "constraint", "gres", "nodes")
}


def submit(settings: Slurm, sweep: Sweep) -> list[dict[str, Any]]:
    """See `executors.Executor`."""
    refuse_extra(settings.extra)
    with chdir(sweep.cwd):  # what is frozen may be relative to it
        return _submit(settings, sweep)


def _submit(settings: Slurm, sweep: Sweep) -> list[dict[str, Any]]:
    begun = time.monotonic()
    tasks = {run.plan: Task.read(sweep.root, run.plan) for run in sweep.runs}
    busy = under_way(sweep)
    runs = [task for task in tasks.values() if task.directory not in busy and not task.is_finished]
    needed = {task.digest: task for run in runs for task in missing(run)}
    for task in (*runs, *needed.values()):
        per_node(task.num_processes, settings.nodes)  # refuses what every job would refuse
    take_back_stops(task.directory for task in runs)
    submitted: list[dict[str, Any]] = []
    with claiming(needed.values()) as claimed:
        waited_for = {digest: job for digest, job in claimed.items() if job is not None}
        rounds = waves({digest: task.needs for digest, task in needed.items() if digest not in waited_for})
        submission = _Submission(settings, sweep)
        after = sorted(set(waited_for.values()))
        try:
            for i, digests in enumerate(rounds, 1):
                name = f"{sweep.name}.{i}"
                new = submission.send([needed[str(digest)] for digest in digests], name, after)
                for digest, job in new.items():
                    claim(needed[digest], job, sweep)
                submitted += _record(sweep, new)
                after = sorted({array_of(job) for job in new.values()} | set(after))
            submitted += _record(sweep, submission.send(runs, sweep.name, after))
        except BaseException:
            submission.cancel()
            raise
    _say(sweep, runs, submitted, waited_for, time.monotonic() - begun)
    return submitted


def refuse_extra(extra: Mapping[str, Any]) -> None:
    """Refuse options of sbatch that are settings of their own or that would break the job.

    Raises:
        ValueError: naming the setting.
    """
    for key in (key.replace("_", "-") for key in extra):
        if key in NAMED:
            raise ValueError(f"executor.extra.{key}: set executor.{NAMED[key]} instead")
        if key in OURS:
            raise ValueError(f"executor.extra.{key}: sbatch's --{key} is set by the launcher; remove it")


class _Submission:
    """Arrays of jobs with the same settings, and what was submitted of them so far."""

    def __init__(self, settings: Slurm, sweep: Sweep) -> None:
        self.settings, self.sweep = settings, sweep
        self.sent: list[str] = []
        self.code = snapshot(sweep.root) if settings.snapshot else ROOT
        self.largest = largest_array()

    def send(self, tasks: Sequence[Task], name: str, after: Sequence[str]) -> dict[str, str]:
        """Submit the tasks as an array, or as several if the cluster takes none of that size.

        Returns:
            digest -> job.

        Raises:
            ValueError: sbatch refused.
        """
        new: dict[str, str] = {}
        for first in range(0, len(tasks), self.largest):
            part = tasks[first : first + self.largest]
            # a throttle is one array's: the next one waits for it, so that no more than `at_once` run together
            ids = self._send(
                part, name, [*after, *({array_of(job) for job in new.values()} if self._throttled else ())]
            )
            new |= {task.digest: job for task, job in zip(part, ids, strict=True)}
        return new

    @property
    def _throttled(self) -> bool:
        return self.settings.at_once is not None

    def _send(self, tasks: Sequence[Task], name: str, after: Sequence[str]) -> list[str]:
        log = self.sweep.root / "log"
        executor = SlurmExecutor(log, max_num_timeout=self.settings.requeues)
        executor.update_parameters(**parameters(self.settings, self.sweep, self.code, name, after, len(tasks)))
        log.mkdir(exist_ok=True)
        before = set(log.iterdir())
        how = {"restarts": self.settings.restarts, "limit_s": 60 * self.settings.time_min, "log": str(log)}
        try:
            # what sbatch says is in the error; in a job, SLURM's variables would become options of the new job
            with redirect_stderr(StringIO()), _outside_of_a_job(), executor.batch():
                sent = [executor.submit(RunJob(root=str(task.root), digest=task.digest, **how)) for task in tasks]
        except (FailedJobError, FailedSubmissionError) as error:
            for unused in set(log.iterdir()) - before:
                unused.unlink()
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = "; ".join(line.removeprefix("sbatch: error: ") for line in lines) or "no reason given"
            raise ValueError(
                f"sbatch refused {len(tasks)} jobs: {reason}; see the settings executor.*; nothing of it is submitted"
            ) from error
        ids = [str(job.job_id) for job in sent]
        self.sent += ids
        return ids

    def cancel(self) -> None:
        """Take back what was submitted."""
        if self.sent:
            subprocess.run(["scancel", *sorted({array_of(job) for job in self.sent})], check=False)


def parameters(settings: Slurm, sweep: Sweep, code: Path, name: str, after: Sequence[str], size: int) -> dict[str, Any]:
    """What submitit is told of an array; see its `_make_sbatch_string`.

    Args:
        after: jobs, or arrays, that end before this one starts, however they end: each run looks whether what it
            needs is there. Waiting for their success would also end the runs that can do without one that failed.
    """
    # cpus: since SLURM 22.05 a step no longer takes them over from its job
    given = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "gres": settings.gres,
        "dependency": f"afterany:{':'.join(after)}" if after else None,
    }
    return {key: value for key, value in given.items() if value is not None} | {
        "job_name": name,
        "time": settings.time_min,
        "nodes": settings.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": settings.cpus,
        "mem": f"{round(settings.mem_gb * 1024)}M",
        "signal_delay_s": settings.signal_delay_s,
        "array_parallelism": settings.at_once or size,
        "stderr_to_stdout": True,
        "srun_args": [f"--cpus-per-task={settings.cpus}"],
        "setup": [*settings.setup, *environment(code)],
        "teardown": TEARDOWN.format(log=shlex.quote(str(sweep.root / "log")), restarts=settings.restarts).splitlines(),
        "additional_parameters": {"chdir": str(sweep.cwd), "requeue": True, **settings.extra},
    }


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}  # which cluster it is
    with clean_env():
        os.environ |= kept
        yield


def _record(sweep: Sweep, new: Mapping[str, str]) -> list[dict[str, Any]]:
    for digest, job in new.items():
        record_job(sweep.root, job=job, executor="slurm", plan=digest, log=f"log/{job}_0_log.out")
    return [job for job in jobs(sweep.root) if job["job"] in set(new.values())]


def _say(
    sweep: Sweep,
    runs: Sequence[Task],
    submitted: Sequence[Mapping[str, Any]],
    waited_for: Mapping[str, str],
    took: float,
) -> None:
    console = Console()
    own = {task.digest for task in runs}
    arrays = sorted({array_of(job["job"]) for job in submitted if job["plan"] in own})
    artifacts = sorted({array_of(job["job"]) for job in submitted if job["plan"] not in own})
    if not runs:
        console.say(f"sweep {sweep.name}: every run is finished or under way; nothing was submitted")
    else:
        after = [f"{len(submitted) - len(runs)} artifacts (job {', '.join(artifacts)})"] if artifacts else []
        after += (
            [f"artifacts that other sweeps build (job {', '.join(sorted(set(waited_for.values())))})"]
            if waited_for
            else []
        )
        behind = f", after {' and '.join(after)}" if after else ""
        console.say(f"submitted {len(runs)} runs as job {', '.join(arrays)}{behind}, in {took:.1f} s")
    console.say(f"follow them with: python launch.py status={shown(sweep)}")
