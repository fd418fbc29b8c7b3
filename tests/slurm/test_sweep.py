"""Sweeps on the cluster: one array, frozen; what fails, what is cancelled and retried, artifacts that are shared."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf_lab.launch.compose import ROOT
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.desk import ON_CPU, ON_GPU, PATIENCE, Desk, differences, jobs_of, results, status, steps, submitted

pytestmark = pytest.mark.slurm

# so many steps that a run is still at them when the command that cancels it has started
LONG = ("algorithm=ppo_lag", "reward=single", "stage.prompts_per_step=48", "stage.steps=90", "stage.checkpoint_every=5")


@pytest.fixture(scope="module")
def desk(cluster: Cluster, shared_place: Path) -> Desk:
    return Desk(cluster=cluster, code=ROOT, place=shared_place)


@pytest.mark.parametrize("rewards", ["ensemble_uwo", pytest.param("single,ensemble_uwo", marks=pytest.mark.slow)])
def test_the_runs_of_a_sweep_are_one_array_with_a_gpu_each_and_a_page(rewards: str, desk: Desk):
    name = f"sweep_of_{rewards.count(',') + 1}"
    number = 6 * (rewards.count(",") + 1)
    said = desk.launch("-m", *ON_GPU, "algorithm=ppo,ppo_lag", f"reward={rewards}", "seed=0,1,2", f"sweep={name}")
    root = desk.sweep(name)
    jobs = jobs_of(root)
    assert len(jobs) == number
    (array,) = {job.partition("_")[0] for job in jobs.values()}
    assert array in said
    assert "status=" in said
    asked_for = desk.cluster.ask("squeue", "-h", "-r", "-t", "all", "-j", array, "-o", "%b").split()
    assert asked_for == ["gres:gpu:1"] * number
    # it did not wait for them
    assert {desk.state(job) for job in jobs.values()} <= {"PENDING", "CONFIGURING", "RUNNING"}

    for job in jobs.values():
        desk.wait_for(job)
    assert wait_until(lambda: desk.accounted(list(jobs.values())) == {"COMPLETED 0:0"}, 60)
    table = desk.launch(f"status={name}")
    assert f"{number} finished" in table
    desk.launch(f"report={name}")
    page = (root / "report.html").read_text()
    assert all(name in page for name in jobs)
    assert (root / "metrics.csv").exists()


def test_a_run_that_fails_is_failed_for_slurm_too_and_is_what_retry_starts(desk: Desk):
    obstacle = desk.sweep("one_fails") / "rloo-single-s1/metrics.jsonl"  # a folder where a file should be
    obstacle.mkdir(parents=True)
    sweep = ("-m", *ON_CPU, "algorithm=rloo", "reward=single", "seed=0,1,2", "sweep=one_fails")
    desk.launch(*sweep)
    root = desk.sweep("one_fails")
    jobs = jobs_of(root)
    ends = {name: "FAILED" if name.endswith("s1") else "COMPLETED" for name in jobs}
    for name, job in jobs.items():
        desk.wait_for(job, ends[name])
    assert wait_until(lambda: desk.accounted([jobs["rloo-single-s1"]]) == {"FAILED 1:0"}, 60)
    failed = status(root / "rloo-single-s1")
    assert failed["state"] == "failed"
    assert "metrics.jsonl" in failed["error"]
    table = desk.launch("status=one_fails")
    assert "1 failed" in table
    assert "2 finished" in table

    obstacle.rmdir()
    desk.launch("retry=one_fails")
    again = jobs_of(root)
    assert {name for name in again if again[name] != jobs[name]} == {"rloo-single-s1"}
    desk.wait_for(again["rloo-single-s1"])
    assert status(root / "rloo-single-s1")["state"] == "finished"


@pytest.mark.slow
def test_cancel_ends_the_jobs_of_a_sweep_alone_and_retry_continues_them(desk: Desk):
    desk.launch("-m", *ON_CPU, *LONG, "seed=0,1", "sweep=given_up", "executor.at_once=1")
    desk.launch("-m", *ON_CPU, *LONG, "seed=0,1", "sweep=bystander")
    ours, theirs = (jobs_of(desk.sweep(name)) for name in ("given_up", "bystander"))
    first, second = (desk.sweep("given_up") / name for name in sorted(ours))
    desk.wait_until(lambda: steps(first) > 5, ours[first.name])
    desk.launch("cancel=given_up")
    assert wait_until(lambda: all("CANCELLED" in desk.state(job) for job in ours.values()), 60)
    assert not any("CANCELLED" in desk.state(job) for job in theirs.values())
    assert "2 cancelled" in desk.launch("status=given_up")
    assert not (second / "status.json").exists()  # one at a time

    desk.launch("retry=given_up", "executor.at_once=2")
    again = jobs_of(desk.sweep("given_up"))
    assert set(again.values()).isdisjoint(ours.values())
    for job in (*again.values(), *theirs.values()):
        desk.wait_for(job)
    assert status(first)["sittings"] == 2
    for run in (first, second):
        assert differences(results(run), results(desk.sweep("bystander") / run.name)) == []


@pytest.mark.slow
def test_an_artifact_that_two_sweeps_need_is_built_once_though_its_builder_is_killed(desk: Desk, tmp_path: Path):
    desk = Desk(cluster=desk.cluster, code=ROOT, place=tmp_path)
    with ThreadPoolExecutor(2) as at_once:  # both find that nothing is there
        both = [
            at_once.submit(desk.launch, "-m", *ON_CPU, "algorithm=dpo", f"seed={seeds}", f"sweep={name}")
            for name, seeds in (("one", "0,1"), ("other", "2,3"))
        ]
        for submission in both:
            submission.result()
    builders = {
        plan: job["job"]
        for name in ("one", "other")
        for job in submitted(desk.sweep(name))
        if (plan := job["plan"]) in {one["plan"] for one in sweep_of(desk, name)["artifacts"]}
    }
    noted = [job["job"] for name in ("one", "other") for job in submitted(desk.sweep(name))]
    assert len(noted) == 4 + len(builders)  # a job for each run and each artifact
    builder = desk.run("tiny_help/a0/preferences")
    assert wait_until((builder / "status.json").exists, PATIENCE)
    (job,) = {builders[one["plan"]] for one in sweep_of(desk, "one")["artifacts"] if one["directory"] == str(builder)}
    desk.cluster.ask("scancel", "--signal=KILL", f"{job}.0")
    for root in (desk.sweep("one"), desk.sweep("other")):
        for job in jobs_of(root).values():
            desk.wait_for(job)
    assert status(builder)["sittings"] == 2


def sweep_of(desk: Desk, name: str) -> dict:
    """What was frozen of a sweep."""
    return json.loads((desk.sweep(name) / "sweep.json").read_text())
