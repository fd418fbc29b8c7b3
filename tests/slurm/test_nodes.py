"""Runs whose processes are on several nodes: they meet, agree where they continue, and lose nothing."""

import os
import signal
from pathlib import Path

import pytest

from rlhf_lab.launch.compose import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.desk import ON_CPU, Desk, differences, jobs_of, results, status, steps

pytestmark = pytest.mark.slurm

RUN = ("algorithm=rloo", "reward=single", "stage.steps=25", "stage.checkpoint_every=5", "num_processes=4")
FOUR = (*ON_CPU, *RUN, "executor.nodes=2", "executor.cpus=2", "executor.mem_gb=3")


@pytest.fixture(scope="module")
def desk(cluster: Cluster, shared_place: Path) -> Desk:
    return Desk(cluster=cluster, code=ROOT, place=shared_place)


def workers_of(name: str) -> list[int]:
    """The processes of the ranks of a run, on all nodes, which are all on this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "rlhf_lab.launch.worker" in words and any(f"/{name}/submission" in word for word in words):
            found.append(int(folder.name))
    return sorted(found)


@pytest.fixture(scope="module")
def undisturbed(desk: Desk) -> Path:
    """A run on two nodes that is left alone."""
    desk.launch(*FOUR, "name=four")
    job = jobs_of(desk.run("four") / "submission")["four"]
    desk.wait_until(lambda: steps(desk.run("four")) > 3, job)
    assert len(workers_of("four")) == 4
    desk.wait_for(job)
    assert desk.cluster.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%D") == "2"
    return desk.run("four")


@pytest.mark.slow
def test_two_nodes_with_two_processes_each_do_what_four_on_one_node_do(desk: Desk, undisturbed: Path):
    desk.launch("debug=smoke", *RUN, "name=one_node")
    assert differences(results(undisturbed), results(desk.run("one_node"))) == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [-1, 0])
def test_ranks_continue_together_after_one_of_them_was_killed(desk: Desk, undisturbed: Path, rank: int):
    name = f"killed{rank}"
    desk.launch(*FOUR, f"name={name}")
    job = jobs_of(desk.run(name) / "submission")[name]
    desk.wait_until(lambda: steps(desk.run(name)) > 12, job)
    os.kill(workers_of(name)[rank], signal.SIGKILL)
    desk.wait_for(job)
    assert status(desk.run(name))["sittings"] == 2
    assert differences(results(desk.run(name)), results(undisturbed)) == []


@pytest.mark.slow
def test_ranks_that_are_warned_stop_together_and_continue(desk: Desk, undisturbed: Path):
    desk.launch(*FOUR, "name=four_warned")
    job = jobs_of(desk.run("four_warned") / "submission")["four_warned"]
    desk.wait_until(lambda: steps(desk.run("four_warned")) > 12, job)
    desk.cluster.ask("scancel", "--signal=USR2", job)
    desk.wait_for(job)
    assert status(desk.run("four_warned"))["sittings"] == 2
    assert differences(results(desk.run("four_warned")), results(undisturbed)) == []
