"""Which job builds an artifact, noted beside it, so that sweeps that need the same one build it once."""

import fcntl
import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rlhf_lab.launch.controller import live_jobs
from rlhf_lab.launch.job import Task
from rlhf_lab.launch.sweep import Sweep, jobs


def _claim_file(artifact: Path) -> Path:
    return artifact.parent / f".{artifact.name}.job"


@contextmanager
def claiming(artifacts: Collection[Task]) -> Iterator[dict[str, str | None]]:
    """While this is open, nobody else submits a job for these artifacts.

    Yields:
        digest -> the live job that builds it already, for this sweep or another, or None.
    """
    with ExitStack() as held:
        noted: dict[str, str] = {}
        for artifact in sorted(artifacts, key=lambda task: task.directory):  # in one order, so that two never wait
            file = _claim_file(artifact.directory)
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(file.open("a+"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if said := lock.read():
                noted[artifact.digest] = json.loads(said)["job"]
        live = live_jobs(set(noted.values()))
        yield {
            artifact.digest: noted[artifact.digest] if noted.get(artifact.digest) in live else None
            for artifact in artifacts
        }


def claim(artifact: Task, job: str, sweep: Sweep) -> None:
    """Note which job builds an artifact, so that another sweep waits for it."""
    _claim_file(artifact.directory).write_text(json.dumps({"job": job, "sweep": str(sweep.root)}))


def claimed(artifact: Path) -> dict[str, Any]:
    """What was noted of the job that last claimed an artifact's directory, of whatever sweep; {} if none did.

    Its `log` is absolute, since the job may be another sweep's.
    """
    file = _claim_file(artifact)
    said = file.read_text() if file.exists() else ""
    if not said:
        return {}
    claim = json.loads(said)
    root = Path(claim["sweep"])
    noted = next((job for job in reversed(jobs(root)) if job["job"] == claim["job"]), None)
    if noted is None:  # that sweep was removed
        return {}
    return noted | ({"log": str(root / noted["log"])} if "log" in noted else {})
