"""Supervisors of real processes that really die."""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import pytest

from rlhf_lab.launch.job import (
    FAILED,
    FINISHED,
    REFUSED,
    REQUESTS,
    STOPPED,
    Requests,
    Supervisor,
    Task,
    note_failure,
    now_as_said,
    status,
)
from rlhf_lab.launch.pool import process_started, ready
from rlhf_lab.launch.slurm_job import HURRY_S, RunJob, seconds_left

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Scripted(Task):
    """A task whose worker is a script, run in the run's directory."""

    script: str

    def command(self) -> list[str]:
        return [sys.executable, "-c", f"import os; os.chdir({str(self.directory)!r})\n{self.script}"]


def scripted(directory: Path, script: str, needs: tuple[str, ...] = ()) -> Scripted:
    directory.mkdir(parents=True, exist_ok=True)
    return Scripted(root=directory.parent, digest="0", directory=directory, num_processes=1, needs=needs, script=script)


def end_of(task: Task, restarts: int = 2, limit_s: float = 30) -> int:
    return Supervisor(task, Requests(), restarts=restarts, limit_s=limit_s).wait()


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("exits", "means"), [(0, FINISHED), (1, FAILED), (2, REFUSED), (75, STOPPED), (3, FAILED), (137, FAILED)]
)
def test_the_end_of_a_worker_is_the_end_of_its_run(tmp_path, exits, means):
    assert end_of(scripted(tmp_path / "run", f"os._exit({exits})")) == means


def test_a_worker_that_dies_without_a_word_leaves_a_failed_run(tmp_path):
    end_of(scripted(tmp_path / "run", "os._exit(3)"))
    said = status(tmp_path / "run")
    assert (said["state"], said["error"]) == ("failed", "the worker ended with exit code 3; see its log")


DIES_AT_ONCE = "open('tries', 'a').write('.'); os.kill(os.getpid(), 9)"
GETS_FURTHER = """
n = len(os.listdir('.'))
if n == 5: os._exit(0)
open(f'step_{n}', 'w').close()
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("restarts", [0, 1, 3])
def test_a_worker_that_is_killed_is_started_again_so_often_and_no_more(tmp_path, restarts):
    run = tmp_path / "run"
    run.mkdir()
    (run / "tries").touch()
    assert end_of(scripted(run, DIES_AT_ONCE), restarts=restarts) == FAILED
    assert len((run / "tries").read_text()) == restarts + 1
    assert "killed by SIGKILL" in status(run)["error"]


def test_the_files_of_a_submission_are_no_progress_of_the_run_that_holds_them(tmp_path):
    run = tmp_path / "run"
    alone = Task(root=run / "submission", digest="0", directory=run, num_processes=1, needs=())
    of_a_sweep = Task(root=tmp_path, digest="0", directory=run, num_processes=1, needs=())
    assert alone.made() == of_a_sweep.made() == frozenset()
    (run / "submission" / "log").mkdir(parents=True)
    (run / "submission" / "log" / "1_0_log.out").touch()
    assert alone.made() == frozenset()
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    (run / "checkpoints" / ".step_000002.tmp").mkdir()
    assert alone.made() == {str(run / "checkpoints"), str(run / "checkpoints" / "step_000001")}
    assert of_a_sweep.made() > alone.made()


def test_what_a_tracker_writes_at_each_start_is_no_progress(tmp_path):
    script = """
