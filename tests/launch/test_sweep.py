"""What is frozen of a sweep, and what comes back of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rlhf_lab.launch.compose import Plan
from rlhf_lab.launch.sweep import SUBMISSION, Sweep, find, freeze, jobs, names, record_job, shown
from rlhf_lab.report.sweep_runs import ABSENT, read_sweep
from rlhf_lab.run import RunRefused

GIT = {"sha": "abc", "dirty": True, "diff": "+ a line"}


def plan(directory: Path, *overrides: str, needs: tuple[Plan, ...] = (), **config: object) -> Plan:
    return Plan(
        directory=directory,
        config={"name": directory.name, "seed": 0, **config},
        overrides=overrides,
        num_processes=2,
        needs=needs,
    )


def frozen(root: Path, *plans: Plan) -> Sweep:
    return freeze(root, plans, command="python launch.py -m …", git=GIT, executor={"kind": "here"})


def study(root: Path) -> list[Plan]:
    base = plan(root.parent / "runs/base")
    members = [plan(root.parent / f"runs/member{k}", needs=(base,)) for k in range(2)]
    return [
        plan(root / f"{method}-s{seed}", f"algorithm={method}", f"seed={seed}", "steps=3", needs=(base, *members))
        for method in ("ppo", "rloo")
        for seed in (0, 1)
    ]


def test_what_was_frozen_comes_back(tmp_path: Path):
    root = tmp_path / "sweep"
    plans = study(root)
    sweep = frozen(root, *plans)
    assert sweep == Sweep.read(root)
    assert sweep.factors == {"algorithm": ("ppo", "rloo"), "seed": ("0", "1")}
    assert [dict(run.factors) for run in sweep.runs][1] == {"algorithm": "ppo", "seed": "1"}
    assert [sweep.plan(run.plan) for run in sweep.runs] == plans
    thawed = sweep.plan(sweep.runs[0].plan)
    assert [need.directory.name for need in thawed.needs] == ["base", "member0", "member1"]
    assert thawed.needs[1].needs[0] is thawed.needs[0]
    assert [one.directory.name for one in sweep.artifacts] == ["base", "member0", "member1"]
    assert len(list((root / "plans").iterdir())) == 4 + 3


def test_each_run_has_its_configuration_before_it_starts(tmp_path: Path):
    sweep = frozen(tmp_path / "sweep", *study(tmp_path / "sweep"))
    for run in sweep.runs:
        assert yaml.safe_load((run.directory / "config.yaml").read_text()) == sweep.plan(run.plan).config
        assert tuple(yaml.safe_load((run.directory / "overrides.yaml").read_text())) == run.overrides


def test_a_plan_that_was_changed_on_disk_is_refused(tmp_path: Path):
    sweep = frozen(tmp_path / "sweep", *study(tmp_path / "sweep"))
    file = sweep.root / "plans" / f"{sweep.runs[0].plan}.json"
    stored = json.loads(file.read_text())
    stored["config"]["seed"] = 7
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="is not what was frozen"):
        sweep.plan(sweep.runs[0].plan)


def test_two_points_of_one_directory_are_refused(tmp_path: Path):
    root = tmp_path / "sweep"
    twice = [plan(root / "mine", "seed=0"), plan(root / "mine", "seed=1")]
    with pytest.raises(RunRefused, match=r"would share .*mine: seed=0 and seed=1.*name= away"):
        frozen(root, *twice)
    assert not root.exists()


def test_freezing_again_adds_runs_and_refuses_others_of_the_same_name(tmp_path: Path):
    root = tmp_path / "sweep"
    first, *others = study(root)
    frozen(root, first)
    sweep = frozen(root, *others[:1], first)
    assert [run.name for run in sweep.runs] == [first.directory.name, others[0].directory.name]
    assert sweep.factors == {"seed": ("0", "1")}
    with pytest.raises(RunRefused, match=r"another configuration .seed: 0 -> 5.*sweep="):
        frozen(root, replace(first, config=first.config | {"seed": 5}))


def test_a_sweep_that_is_typed_again_holds_each_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    plans = study(Path("sweeps/mine"))  # relative, as the command line names it
    once = frozen(Path("sweeps/mine"), *plans)
    assert frozen(Path("sweeps/mine"), *plans) == once
    assert len(Sweep.read(Path("sweeps/mine")).runs) == 4


def test_what_only_the_runs_that_were_added_say_varies_too(tmp_path: Path):
    root = tmp_path / "sweep"
    frozen(root, *[plan(root / f"default-s{seed}", f"seed={seed}") for seed in (0, 1)])
    added = [plan(root / f"rloo-s{seed}", "algorithm=rloo", f"seed={seed}") for seed in (0, 1)]
    sweep = frozen(root, *added)
    assert sweep.factors == {"seed": ("0", "1"), "algorithm": ("rloo",)}
    members = read_sweep(root).members
    assert [member.factors["algorithm"] for member in members] == [ABSENT, ABSENT, "rloo", "rloo"]


def test_a_moved_sweep_finds_its_runs(tmp_path: Path):
    frozen(tmp_path / "sweep", *study(tmp_path / "sweep"))
    shutil.move(tmp_path / "sweep", tmp_path / "elsewhere")
    sweep = Sweep.read(tmp_path / "elsewhere")
    assert all((run.directory / "config.yaml").exists() for run in sweep.runs)


def test_a_sweep_is_found_by_name_path_and_as_a_run_that_was_submitted_alone(tmp_path: Path):
    sweeps, runs = tmp_path / "sweeps", tmp_path / "runs"
    frozen(sweeps / "big", *study(sweeps / "big"))
    frozen(runs / "alone" / SUBMISSION, plan(runs / "alone", "seed=0"))
    assert find("big", sweeps, runs) == find(str(sweeps / "big"), sweeps, runs)
    alone = find("alone", sweeps, runs)
    assert alone == find(str(runs / "alone"), sweeps, runs)
    assert (alone.name, [run.directory for run in alone.runs]) == ("alone", [runs / "alone"])
    assert set(names(sweeps, runs)) == {"big", "alone"}
    with pytest.raises(ValueError, match="no sweep 'bgi'; did you mean 'big'"):
        find("bgi", sweeps, runs)


@pytest.mark.parametrize("run", ["runs/tiny_help/alone", "sweeps/mine/alone", "elsewhere/alone", "runs/plain"])
def test_a_run_that_was_submitted_alone_is_found_and_listed_by_the_name_that_is_printed(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    directory = Path(run)
    sweep = frozen(directory / SUBMISSION, plan(directory, "seed=0"))
    (directory / "checkpoints/step_1").mkdir(parents=True)
    frozen(Path("sweeps/mine"), plan(Path("sweeps/mine/s0"), "seed=0"))
    assert find(shown(sweep), Path("sweeps"), Path("runs")) == sweep
    listed = list(names(Path("sweeps"), Path("runs")))
    assert "mine" in listed
    assert shown(sweep) in listed or run.startswith("elsewhere")
    assert all(find(name, Path("sweeps"), Path("runs")) for name in listed)


def test_jobs_are_noted_in_order(tmp_path: Path):
    assert jobs(tmp_path) == []
    for k in range(2):
        record_job(tmp_path, job=f"7_{k}", executor="slurm", plan=f"p{k}")
    assert [(job["job"], job["plan"]) for job in jobs(tmp_path)] == [("7_0", "p0"), ("7_1", "p1")]
