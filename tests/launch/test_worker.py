"""The process that carries out one frozen plan, and others that want the same artifact at the same time."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lab.launch.compose import Plan
from rlhf_lab.launch.sweep import Sweep, freeze
from rlhf_lab.run import is_finished

GIT = {"sha": "abc", "dirty": False, "diff": ""}
BUILDER = """
import fcntl, sys, time
locks = [open(path, "ab") for path in sys.argv[1:]]
for lock in locks:
    fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def needing(tmp_path: Path, plan_of) -> Sweep:
    """A sweep of one run that needs an artifact."""
    runs = tmp_path / "runs"
    artifact = plan_of("experiments=tiny_help/sft", "debug=smoke", f"runs_dir={runs}")
    root = tmp_path / "sweep"
    run = Plan(directory=root / "run", config={"seed": 0}, overrides=(), num_processes=1, needs=(artifact,))
    return freeze(root, [run], command="", git=GIT, executor={"kind": "pool"})


@pytest.mark.slow
def test_an_artifact_that_another_process_builds_is_waited_for(needing: Sweep):
    directory, digest = needing.artifacts[-1].directory, needing.artifacts[-1].plan
    directory.mkdir(parents=True)
    locks = [str(directory.parent / f".{directory.name}.build"), str(directory / ".lock")]
    with subprocess.Popen([sys.executable, "-c", BUILDER, *locks], stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        command = [sys.executable, "-u", "-m", "rlhf_lab.launch.worker", str(needing.root), digest]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as worker:
            assert worker.stdout is not None
            said = worker.stdout.readline()
            builder.kill()  # and so never finishes it
            rest = worker.stdout.read()
    assert f"waiting for another process that builds {directory}" in said, rest
    assert worker.returncode == 0, rest
    assert is_finished(directory)