os.makedirs('wandb', exist_ok=True)
n = len(os.listdir('wandb'))
open(f'wandb/run-{n}', 'w').close()
os._exit(0) if n == 5 else os.kill(os.getpid(), 9)
"""
    assert end_of(scripted(tmp_path / "run", script), restarts=1) == FAILED
    assert len(os.listdir(tmp_path / "run/wandb")) == 2


def test_a_worker_that_gets_further_before_each_kill_is_always_started_again(tmp_path):
    assert end_of(scripted(tmp_path / "run", GETS_FURTHER), restarts=1) == FINISHED


def test_a_run_does_not_start_without_what_it_needs_and_says_why_that_is_not_there(tmp_path):
    plan = {"directory": str(tmp_path / "model"), "num_processes": 1, "needs": [], "config": {}, "overrides": []}
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "m.json").write_text(json.dumps(plan))
    task = scripted(tmp_path / "run", "open('started', 'w')", needs=("m",))
    assert end_of(task) == FAILED
    assert not (tmp_path / "run" / "started").exists()
    assert status(tmp_path / "run")["error"] == f"it needs {tmp_path / 'model'}, which did not finish: it is not there"
    note_failure(tmp_path / "model", "the loss is not finite", since=now_as_said())
    (tmp_path / "run" / "status.json").unlink()
    end_of(task)
    assert status(tmp_path / "run")["error"].endswith("which did not finish: the loss is not finite")


def test_what_a_run_says_of_its_own_end_stays(tmp_path):
    for state in ("failed", "finished"):
        said = {"state": state, "error": "its own", "updated": "2026-01-01 12:00:00"}
        (tmp_path / "status.json").write_text(json.dumps(said))
        note_failure(tmp_path, "another", since="2026-01-01 11:59:59")
        assert status(tmp_path) == said


def test_a_retry_that_cannot_begin_says_why_and_not_what_an_earlier_attempt_said(tmp_path):
    (tmp_path / "plans").mkdir()
    plan = {"directory": str(tmp_path / "model"), "num_processes": 1, "needs": [], "config": {}, "overrides": []}
    (tmp_path / "plans" / "m.json").write_text(json.dumps(plan))
    task = scripted(tmp_path / "run", "", needs=("m",))
    before = {"state": "failed", "error": "of yesterday", "updated": "2026-01-01 12:00:00", "sittings": 3}
    (tmp_path / "run" / "status.json").write_text(json.dumps(before))
    assert end_of(task) == FAILED
    said = status(tmp_path / "run")
    assert "it needs" in said["error"]
    assert said["sittings"] == 3
    (tmp_path / "status.json").write_text(json.dumps(before | {"state": "finished"}))
    note_failure(tmp_path, "another", since=now_as_said())
    assert status(tmp_path)["state"] == "finished"


def test_a_run_that_another_process_is_at_work_on_is_not_said_to_have_failed(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "running"}))
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        note_failure(tmp_path, "in use by process 7", since=now_as_said())
        assert status(tmp_path) == {"state": "running"}
    note_failure(tmp_path, "killed", since=now_as_said())
    assert status(tmp_path)["state"] == "failed"


SUPERVISES = """
import sys
from pathlib import Path
from rlhf_lab.launch.job import Requests, Supervisor
from tests.launch.test_job import scripted
requests = Requests()
requests.listen()
task = scripted(Path(sys.argv[1]), sys.argv[2])
sys.exit(Supervisor(task, requests, restarts=1, limit_s=float(sys.argv[3])).wait())
"""
SAVES_WHEN_ASKED = """
import signal, time
asked = []
{before}
for request in (signal.SIGUSR2, signal.SIGTERM): signal.signal(request, lambda number, frame: asked.append(number))
open('listens', 'w').close()
while not asked: time.sleep(0.01)
open('saved', 'w').write(str(asked[0]))
os._exit(75)
"""


def supervisor_of(run: Path, script: str, limit_s: float = 60) -> subprocess.Popen[bytes]:
    run.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISES, str(run), script, str(limit_s)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


@pytest.mark.parametrize("request_", [signal.SIGUSR2, signal.SIGTERM])
def test_a_request_reaches_the_worker_which_saves(tmp_path, request_):
    supervisor = supervisor_of(tmp_path / "run", SAVES_WHEN_ASKED.format(before=""))
    eventually((tmp_path / "run" / "listens").exists)
    supervisor.send_signal(request_)
    assert supervisor.wait(60) == STOPPED
    assert (tmp_path / "run" / "saved").read_text() == str(int(request_))


def test_a_request_to_the_whole_step_while_the_worker_is_still_loading_is_heard_too(tmp_path):
    """SLURM signals every process of a step, at any time; a process that has no handler yet would die of USR2."""
    before = "open('loads', 'w').write(str(os.getpid())); time.sleep(2)"
    supervisor = supervisor_of(tmp_path / "run", SAVES_WHEN_ASKED.format(before=before))
    loads = tmp_path / "run" / "loads"
    eventually(lambda: loads.exists() and loads.read_text())
    for process in (int(loads.read_text()), supervisor.pid):
        os.kill(process, signal.SIGUSR2)
    assert supervisor.wait(60) == STOPPED
    assert (tmp_path / "run" / "saved").exists()


def test_when_the_grace_is_over_the_job_goes_on_without_the_worker_which_dies_with_it(tmp_path):
    script = "open('loads', 'w').write(str(os.getpid()))\nimport time\ntime.sleep(600)"
    supervisor = supervisor_of(tmp_path / "run", script, limit_s=0.5)
    loads = tmp_path / "run" / "loads"
    eventually(lambda: loads.exists() and loads.read_text())
    supervisor.send_signal(signal.SIGUSR2)
    assert supervisor.wait(60) == STOPPED
    eventually(lambda: process_started(int(loads.read_text())) is None)


def test_a_worker_does_not_outlive_a_supervisor_that_is_killed(tmp_path):
    script = "open('loads', 'w').write(str(os.getpid()))\nimport time\ntime.sleep(600)"
    supervisor = supervisor_of(tmp_path / "run", script)
    loads = tmp_path / "run" / "loads"
    eventually(lambda: loads.exists() and loads.read_text())
    supervisor.kill()
    supervisor.wait()
    eventually(lambda: process_started(int(loads.read_text())) is None)


def test_a_job_travels_by_name_and_wakes_without_torch(tmp_path):
    job = RunJob(root=str(tmp_path), digest="0", restarts=1, limit_s=10, log=str(tmp_path))
    (tmp_path / "job.pkl").write_bytes(cloudpickle.dumps(job))
    assert len((tmp_path / "job.pkl").read_bytes()) < 1000
    wakes = "import pickle, sys; job = pickle.load(open(sys.argv[1], 'rb')); print(job.digest, 'torch' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", wakes, str(tmp_path / "job.pkl")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["0", "False"]
    again = job.checkpoint()
    assert again.function == job


def controller(tools: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A squeue that answers so, for the fourth job of array 7, whose number is the array's own."""
    tools.mkdir(exist_ok=True)
    (tools / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name, value in (("JOB_ID", "7"), ("ARRAY_JOB_ID", "7"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("0:07", 7),
        ("12:05", 725),
        ("2:00:01", 7201),
        ("1-02:03:04", 93784),
        ("UNLIMITED", math.inf),
        ("INVALID", math.inf),
        ("", math.inf),
    ],
)
def test_the_time_that_a_job_has_left_is_what_its_controller_says(tmp_path, monkeypatch, said, seconds):
    controller(tmp_path, f'case "$*" in *--jobs=7_3) echo "{said}";; *) exit 1;; esac', monkeypatch)
    assert seconds_left() == seconds


def test_a_job_that_began_late_is_requeued_before_its_limit_and_not_after_its_whole_time(tmp_path, monkeypatch):
    controller(tmp_path / "tools", f"echo 0:{HURRY_S + 1:02}", monkeypatch)
    run = scripted(tmp_path / "run", "import time\nopen('loads', 'w').close()\ntime.sleep(600)")
    monkeypatch.setattr(Task, "read", lambda root, digest: run)
    requested: list[float] = []

    def pass_on(requests: Requests, number: signal.Signals) -> None:
        requested.append(number)
        raise SystemExit(number)

    monkeypatch.setattr(Requests, "pass_on", pass_on)
    warning = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2))
    warning.start()
    before = {number: signal.getsignal(number) for number in REQUESTS}
    try:
        with pytest.raises(SystemExit):
            RunJob(root=str(tmp_path), digest="0", restarts=0, limit_s=600, log=str(tmp_path))()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert requested == [signal.SIGUSR2]


