"""Sweeps that are followed, ended and started again: with processes that really run, and what becomes of them."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_lab.launch import pool, slurm
from rlhf_lab.launch.asking import asked
from rlhf_lab.launch.claims import claim
from rlhf_lab.launch.compose import Plan
from rlhf_lab.launch.executors import Pool, Slurm
from rlhf_lab.launch.follow import follow
from rlhf_lab.launch.job import Task
from rlhf_lab.launch.pool import process_started
from rlhf_lab.launch.standing import standings, under_way
from rlhf_lab.launch.start import run_here
from rlhf_lab.launch.sweep import Sweep, freeze, record_job
from rlhf_lab.run import STOP, is_finished

NOTHING = dict.fromkeys(("partition", "account", "qos", "constraint", "gres", "at_once"))
SLURM = Slurm(
    **{"nodes": 1, "cpus": 1, "mem_gb": 1.0, "time_min": 9, "signal_delay_s": 60, "requeues": 1, "restarts": 1},
    **{"snapshot": False, "setup": (), "extra": {}, **NOTHING},
)
GIT = {"sha": "abc", "dirty": False, "diff": ""}
POOL = {"kind": "pool", "at_once": 1, "devices": None, "restarts": 0}


def plan(directory: Path, *overrides: str, needs: tuple[Plan, ...] = ()) -> Plan:
    config = {"name": directory.name, "seed": 0}
    return Plan(directory=directory, config=config, overrides=overrides, num_processes=1, needs=needs)


class Place:
    """A folder with runs and sweeps, where verbs are typed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = plan(root / "runs/base")

    def sweep(self, name: str) -> Sweep:
        """One of two seeds, which need an artifact that all sweeps here share."""
        folder = self.root / "sweeps" / name
        plans = [plan(folder / f"s{k}", f"seed={k}", needs=(self.base,)) for k in (0, 1)]
        return freeze(folder, plans, command="python launch.py -m seed=0,1", git=GIT, executor=POOL)

    def type(self, *words: str) -> int:
        wish = asked([*words, f"runs_dir={self.root / 'runs'}", f"sweeps_dir={self.root / 'sweeps'}"])
        assert wish is not None
        return follow(wish)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("COLUMNS", "200")
    return Place(tmp_path)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """What is started here is ended in the end."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def submit(sweep: Sweep, processes: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """A process that stands for the sweep's pool: it does nothing, and SIGTERM ends it."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    processes.append(process)
    facts = {"host": socket.gethostname(), "process_started": process_started(process.pid)}
    for one in (*sweep.artifacts, *sweep.runs):
        record_job(sweep.root, job=str(process.pid), executor="pool", plan=one.plan, **facts)
    return process


