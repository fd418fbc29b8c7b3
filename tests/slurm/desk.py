"""Where a person sits who submits runs to the cluster: the command line, and what its runs say of themselves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lab.engine.accounting import CLOCKED
from tests.slurm.cluster import Cluster, wait_until

# smoke runs of the cluster's size; the GPU is pretended, so that nothing may be put on it
ON_CPU = ("debug=smoke", "hardware=slurm_cpu", "executor.cpus=1", "executor.mem_gb=1.5")
ON_GPU = ("debug=smoke", "hardware=slurm_gpu", "hardware.device=cpu", "hardware.dtype=float32", "hardware.threads=1")
ON_GPU = (*ON_GPU, "executor.cpus=1", "executor.mem_gb=1.5")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")  # of a job: how it may have ended
PATIENCE = 900  # seconds for what takes ten when the machine is idle


@dataclass(frozen=True, kw_only=True)
class Desk:
    """A checkout of the project, and a place for its runs and sweeps.

    Fields:
        code: the folder with launch.py.
        place: holds runs/ and sweeps/.
    """

    cluster: Cluster
    code: Path
    place: Path

    def launch(self, *arguments: str, code: int = 0) -> str:
        """What `python launch.py` prints; it must end with the exit code `code`."""
        places = [f"runs_dir={self.place / 'runs'}", f"sweeps_dir={self.place / 'sweeps'}"]
        done = subprocess.run(
            [sys.executable, "launch.py", *arguments, *places],
            cwd=self.code,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def run(self, name: str) -> Path:
        """The directory of a run that is alone."""
        return self.place / "runs" / name

    def sweep(self, name: str) -> Path:
        """The directory of a sweep."""
        return self.place / "sweeps" / name

    def state(self, job: str) -> str:
        """What the controller says of a job, which it remembers for an hour."""
        return self.cluster.ask("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T")

    def minutes(self, job: str) -> float:
        """How long a job has been running since it was last started."""
        *days, time = self.cluster.ask("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%M").split("-")
        assert not days
        return sum(int(part) / 60**power for power, part in enumerate(time.split(":")[-2:]))

    def accounted(self, jobs: list[str]) -> set[str]:
        """State and exit code of the jobs in the accounts, such as 'COMPLETED 0:0'; they lag some seconds behind."""
        said = self.cluster.ask("sacct", "-X", "-n", "-P", "-o", "JobID,State,ExitCode", "-j", ",".join(jobs))
        lines = [line.split("|") for line in said.splitlines()]
        return {f"{state} {code}" for job, state, code in lines if job in jobs}

    def wait_for(self, job: str, state: str = "COMPLETED") -> None:
        """Until SLURM says that of the job; fails with the job's log."""
        self.wait_until(lambda: self.state(job) == state, job)

    def wait_until(self, true: Callable[[], bool], job: str) -> None:
        """Until something is true of a job that is not over; fails with its log."""
        wait_until(lambda: true() or self.state(job) in OVER, PATIENCE)
        assert true(), f"{job} is {self.state(job)}:\n{self.log(job)}"

    def log(self, job: str) -> str:
        """The end of a job's log."""
        found = [*self.place.glob(f"*/*/log/{job}_0_log.out"), *self.place.glob(f"*/*/submission/log/{job}_0_log.out")]
        return "\n".join(path.read_text()[-5000:] for path in found) or "no log"


def jobs_of(root: Path) -> dict[str, str]:
    """The latest job of each run of a sweep, or of a run's `submission`; by the name of the run."""
    names = {run["plan"]: run["name"] for run in json.loads((root / "sweep.json").read_text())["runs"]}
    return {names[job["plan"]]: job["job"] for job in submitted(root) if job["plan"] in names}


def submitted(root: Path) -> list[dict[str, Any]]:
    """What was noted of each job that was submitted, of artifacts too."""
    return [json.loads(line) for line in (root / "jobs.jsonl").read_text().splitlines()]


def status(run: Path) -> dict[str, Any]:
    """What a run says of itself."""
    return json.loads((run / "status.json").read_text())


def steps(run: Path) -> int:
    """How many steps a run has logged."""
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def results(run: Path) -> dict[str, Any]:
    """All that a run found out but for the time that it took: its metrics, its samples, its weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = [path for folder in ("samples", "policy") for path in sorted((run / folder).rglob("*")) if path.is_file()]
    return {
        "metrics": [{key: value for key, value in line.items() if not key.startswith(CLOCKED)} for line in lines],
        **{str(path.relative_to(run)): path.read_bytes() for path in files},
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Where two runs differ, each place on a line."""
    named = [key for key in found.keys() | expected.keys() if key != "metrics" and found.get(key) != expected.get(key)]
    numbers = [f"{len(found['metrics'])} lines, not {len(expected['metrics'])}"]
    if len(found["metrics"]) == len(expected["metrics"]):
        numbers = [
            f"step {ours['step']}: {key} is {ours.get(key)}, not {theirs.get(key)}"
            for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True)
            for key in ours.keys() | theirs.keys()
            if ours.get(key) != theirs.get(key)
        ]
    return sorted(named) + numbers
