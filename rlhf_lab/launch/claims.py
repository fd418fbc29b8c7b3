"""Which job builds an artifact, noted beside it, so that sweeps that need the same one build it once."""

import fcntl
import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rlhf_lab.launch.controller import live_jobs
from rlhf_lab.launch.job import Task
from rlhf_lab.launch.sweep import Sweep


def _claim_file(artifact: Task) -> Path:
    return artifact.directory.parent / f".{artifact.directory.name}.job"


@contextmanager
def claiming(artifacts: Collection[Task]) -> Iterator[dict[str, str | None]]:
    """While this is open, nobody else submits a job for these artifacts.

    Yields:
        digest -> the live job that builds it already, for this sweep or another, or None.
    """
    with ExitStack() as held:
        noted: dict[str, str] = {}
        for artifact in sorted(artifacts, key=lambda task: task.directory):  # in one order, so that two never wait
            file = _claim_file(artifact)
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
    _claim_file(artifact).write_text(json.dumps({"job": job, "sweep": str(sweep.root)}))
