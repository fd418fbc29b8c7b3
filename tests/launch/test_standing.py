"""How runs stand: from directories in every state that a run can be left in, and processes that hold them or died."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_lab.launch.queue import Queued
from rlhf_lab.launch.standing import Standing, is_held, standing

SUBMITTED = "2026-01-01 12:00:00"
BEFORE, AFTER = "2026-01-01 11:00:00", "2026-01-01 13:00:00"
JOB = {"job": "7_1", "executor": "slurm", "plan": "p", "submitted": SUBMITTED}
PROGRESS = {"what": "step", "step": 20, "steps": 80, "per_second": 2.0, "reward": 1.25}
RUNNING = Queued(state="RUNNING", reason="node3")


def stand(
    directory: Path, told: Queued | None = None, job: Any = JOB, cancelled: bool = False, **status: Any
) -> Standing:
    """How a run stands whose status.json says this, and whose job this is said of; no status: none is written."""
    if status:
        said = {"updated": AFTER, "sittings": 1, "process": 4, "progress": PROGRESS, **status}
        (directory / "status.json").write_text(json.dumps(said))
    return standing("run", directory, "p", job, told, cancelled)


def waiting(reason: str) -> Queued:
    return Queued(state="PENDING", reason=reason)


def ended(state: str) -> Queued:
    return Queued(state=state, reason="exit code 1")


@pytest.mark.parametrize(
    ("told", "status", "state", "live", "detail"),
    [
        (None, {"state": "finished", "metrics": {"objective/scores": 1.5}}, "finished", False, "reward 1.5"),
        (RUNNING, {"state": "finished"}, "finished", False, ""),
        (waiting("Resources"), {}, "pending", True, "Resources"),
        (waiting("Dependency"), {}, "pending", True, "Dependency"),
        (waiting("BeginTime"), {"state": "stopped"}, "pending", True, "goes on step 20/80 · reward 1.25: BeginTime"),
        (waiting("BeginTime"), {"state": "running"}, "pending", True, "goes on step 20/80 · reward 1.25: BeginTime"),
        (waiting("Priority"), {"state": "failed", "updated": BEFORE}, "pending", True, "Priority"),
        (RUNNING, {}, "running", True, "starting on node3"),
        (RUNNING, {"state": "failed", "updated": BEFORE}, "running", True, "starting on node3"),
        (RUNNING, {"state": "running"}, "running", True, "step 20/80"),
        (RUNNING, {"state": "stopped"}, "running", True, "to be requeued"),
        (None, {"state": "running"}, "lost", False, "its process 4 is gone"),
        (ended("NODE_FAIL"), {"state": "running"}, "lost", False, "step 20/80"),
        (None, {"state": "failed", "error": "ValueError: no"}, "failed", False, "ValueError: no"),
        (ended("FAILED"), {"state": "failed", "error": "it needs x"}, "failed", False, "it needs x"),
        (None, {"state": "stopped", "reason": "by the file stop"}, "stopped", False, "by the file stop"),
        (ended("CANCELLED"), {}, "cancelled", False, "CANCELLED"),
        (ended("CANCELLED"), {"state": "stopped"}, "cancelled", False, "CANCELLED"),
        (ended("OUT_OF_MEMORY"), {}, "lost", False, "job 7_1 ended: OUT_OF_MEMORY, exit code 1"),
        (None, {}, "lost", False, "never began"),
        (
            Queued(state="UNKNOWN", reason="no cluster answers here"),
            {"state": "running"},
            "running",
            True,
            "no cluster",
        ),
        (Queued(state="UNKNOWN", reason="no cluster answers here"), {}, "pending", True, "no cluster"),
        (Queued(state="POOL", reason="waits for a free place"), {}, "pending", True, "free place"),
        (Queued(state="POOL", reason="waits"), {"state": "failed", "error": "it broke"}, "failed", False, "it broke"),
        (Queued(state="POOL", reason="waits"), {"state": "running"}, "running", True, "starting again"),
    ],
)
def test_every_state_that_a_run_can_be_left_in(told, status, state, live, detail, tmp_path):
    found = stand(tmp_path, told, **status)
    assert (found.state, found.live) == (state, live)
    assert detail in found.detail


def test_a_run_that_was_cancelled_is_cancelled_unless_it_finished_or_failed_first(tmp_path):
    assert stand(tmp_path, cancelled=True).state == "cancelled"
    assert stand(tmp_path, cancelled=True, state="stopped").state == "cancelled"
    assert stand(tmp_path, cancelled=True, state="finished").state == "finished"
    assert stand(tmp_path, cancelled=True, state="failed").state == "failed"


def test_a_run_of_another_node_is_judged_by_its_job_and_not_by_locks_that_are_not_seen(tmp_path):
    found = stand(tmp_path, RUNNING, state="running", host="node3")
    assert (found.state, found.live, found.detail) == ("running", True, "step 20/80 · reward 1.25")
    assert stand(tmp_path, None, state="running", host="node3").state == "lost"  # SLURM knows no such job any more
    by_hand = stand(tmp_path, job={}, state="running", host="node3")
    assert (by_hand.state, by_hand.live) == ("running", True)
    assert "look on node3" in by_hand.detail


def test_a_run_that_was_never_submitted_is_pending(tmp_path):
    assert stand(tmp_path, job={}) == Standing(
        name="run",
        directory=tmp_path,
        plan="p",
        state="pending",
        live=False,
        detail="never started",
        job={},
        requeued=0,
        seconds_left=0.0,
    )


def test_sittings_and_time_left_are_what_status_json_implies(tmp_path):
    found = stand(tmp_path, RUNNING, state="running", sittings=3)
    assert found.requeued == 2
    assert found.seconds_left == 30  # 60 steps at 2 a second


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "running"'])
def test_a_torn_status_is_as_none(text, tmp_path):
    (tmp_path / "status.json").write_text(text)
    assert stand(tmp_path, RUNNING).detail == "starting on node3"


def test_a_run_is_held_as_long_as_its_process_lives(tmp_path):
    code = (
        "import fcntl, os, sys, time\n"
        "lock = open(sys.argv[1], 'ab+', buffering=0)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "lock.write(f'process {os.getpid()} on here, since now'.encode())\n"
        "print('held', flush=True)\ntime.sleep(600)\n"
    )
    assert not is_held(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        assert stand(tmp_path, job={}, state="running").live
        assert stand(tmp_path, waiting("Resources"), state="stopped").state == "running"
    finally:
        holder.kill()
        holder.wait()
    assert not is_held(tmp_path)
    assert stand(tmp_path, job={}, state="running").state == "lost"


def test_looking_never_keeps_a_run_out(tmp_path):
    """A run takes its lock without waiting, so that a look at it must not hold it even for a moment."""
    lock = tmp_path / ".lock"
    lock.touch()
    code = (
        "import sys; from pathlib import Path; from rlhf_lab.launch.standing import is_held\n"
        "print('looking', flush=True)\nwhile True: is_held(Path(sys.argv[1]))\n"
    )
    root = Path(__file__).resolve().parents[2]
    looker = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}
    )
    try:
        assert looker.stdout is not None
        looker.stdout.readline()
        import fcntl

        until = time.monotonic() + 2
        while time.monotonic() < until:
            with lock.open("ab") as mine:
                fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        looker.kill()
        looker.wait()