def say(directory: Path, state: str, **more: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    status = {"state": state, "updated": "2999-01-01 00:00:00", "sittings": 1, "process": 1, **more}
    (directory / "status.json").write_text(json.dumps(status))


def test_status_tells_runs_apart_and_says_what_to_do(place, capsys):
    sweep = place.sweep("one")
    say(sweep.runs[0].directory, "failed", error="ValueError: the first line")
    (sweep.runs[0].directory / "error.txt").touch()
    assert place.type("status=one") == 0
    said = capsys.readouterr().out
    assert "ValueError: the first line" in said
    assert str(sweep.runs[0].directory / "error.txt") in said
    assert "2 runs: 1 failed, 1 pending" in said
    assert "python launch.py retry=one" in said
    place.sweep("two")
    place.type("status=")
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["two", "one"]


def test_cancel_ends_the_processes_of_a_sweep_and_no_others(place, processes, capsys):
    ours, theirs = place.sweep("ours"), place.sweep("theirs")
    say(place.base.directory, "finished", metrics={})
    say(ours.runs[0].directory, "finished", metrics={})
    mine, other = submit(ours, processes), submit(theirs, processes)
    place.type("cancel=ours")
    assert mine.wait(timeout=30) < 0
    assert other.poll() is None
    capsys.readouterr()
    place.type("status=ours")
    said = capsys.readouterr().out
    assert "1 finished, 1 cancelled" in said
    place.type("status=theirs")
    assert "2 runs: 2 pending" in capsys.readouterr().out


def test_a_process_that_only_has_the_number_of_a_pool_is_left_alone(place, processes):
    sweep = place.sweep("old")
    process = submit(sweep, processes)
    lines = (
        (sweep.root / "jobs.jsonl")
        .read_text()
        .replace(f'"process_started": {process_started(process.pid)}', '"process_started": 7')
    )
    (sweep.root / "jobs.jsonl").write_text(lines)
    place.type("cancel=old")
    assert process.poll() is None


def test_who_took_over_from_a_pool_that_is_gone_is_asked_to_stop_and_the_pools_number_left_alone(place, processes):
    sweep = place.sweep("old")
    innocent = submit(sweep, processes)
    noted = sweep.root / "jobs.jsonl"
    noted.write_text(noted.read_text().replace(f'started": {process_started(innocent.pid)}', 'started": 7'))
    run = sweep.runs[0].directory
    say(run, "running")
    processes.append(hold(run))
    place.type("cancel=old")
    assert innocent.poll() is None
    assert (run / STOP).exists()


def test_an_artifact_that_somebody_else_builds_is_not_ended_with_a_sweep(place, processes, capsys):
    sweep = place.sweep("ours")
    say(place.base.directory, "running")
    processes.append(hold(place.base.directory))
    place.type("cancel=ours")
    assert not (place.base.directory / STOP).exists()
    said = capsys.readouterr().out
    assert "base is built by somebody else" in said
    assert "0 of 3 ended" in said
    assert not any((run.directory / STOP).exists() for run in sweep.runs)


def test_an_artifact_that_another_sweep_waits_for_is_built_on(place, capsys, monkeypatch, tmp_path):
    ours, theirs = place.sweep("ours"), place.sweep("theirs")
    record_job(ours.root, job="1", executor="slurm", plan=ours.artifacts[0].plan)
    for array, sweep in (("2", ours), ("3", theirs)):
        for k, run in enumerate(sweep.runs):
            record_job(sweep.root, job=f"{array}_{k}", executor="slurm", plan=run.plan)
    queue = "".join(f"{job}|PENDING|Dependency|\n" for job in ("1", "2_0", "2_1", "3_0", "3_1"))
    (tmp_path / "bin").mkdir()
    for name, body in (("squeue", f"/bin/cat <<'END'\n{queue}END"), ("scancel", f'echo "$@" >> {tmp_path}/ended')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    place.type("cancel=ours")
    said = capsys.readouterr().out
    assert "base is built on, since sweep theirs needs it; force=true ends it too" in said
    assert (tmp_path / "ended").read_text() == "2_0 2_1\n"
    place.type("cancel=ours", "force=true")
    assert "built on" not in capsys.readouterr().out
    assert (tmp_path / "ended").read_text() == "2_0 2_1\n1 2_0 2_1\n"


def tools(place: Place, queue: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A controller that knows these jobs, a line each; what it was asked to end is in the file."""
    (place.root / "bin").mkdir()
    ended = place.root / "ended"
    for name, body in (("squeue", f"/bin/cat <<'END'\n{queue}END"), ("scancel", f'echo "$@" >> {ended}')):
        (place.root / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (place.root / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place.root / "bin"))
    return ended


def test_an_artifact_that_a_job_of_another_sweep_builds_stands_as_that_job_does(place, capsys, monkeypatch):
    ours, theirs = place.sweep("ours"), place.sweep("theirs")
    artifact = theirs.artifacts[0].plan
    record_job(theirs.root, job="1", executor="slurm", plan=artifact)
    say(place.base.directory, "running", host="another-node")
    claim(Task.read(theirs.root, artifact), "1", theirs)
    ended = tools(place, "1|RUNNING||node3\n", monkeypatch)
    ((found,), _) = standings(ours)
    assert (found.state, found.live, found.job["job"]) == ("running", True, "1")
    assert "not seen from here" not in found.detail
    place.type("cancel=ours", "force=true")
    assert "base is built by a job of another sweep, and built on" in capsys.readouterr().out
    assert not ended.exists()
    assert not (place.base.directory / STOP).exists()


def hold(run: Path) -> subprocess.Popen[bytes]:
    """A process that has a run's directory open."""
    code = (
        "import fcntl, os, sys, time\nlock = open(sys.argv[1], 'ab+', buffering=0)\nfcntl.flock(lock, fcntl.LOCK_EX)\n"
        "lock.write(f'process {os.getpid()} on here'.encode())\nprint('held', flush=True)\ntime.sleep(600)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run / ".lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


def test_stop_asks_a_run_of_somebody_elses_terminal(place, processes, capsys):
    run = place.root / "runs/alone"
    say(run, "running")
    (run / "config.yaml").touch()
    processes.append(hold(run))
    place.type("stop=alone")
    assert (run / STOP).exists()
    assert "1 asked to save and stop" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sweeps/ours/s0", "ours/s0"])
def test_stop_ends_the_job_of_one_run_that_waits(name, place, capsys, monkeypatch):
    sweep = place.sweep("ours")
    for k, run in enumerate(sweep.runs):
        record_job(sweep.root, job=f"2_{k}", executor="slurm", plan=run.plan)
    ended = tools(place, "2_0|PENDING|Resources|\n2_1|PENDING|Resources|\n", monkeypatch)
    monkeypatch.chdir(place.root)
    place.type(f"stop={name}")
    assert "1 that waited will not begin" in capsys.readouterr().out
    assert ended.read_text() == "2_0\n"


def test_stop_of_one_run_leaves_the_pool_to_its_others(place, processes, capsys):
    sweep = place.sweep("ours")
    process = submit(sweep, processes)
    place.type("stop=ours/s0")
    assert [(run.directory / STOP).exists() for run in sweep.runs] == [True, False]
    assert process.poll() is None
    capsys.readouterr()


def test_a_sweep_is_not_started_again_by_another_executor_while_its_jobs_live(place, processes, monkeypatch, tmp_path):
    sweep = place.sweep("ours")
    for k, run in enumerate(sweep.runs):
        record_job(sweep.root, job=f"2_{k}", executor="slurm", plan=run.plan)
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 2_0\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert under_way(sweep) == {sweep.runs[0].directory}
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"whether its jobs are over .*another name with sweep="):
        Pool(at_once=1, devices=None, restarts=0).submit(sweep)
    for run in sweep.runs:
        say(run.directory, "finished", metrics={})
    assert under_way(sweep) == set()
    submit(sweep, processes)
    assert under_way(sweep) >= {run.directory for run in sweep.runs}


def test_what_is_started_again_forgets_a_request_to_stop_but_not_what_runs(place, processes, monkeypatch):
    sweep = place.sweep("here")
    for run in sweep.runs:
        (run.directory / STOP).touch()
    processes.append(hold(sweep.runs[1].directory))
    monkeypatch.setattr("rlhf_lab.launch.start.execute", lambda plan: None)
    run_here(sweep, [sweep.plan(run.plan) for run in sweep.runs])
    assert [(run.directory / STOP).exists() for run in sweep.runs] == [False, True]


@pytest.mark.parametrize("kind", ["pool", "slurm"])
def test_what_is_submitted_again_forgets_a_request_to_stop(kind, place, monkeypatch):
    sweep = place.sweep("again")
    (sweep.runs[0].directory / STOP).touch()
    monkeypatch.setattr(pool, "_start", lambda job, sweep: "1")
    monkeypatch.setattr(slurm._Submission, "send", lambda self, tasks, *more: {task.digest: "1_0" for task in tasks})
    tools(place, "", monkeypatch)
    if kind == "slurm":
        (place.root / "bin/scontrol").write_text("#!/bin/sh\necho MaxArraySize = 9\n")
        (place.root / "bin/scontrol").chmod(0o755)
    settings = SLURM if kind == "slurm" else Pool(at_once=1, devices=None, restarts=0)
    settings.submit(sweep)
    assert not (sweep.runs[0].directory / STOP).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status=one", "watch=soon"], "watch=soon: must be a number"),
        (["status=one", "watch=0"], "must be more than 0"),
        (["cancel=one", "force=yes"], "force=yes: must be true or false"),
        (["retry=one", "executor.at_onc=2"], "did you mean 'at_once'"),
        (["retry=one", "executor.at_once=0"], "executor.at_once=0: must be greater than 0"),
        (["retry=one", "executor.restarts=many"], "executor.restarts='many'"),
        (["status=onw"], "did you mean 'one'"),
    ],
)
def test_what_makes_no_sense_is_refused(words, said, place):
    place.sweep("one")
    with pytest.raises(ValueError, match=said):
        place.type(*words)


def test_what_is_retried_runs_where_the_sweep_was_typed(place, monkeypatch):
    (place.root / "elsewhere").mkdir()
    monkeypatch.chdir(place.root)  # where the sweep is frozen
    run = plan(Path("sweeps/here/s0"), "seed=0")
    freeze(run.directory.parent, [run], command="", git=GIT, executor={"kind": "here"})
    monkeypatch.chdir(place.root / "elsewhere")
    done: list[Path] = []
    monkeypatch.setattr("rlhf_lab.launch.start.execute", lambda plan: done.append(plan.directory.absolute()))
    place.type("retry=here")
    assert done == [place.root / "sweeps/here/s0"]


@pytest.mark.slow
def test_retry_starts_what_is_missing_as_it_was_frozen(command_line, tmp_path):
    places = [f"runs_dir={tmp_path / 'runs'}", f"sweeps_dir={tmp_path / 'sweeps'}"]
    typed = ["-m", "algorithm=sft", "debug=smoke", "seed=0,1", "sweep=two", *places]
    obstacle = tmp_path / "sweeps/two/sft-s1/metrics.jsonl"
    obstacle.mkdir(parents=True)
    assert command_line(*typed).returncode == 1
    first = (tmp_path / "sweeps/two/sft-s0/status.json").read_text()
    assert "1 finished, 1 failed" in command_line("status=two", *places).stdout
    obstacle.rmdir()
    again = command_line("retry=two", *places)
    assert again.returncode == 0, again.stderr
    assert "sft-s1: failed" in again.stdout
    assert all(is_finished(tmp_path / f"sweeps/two/sft-s{k}") for k in (0, 1))
    assert (tmp_path / "sweeps/two/sft-s0/status.json").read_text() == first
    assert "nothing to retry; 2 runs: 2 finished" in command_line("retry=two", *places).stdout
