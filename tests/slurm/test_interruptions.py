"""Runs that are warned, preempted, killed, or lose their node or the controller end as if nothing had happened.

All of them are of one configuration, are disturbed at the same time, and are compared with one run that was left alone.
Right after they were submitted, the configuration files are changed.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf_lab.launch.compose import ROOT
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.desk import ON_CPU, Desk, differences, jobs_of, results, status, steps

pytestmark = pytest.mark.slurm

RUN = ("algorithm=ppo_lag", "reward=single", "stage.prompts_per_step=48", "stage.steps=40")
RUN = (*RUN, "stage.checkpoint_every=5", "stage.evaluate_every=20")
LATER = 13  # steps until the disturbance: some after a checkpoint


def warned(desk: Desk, job: str, run: Path) -> None:
    desk.cluster.ask("scancel", "--signal=USR2", job)


def out_of_time(desk: Desk, job: str, run: Path) -> None:
    """Its limit is one minute, of which SLURM warns it in the first half; until then the run is held, however fast."""
    worker = status(run)["process"]
    os.kill(worker, signal.SIGSTOP)
    assert wait_until(lambda: desk.minutes(job) > 31 / 60 or desk.state(job) != "RUNNING", 60)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)


def preempted(desk: Desk, job: str, run: Path) -> None:
    alone = ["--partition=high", "--exclusive", "--nodelist=lab1", "--output=/dev/null"]
    desk.cluster.ask("sbatch", *alone, "--wrap", "sleep 1")


def worker_killed(desk: Desk, job: str, run: Path) -> None:
    os.kill(status(run)["process"], signal.SIGKILL)


def step_killed(desk: Desk, job: str, run: Path) -> None:
    desk.cluster.ask("scancel", "--signal=KILL", f"{job}.0")


def node_failed(desk: Desk, job: str, run: Path) -> None:
    # it comes back by itself as soon as its slurmd is heard again
    desk.cluster.ask("scontrol", "update", "NodeName=lab2", "State=DOWN", "Reason=test")


# what happens -> the settings of the job
DISTURBANCES: dict[Callable[[Desk, str, Path], None], tuple[str, ...]] = {
    warned: ("+executor.extra.nodelist=lab0",),
    worker_killed: ("+executor.extra.nodelist=lab0",),
    step_killed: ("+executor.extra.nodelist=lab0",),
    # SLURM looks every 30 s whether a warning is due, and warns up to 30 s early
    out_of_time: ("+executor.extra.nodelist=lab0", "executor.time_min=1", "executor.signal_delay_s=40"),
    preempted: ("+executor.extra.nodelist=lab1",),
    node_failed: ("+executor.extra.nodelist=lab2",),
}


def edit_configuration(code: Path) -> None:
    """Make every run that would be composed from now on another one."""
    for file in ("algorithm/ppo.yaml", "learner/default.yaml", "dual/log_ascent.yaml"):
        path = code / "conf" / file
        before = path.read_text()
        path.write_text(before.replace("0.", "0.9"))
        assert path.read_text() != before


@pytest.fixture(scope="module")
def desk(cluster: Cluster, shared_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """At a copy of the project, whose configuration files may be edited."""
    code = tmp_path_factory.mktemp("code")
    for folder in ("conf", "rlhf_lab", "experiments"):
        shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", code)
    return Desk(cluster=cluster, code=code, place=shared_place)


@pytest.fixture(scope="module")
def undisturbed(desk: Desk) -> Path:
    """The run that is left alone, without any cluster; it builds what the others need."""
    desk.launch("debug=smoke", *RUN, "name=undisturbed")
    return desk.run("undisturbed")


@pytest.fixture(scope="module")
def disturbed(request: pytest.FixtureRequest, desk: Desk, undisturbed: Path) -> Iterator[dict[str, Future[str]]]:
    """By what happens to it: a run, whose job is known when it is over; of those that are tested."""
    tested = {item.name for item in request.session.items}
    happenings = {one.__name__: one for one in DISTURBANCES if any(f"[{one.__name__}]" in name for name in tested)}
    with ThreadPoolExecutor(len(happenings)) as at_once:
        submissions = [
            at_once.submit(desk.launch, *ON_CPU, *RUN, *DISTURBANCES[one], f"name={name}")
            for name, one in happenings.items()
        ]
        for submission in submissions:
            submission.result()
        edit_configuration(desk.code)
        jobs = {name: jobs_of(desk.run(name) / "submission")[name] for name in happenings}

        def disturb(name: str) -> str:
            desk.wait_until(lambda: steps(desk.run(name)) >= LATER, jobs[name])
            happenings[name](desk, jobs[name], desk.run(name))
            desk.wait_for(jobs[name])
            return jobs[name]

        yield {name: at_once.submit(disturb, name) for name in happenings}


@pytest.mark.parametrize("what", [happens.__name__ for happens in DISTURBANCES])
def test_a_disturbed_run_ends_as_one_that_was_left_alone(
    desk: Desk, undisturbed: Path, disturbed: dict[str, Future[str]], what: str
):
    job = disturbed[what].result()
    assert status(desk.run(what))["sittings"] >= 2, desk.log(job)
    assert differences(results(desk.run(what)), results(undisturbed)) == []


@pytest.mark.slow
def test_a_run_does_not_notice_that_the_controller_was_killed(desk: Desk, undisturbed: Path):
    desk = Desk(cluster=desk.cluster, code=ROOT, place=desk.place)
    desk.launch(*ON_CPU, *RUN, "name=orphan")
    job = jobs_of(desk.run("orphan") / "submission")["orphan"]
    desk.wait_until(lambda: steps(desk.run("orphan")) >= LATER, job)
    desk.cluster.end("slurmctld", kill=True)
    desk.cluster.start()
    desk.wait_for(job)
    assert differences(results(desk.run("orphan")), results(undisturbed)) == []