def test_a_pool_starts_what_waits_for_nothing(tmp_path):
    def task(digest: str, *needs: str) -> Task:
        return Task(root=tmp_path, digest=digest, directory=tmp_path / digest, num_processes=1, needs=needs)

    sft, model, run, other = task("sft"), task("model", "sft"), task("run", "model", "there already"), task("other")
    assert ready([sft, model, run, other], []) == [sft, other]
    assert ready([model, run, other], [sft]) == [other]
    assert ready([run], []) == [run]


POOL = """
import sys
from dataclasses import replace
from pathlib import Path
from rlhf_lab.launch import pool
from tests.launch.test_job import scripted
root = Path(sys.argv[1])
(root / "log").mkdir()
script = '''
import time
open("begun", "w").write(f"{time.monotonic()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
time.sleep(0.7)
open("ended", "w").write(str(time.monotonic()))
os._exit(int(os.path.basename(os.getcwd()) == "2"))
'''
pool.Task.read = lambda root, digest: replace(scripted(root / digest, script), digest=digest)
devices = tuple(sys.argv[2].split(",")) if sys.argv[2] else (None,)
pool.PoolJob(root=str(root), digests=tuple("01234"), at_once=2, devices=devices, restarts=0)()
"""


@pytest.mark.parametrize(("devices", "seen"), [("", {"None"}), ("3,5", {"3", "5"}), ("3", {"3"})])
def test_a_pool_does_two_at_a_time_on_the_devices_that_it_has_and_goes_on_after_a_failure(tmp_path, devices, seen):
    done = subprocess.run(
        [sys.executable, "-c", POOL, str(tmp_path), devices],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},  # as submitit leaves it
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "1 of 5 runs and artifacts did not finish" in done.stderr
    begun = [(tmp_path / name / "begun").read_text().split() for name in "01234"]
    times = [(float(start), float((tmp_path / str(i) / "ended").read_text())) for i, (start, _) in enumerate(begun)]
    assert max(sum(start <= at < end for start, end in times) for at, _ in times) == 2
    assert {device for _, device in begun} == seen
    if len(seen) == 2:  # who runs together has different ones
        first, second = sorted(zip(times, begun, strict=True))[:2]
        assert first[1][1] != second[1][1]
