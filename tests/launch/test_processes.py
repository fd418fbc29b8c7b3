"""Runs of several real processes: the same as one process, killed, stopped, failing and refused."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_lab.engine.accounting import CLOCKED
from rlhf_lab.launch.compose import ROOT
from rlhf_lab.launch.job import FAILED, FINISHED, REFUSED, STOPPED
from rlhf_lab.launch.processes import FIRST_PORT, PORTS, Place, per_node
from tests.launch.test_job import SAVES_WHEN_ASKED
from tests.marking import at_release

SMOKE = ("debug=smoke",)
METHODS = {"rloo": ("algorithm=rloo", "stage.steps=10", "stage.checkpoint_every=2")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One runs directory, so that artifacts are built once."""
    return tmp_path_factory.mktemp("processes") / "runs"


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def started(*arguments: str, by: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    command = [sys.executable, *by, "launch.py", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def metrics(directory: Path) -> list[dict[str, float]]:
    """What was measured at each step, but the time that it took."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: float(v) for key, v in line.items() if not key.startswith(CLOCKED)} for line in lines]


def status(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "status.json").read_text())


def assert_same(directory: Path, other: Path) -> None:
    """All metrics, to what float32 sums in another order may change within ten steps."""
    ours, theirs = metrics(directory), metrics(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            assert math.isclose(value, its[key], rel_tol=2e-3, abs_tol=2e-5), (mine["step"], key, value, its[key])


def ranks_of(run: "subprocess.Popen[str]") -> list[int]:
    """The ranks, which are children of the launcher, which is a child of launch.py."""

    def children(of: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{of}/task/{of}/children").read_text().split()]

    return [rank for launcher in children(run.pid) for rank in children(launcher)]


def wait_for(what: Callable[[], Any], run: "subprocess.Popen[str]") -> Any:
    while not (found := what()):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def alone(runs: Path) -> Callable[[str], Path]:
    """method -> the directory of its run in one process."""

    def of(method: str) -> Path:
        directory = runs / f"{method}-alone"
        if not directory.exists():
            run = started(*METHODS[method], *SMOKE, f"runs_dir={runs}", f"name={method}-alone")
            said, _ = run.communicate(timeout=500)
            assert run.returncode == FINISHED, said
        return directory

    return of


SUPERVISED = """
import sys
from pathlib import Path
from rlhf_lab.launch.processes import supervised
from tests.launch.test_job import scripted
sys.exit(supervised(scripted(Path(sys.argv[1]), sys.argv[2])))
"""
DEAF = """
import signal, time
for request in (signal.SIGUSR2, signal.SIGTERM): signal.signal(request, signal.SIG_IGN)
open('listens', 'w').close()
time.sleep(600)
"""


@pytest.mark.parametrize(("times", "script"), [(1, SAVES_WHEN_ASKED.format(before="")), (2, DEAF)])
def test_an_interrupt_has_the_processes_save_and_a_second_one_ends_them(times, script, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-c", SUPERVISED, str(run), script]
    shown = subprocess.Popen(
        command, cwd=ROOT, env={**environment(), "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    wait_for((run / "listens").exists, shown)
    for _ in range(times):
        shown.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, said = shown.communicate(timeout=60)
    assert "saves and stops at its next step" in said
    assert (run / "saved").exists() == (times == 1)
    assert (shown.returncode == STOPPED) == (times == 1)
    assert ("KeyboardInterrupt" in said) == (times == 2)


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_do_the_run_of_one(alone, runs):
    directory, name = alone("rloo"), "rloo-two"
    run = started(*METHODS["rloo"], *SMOKE, f"runs_dir={runs}", f"name={name}", "num_processes=2")
    said, _ = run.communicate(timeout=500)
    assert run.returncode == FINISHED, said
    assert_same(runs / name, directory)
    assert len(metrics(directory)) >= 5
    assert json.loads((runs / name / "environment.json").read_text())["sittings"][0]["num_processes"] == 2
    assert said.count(f"run {runs / name}\n") == 1, "one of them speaks"


@pytest.mark.slow
def test_torchrun_may_start_the_processes(alone, runs):
    directory = alone("rloo")
    by = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3")
    run = started(*METHODS["rloo"], *SMOKE, f"runs_dir={runs}", "name=torchrun", by=by)
    said, _ = run.communicate(timeout=500)
    assert run.returncode == FINISHED, said
    assert_same(runs / "torchrun", directory)
    assert said.count(f"run {runs / 'torchrun'}\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", at_release([0, 1], unless=[0]))
def test_a_rank_that_is_killed_costs_no_more_than_the_steps_since_the_checkpoint(victim, alone, runs):
    directory, name = alone("rloo"), f"killed-{victim}"
    run = started(*METHODS["rloo"], *SMOKE, f"runs_dir={runs}", f"name={name}", "num_processes=2")
    wait_for((runs / name / "checkpoints" / "step_000002").exists, run)
    os.kill(ranks_of(run)[victim], signal.SIGKILL)
    said, _ = run.communicate(timeout=500)
    assert run.returncode == FINISHED, said
    assert "resuming after step" in said
    assert status(runs / name)["sittings"] == 2
    assert_same(runs / name, directory)


@pytest.mark.slow
def test_a_request_to_stop_reaches_all_and_the_same_command_continues(alone, runs):
    directory = alone("rloo")
    arguments = (*METHODS["rloo"], *SMOKE, f"runs_dir={runs}", "name=stopped", "num_processes=2")
    run = started(*arguments)
    wait_for((runs / "stopped" / "checkpoints" / "step_000002").exists, run)
    run.send_signal(signal.SIGUSR2)
    said, _ = run.communicate(timeout=500)
    assert run.returncode == STOPPED, said
    assert status(runs / "stopped")["state"] == "stopped"
    assert said.count("asked by SIGUSR2") == 1
    assert "exitcode" not in said
    run = started(*arguments)
    said, _ = run.communicate(timeout=500)
    assert run.returncode == FINISHED, said
    assert_same(runs / "stopped", directory)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_fails_is_not_tried_again_and_says_why_once(alone, runs):
    alone("rloo")
    broken = (*METHODS["rloo"], *SMOKE, "learner.lr.policy=1e30", f"runs_dir={runs}", "name=failing", "num_processes=2")
    run = started(*broken)
    said, _ = run.communicate(timeout=500)
    assert run.returncode == FAILED, said
    assert said.count("error: ") == 1
    assert "elastic" not in said
    assert "not finite" in said
    assert status(runs / "failing")["state"] == "failed"
    assert status(runs / "failing")["sittings"] == 1
    assert "not finite" in status(runs / "failing")["error"]


@pytest.mark.slow
@pytest.mark.long
def test_what_only_the_data_show_is_refused_once(alone, runs):
    alone("rloo")
    refused = (*METHODS["rloo"], *SMOKE, "sampling.max_new_tokens=100000", f"runs_dir={runs}", "name=refused")
    run = started(*refused, "num_processes=2")
    said, _ = run.communicate(timeout=500)
    assert run.returncode == REFUSED, said
    assert said.count("error: ") == 1
    assert not (runs / "refused").exists(), "the mended command finds its name free"


@pytest.mark.slow
def test_ranks_die_with_their_launcher(runs):
    run = started(*METHODS["rloo"], *SMOKE, f"runs_dir={runs}", "name=orphans", "num_processes=2")
    ranks = wait_for(lambda: (runs / "orphans" / "metrics.jsonl").exists() and ranks_of(run), run)
    run.kill()
    run.communicate()
    for rank in ranks:
        while Path(f"/proc/{rank}").exists() and "Z" not in Path(f"/proc/{rank}/stat").read_text().split()[2]:
            time.sleep(0.05)


def test_processes_are_the_same_number_on_every_node():
    assert per_node(8, 2) == 4
    assert per_node(3, 1) == 3
    with pytest.raises(ValueError, match=r"use num_processes=2 or change executor\.nodes"):
        per_node(1, 2)
    with pytest.raises(ValueError, match="use num_processes=6 or change"):
        per_node(7, 3)


def test_nodes_meet_at_the_first_of_them_at_a_port_of_their_job(monkeypatch):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    assert Place.find().meeting_point("12.0") == "localhost:0"
    places = [Place(nodes=2, is_first=here == "a", here=here, first="a") for here in "ab"]
    assert len({place.meeting_point("7.1") for place in places}) == 1
    ports = {int(places[0].meeting_point(f"{job}.0").removeprefix("a:")) for job in range(50)}
    assert len(ports) > 45
    assert all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)
