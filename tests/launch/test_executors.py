"""Settings of executors, the text that sbatch gets, and whole sweeps in the background."""

import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from submitit.slurm.slurm import _make_sbatch_string

from rlhf_lab.launch import claims, slurm, snapshot
from rlhf_lab.launch.check import BadConfig
from rlhf_lab.launch.compose import ROOT, Plan
from rlhf_lab.launch.executors import Here, Pool, Slurm, revive
from rlhf_lab.launch.job import Task
from rlhf_lab.launch.pool import is_alive, process_started
from rlhf_lab.launch.sweep import Sweep, freeze, jobs, record_job


def node(*overrides: str, conf: Path = ROOT / "conf") -> dict[str, Any]:
    """`executor` as a command line composes it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        composed = OmegaConf.to_container(compose("config", overrides=list(overrides)).executor, resolve=True)
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


def cluster(*overrides: str) -> Slurm:
    return instantiate(node("executor=slurm", *overrides))


def sweep_at(root: Path) -> Sweep:
    """A sweep of nothing."""
    return Sweep(
        root=root,
        name="my sweep",
        command="",
        cwd=root.parent,
        created="",
        git={},
        factors={},
        runs=(),
        artifacts=(),
        executor={},
    )


def sbatch_text(root: Path, settings: Slurm, after: tuple[str, ...] = (), size: int = 12) -> str:
    given = slurm.parameters(settings, sweep_at(root), root / "code", "my sweep", after, size)
    return _make_sbatch_string(command="the command", folder=root / "log", map_count=size, **given)


def options(text: str) -> dict[str, str]:
    """Of the lines `#SBATCH --key=value`."""
    lines = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    return {line.removeprefix("--").partition("=")[0]: line.partition("=")[2] for line in lines}


def test_every_executor_composes_and_builds():
    kinds = {path.stem: instantiate(node(f"executor={path.stem}")) for path in (ROOT / "conf/executor").glob("*.yaml")}
    assert {name: type(executor) for name, executor in kinds.items()} == {"here": Here, "pool": Pool, "slurm": Slurm}
    assert {name: executor.kind for name, executor in kinds.items()} == {name: name for name in kinds}


@pytest.mark.parametrize(
    ("hardware", "device", "gres"),
    [
        ("slurm_cpu", "cpu", None),
        ("slurm_gpu", "cuda", "gpu:1"),
        ("slurm_ddp", "cuda", "gpu:2"),
        ("slurm_zero3", "cuda", "gpu:2"),
    ],
)
def test_hardware_of_a_cluster_chooses_the_executor_too(hardware, device, gres):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[f"hardware={hardware}", "executor.partition=night"])
    assert config.hardware.device == device
    assert (config.executor.partition, config.executor.gres) == ("night", gres)
    assert isinstance(instantiate(config.executor), Slurm)


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A copy of the configuration, for settings of a machine."""
    return Path(shutil.copytree(ROOT / "conf", tmp_path / "conf", ignore=shutil.ignore_patterns("local")))


def test_the_settings_of_a_site_are_picked_up_by_the_cluster_and_by_nothing_else(conf):
    (conf / "local").mkdir()
    (conf / "local" / "slurm.yaml").write_text("partition: night\naccount: lab\ngres: gpu:a100:1\n")
    assert node("executor=slurm", conf=conf).items() >= {("partition", "night"), ("account", "lab"), ("cpus", 2)}
    assert node("hardware=slurm_gpu", "executor.account=mine", conf=conf).items() >= {
        ("partition", "night"),
        ("account", "mine"),
    }
    assert "partition" not in node(conf=conf)


def test_a_machine_may_have_an_executor_of_its_own(conf):
    (conf / "local").mkdir()
    (conf / "local" / "default.yaml").write_text(
        "# @package _global_\ndefaults: [override /executor: pool, _self_]\nexecutor: {at_once: 7}\n"
    )
    assert node(conf=conf).items() >= {("_target_", "rlhf_lab.launch.executors.Pool"), ("at_once", 7)}


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("executor.partion=a", "partion"),
        ("executor.cpus=0", "executor.cpus=0"),
        ("executor.mem_gb=lots", "executor.mem_gb='lots'"),
        ("executor.gres=1", "executor.gres=1"),
        ("executor.setup=module", "executor.setup='module'"),
        ("executor.time_min=1.5", "executor.time_min=1.5"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_submitted(plan_of, typed, says):
    with pytest.raises(Exception, match=r".") as refused:
        plan_of("executor=slurm", typed)
    assert says in str(refused.value)
    if "partion" not in typed:
        assert isinstance(refused.value, BadConfig)


def test_a_warning_that_comes_before_the_run_is_refused():
    with pytest.raises(Exception, match=r"signal_delay_s=120 is not shorter than executor.time_min=2"):
        cluster("executor.time_min=2")


def test_sbatch_is_told_every_setting(tmp_path):
    settings = cluster(
        "executor.partition=night",
        "executor.account=lab",
        "executor.qos=long",
        "executor.constraint=a100",
        "executor.gres=gpu:2",
        "executor.nodes=2",
        "executor.cpus=3",
        "executor.mem_gb=1.5",
        "executor.time_min=90",
        "executor.signal_delay_s=77",
        "executor.at_once=4",
        "+executor.extra.exclude=node7",
        "+executor.extra.mail-type=FAIL",
    )
    text = sbatch_text(tmp_path, settings, after=("41", "42_1"))
    (step,) = (shlex.split(line) for line in text.splitlines() if line.startswith("srun"))
    assert "--cpus-per-task=3" in step  # which a step no longer takes over from its job
    told = options(text)
    assert (
        told.items()
        >= {
            "partition": "night",
            "account": "lab",
            "qos": "long",
            "constraint": "a100",
            "gres": "gpu:2",
            "nodes": "2",
            "ntasks-per-node": "1",
            "cpus-per-task": "3",
            "mem": "1536M",
            "time": "90",
            "signal": "USR2@77",
            "array": "0-11%4",
            "dependency": "afterany:41:42_1",
            "requeue": "",
            "chdir": str(tmp_path.parent),
            "exclude": "node7",
            "mail-type": "FAIL",
            "job-name": "my sweep",
        }.items()
    )


def test_sbatch_is_not_told_what_nobody_set(tmp_path):
    told = options(sbatch_text(tmp_path, cluster()))
    assert not {"partition", "account", "qos", "constraint", "gres", "dependency"} & told.keys()
    assert told["array"] == "0-11%12"


def batch_script_ends(root: Path, how: str, restarts: int) -> tuple[int, list[str]]:
    """Run the batch script with a step that ends so; its exit code and the jobs that it had requeued."""
    text = sbatch_text(root, cluster(f"executor.restarts={restarts}"), size=1).replace("srun ", "step ")
    tools = root / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "step").write_text(f"#!/bin/bash\n{how}\n")
    (tools / "scontrol").write_text(f"#!/bin/bash\necho $@ >> {root}/requeued\n")
    (tools / "sleep").write_text("#!/bin/bash\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    ended = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, check=False)
    requeued = root / "requeued"
    return ended.returncode, requeued.read_text().splitlines() if requeued.exists() else []


def test_a_batch_script_ends_as_its_step_did_and_requeues_only_after_a_kill(tmp_path):
    (tmp_path / "log").mkdir()
    for code in (0, 1, 75, 255):
        assert batch_script_ends(tmp_path, f"exit {code}", restarts=2) == (code, [])
    for times in (1, 2):
        assert batch_script_ends(tmp_path, "kill -9 $$", restarts=2) == (137, ["requeue 7_3"] * times)
    assert batch_script_ends(tmp_path, "kill -9 $$", restarts=2) == (137, ["requeue 7_3"] * 2)


def test_a_job_that_is_warned_before_it_listens_is_requeued(tmp_path):
    (tmp_path / "log").mkdir()
    assert batch_script_ends(tmp_path, "kill -USR2 $$", restarts=1) == (140, ["requeue 7_3"])


@pytest.mark.parametrize(
    ("extra", "says"), [("gres", "set executor.gres"), ("cpus_per_task", "set executor.cpus"), ("signal", "remove it")]
)
def test_an_extra_option_that_is_a_setting_is_refused(extra, says):
    with pytest.raises(ValueError, match=says):
        slurm.refuse_extra({extra: "1"})
    slurm.refuse_extra({"exclude": "node7"})


@pytest.mark.parametrize("name", ["here", "pool", "slurm"])
def test_an_executor_comes_back_from_what_a_sweep_says_of_it(name):
    settings = {key: value for key, value in node(f"executor={name}").items() if key != "_target_"}
    stored = json.loads(json.dumps({"kind": name, **settings}))
    executor = revive(stored)
    assert dataclasses.asdict(executor) == settings
    assert executor.kind == name
    with pytest.raises(ValueError, match=r"another version: the settings colour"):
        revive({**stored, "colour": "red"})
    with pytest.raises(ValueError, match=r"executor='slrm' is no kind of executor; did you mean 'slurm'\?"):
        revive({"kind": "slrm"})


@pytest.mark.parametrize("name", ["pool", "slurm"])
def test_without_submitit_a_person_is_told_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install -e \"\.\[slurm\]\""):
        instantiate(node(f"executor={name}")).submit(sweep_at(tmp_path))


def test_without_a_cluster_a_person_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no scontrol here.*executor=pool"):
        cluster().submit(sweep_at(tmp_path))


def test_a_snapshot_holds_the_files_as_they_are_and_stays(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b"]
    (project / ".gitignore").write_text("runs/\n")
    for name in ("same.py", "changed.py", "deleted.py"):
        (project / name).write_text("old")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    (project / "changed.py").write_text("new")
    (project / "deleted.py").unlink()
    (project / "package").mkdir()
    (project / "package" / "added.py").write_text("new")
    (project / "runs").mkdir()
    (project / "runs" / "big").write_text("weights")
    monkeypatch.setattr(snapshot, "ROOT", project)

    code = snapshot.snapshot(tmp_path / "sweep")
    held = {str(file.relative_to(code)): file.read_text() for file in code.rglob("*") if file.is_file()}
    assert held == {".gitignore": "runs/\n", "same.py": "old", "changed.py": "new", "package/added.py": "new"}
    (project / "same.py").write_text("later")
    assert (snapshot.snapshot(tmp_path / "sweep") / "same.py").read_text() == "old"


def test_a_job_imports_the_project_from_one_place(tmp_path):
    """Although it is started where other code of that name lies, and with other code on its path."""
    for place in ("snapshot", "here", "elsewhere"):
        (tmp_path / place / "rlhf_lab").mkdir(parents=True)
        (tmp_path / place / "rlhf_lab" / "__init__.py").write_text(f"PLACE = {place!r}")
    (tmp_path / "here" / "asks.py").write_text("import rlhf_lab; print(rlhf_lab.PLACE)")
    script = "\n".join([*snapshot.environment(tmp_path / "snapshot"), f"{sys.executable} -m rlhf_lab.launch.none"])
    script = script.replace("-m rlhf_lab.launch.none", "-c 'import rlhf_lab; print(rlhf_lab.PLACE)'")
    said = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "elsewhere")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "snapshot"


def artifact(root: Path, name: str) -> Task:
    return Task(root=root, digest=name, directory=root / "runs" / name, num_processes=1, needs=())


def test_an_artifact_is_claimed_until_its_job_is_over(tmp_path, monkeypatch):
    live = {"5_1"}
    monkeypatch.setattr(claims, "live_jobs", lambda ids: live & set(ids))
    one, other = artifact(tmp_path, "one"), artifact(tmp_path, "other")
    with claims.claiming([one, other]) as builders:
        assert builders == {"one": None, "other": None}
        claims.claim(one, "5_1", sweep_at(tmp_path))
    with claims.claiming([one, other]) as builders:
        assert builders == {"one": "5_1", "other": None}
    live.clear()
    with claims.claiming([one]) as builders:
        assert builders == {"one": None}


CLAIMS = """
import sys
from pathlib import Path
from rlhf_lab.launch import claims
from tests.launch.test_executors import artifact
root = Path(sys.argv[1])
(root / "arrives").touch()
with claims.claiming([artifact(root, "one")]):
    (root / "claims").touch()
    sys.stdin.readline()
"""


def test_two_sweeps_do_not_claim_an_artifact_at_the_same_time(tmp_path):
    started = [sys.executable, "-c", CLAIMS, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(started, stdin=subprocess.PIPE, env=environment, cwd=ROOT)
    eventually((tmp_path / "claims").exists)
    (tmp_path / "claims").unlink()
    (tmp_path / "arrives").unlink()
    second = subprocess.Popen(started, stdin=subprocess.PIPE, env=environment, cwd=ROOT)
    eventually((tmp_path / "arrives").exists)
    time.sleep(1)
    assert not (tmp_path / "claims").exists()
    first.kill()  # a launcher that dies leaves no lock
    eventually((tmp_path / "claims").exists)
    second.communicate(b"\n")
    first.wait()


def eventually(condition: Callable[[], object], seconds: float = 150) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s in vain"
        time.sleep(0.1)


def only_sweep(sweeps: Path) -> Sweep:
    (found,) = sweeps.glob("*/sweep.json")
    return Sweep.read(found.parent)


def states(sweep: Sweep) -> dict[str, str]:
    said = {run.directory: run.directory / "status.json" for run in (*sweep.runs, *sweep.artifacts)}
    return {d.name: json.loads(file.read_text())["state"] if file.exists() else "pending" for d, file in said.items()}


@pytest.mark.parametrize("kind", ["pool", "slurm"])
def test_a_sweep_is_submitted_by_one_command_at_a_time(tmp_path, monkeypatch, kind):
    def submit(settings: Any, sweep: Sweep) -> list[Any]:
        with (sweep.root / ".submitting").open("a") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ["once"]

    monkeypatch.setattr(f"rlhf_lab.launch.{kind}.submit", submit)
    assert instantiate(node(f"executor={kind}")).submit(sweep_at(tmp_path)) == ["once"]


def test_a_run_that_is_under_way_is_not_started_again_when_what_it_needs_was_mended(tmp_path, capsys):
    def sweep(steps: int) -> Sweep:
        artifact = Plan(directory=tmp_path / "artifact", config={"steps": steps}, overrides=(), num_processes=1)
        run = Plan(directory=tmp_path / "s/run", config={}, overrides=(), num_processes=1, needs=(artifact,))
        return freeze(tmp_path / "s", [run], command="", git={"sha": "", "dirty": "", "diff": ""}, executor={})

    before = sweep(1)
    facts = {"host": socket.gethostname(), "process_started": process_started(os.getpid())}
    record_job(before.root, job=str(os.getpid()), executor="pool", plan=before.runs[0].plan, **facts)
    after = sweep(2)
    assert after.runs[0].plan != before.runs[0].plan
    assert Pool(at_once=1, devices=None, restarts=0).submit(after) == []
    assert "nothing was started" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pool_finishes_a_sweep_after_the_launcher_is_gone(command_line, tmp_path):
    typed = ("-m", "debug=smoke", "algorithm=sft,dpo", "seed=0,1", "executor=pool", "executor.at_once=2")
    places = (f"runs_dir={tmp_path / 'runs'}", f"sweeps_dir={tmp_path / 'sweeps'}")
    said = command_line(*typed, *places, timeout=300)
    assert said.returncode == 0, said.stderr
    sweep = only_sweep(tmp_path / "sweeps")
    noted = jobs(sweep.root)
    assert {job["plan"] for job in noted} == {one.plan for one in (*sweep.runs, *sweep.artifacts)}
    assert all(is_alive(job) for job in noted)
    again = command_line(*typed, *places, timeout=300)  # nothing is started twice
    assert "under way" in again.stdout
    eventually(lambda: not is_alive(noted[0]), 500)
    assert set(states(sweep).values()) == {"finished"}
    for job in noted:
        assert (sweep.root / job["log"]).read_text()


@pytest.mark.slow
def test_an_artifact_that_fails_fails_what_needs_it_and_nothing_else(command_line, tmp_path):
    refused = tmp_path / "runs" / "tiny_help" / "a0" / "sft"
    refused.mkdir(parents=True)
    (refused / "config.yaml").write_text("{seed: 7}")  # somebody's else
    typed = ("-m", "debug=smoke", "algorithm=sft,rloo", "executor=pool")
    said = command_line(*typed, f"runs_dir={tmp_path / 'runs'}", f"sweeps_dir={tmp_path / 'sweeps'}", timeout=300)
    assert said.returncode == 0, said.stderr
    sweep = only_sweep(tmp_path / "sweeps")
    (job, *_) = jobs(sweep.root)
    eventually(lambda: not is_alive(job), 500)
    good, bad = sorted(sweep.runs, key=lambda run: "rloo" in run.name)
    assert states(sweep)[good.directory.name] == "finished"
    assert states(sweep)[bad.directory.name] == "failed"
    reason = json.loads((bad.directory / "status.json").read_text())["error"]
    assert "did not finish" in reason
    assert "another configuration" in reason


@pytest.mark.slow
@pytest.mark.long
def test_a_pool_that_is_asked_to_stop_saves_and_the_same_command_continues(command_line, tmp_path):
    typed = ("-m", "debug=smoke", "algorithm=sft", "seed=0,1,2", "stage.epochs=60", "executor=pool")
    places = (f"runs_dir={tmp_path / 'runs'}", f"sweeps_dir={tmp_path / 'sweeps'}")
    assert command_line(*typed, *places, timeout=300).returncode == 0
    sweep = only_sweep(tmp_path / "sweeps")
    (job, *_) = jobs(sweep.root)
    eventually(lambda: list(states(sweep).values()).count("running") == 2)
    os.kill(int(job["job"]), signal.SIGTERM)
    eventually(lambda: not is_alive(job))
    assert sorted(states(sweep).values()) == ["pending", "stopped", "stopped"]
    assert command_line(*typed, *places, timeout=300).returncode == 0
    eventually(lambda: set(states(sweep).values()) == {"finished"}, 500)


@pytest.mark.slow
@pytest.mark.long
def test_a_pool_whose_process_is_killed_leaves_no_worker(command_line, tmp_path):
    typed = ("-m", "debug=smoke", "algorithm=sft", "seed=0,1", "stage.epochs=60", "executor=pool")
    places = (f"runs_dir={tmp_path / 'runs'}", f"sweeps_dir={tmp_path / 'sweeps'}")
    assert command_line(*typed, *places, timeout=300).returncode == 0
    sweep = only_sweep(tmp_path / "sweeps")
    (job, *_) = jobs(sweep.root)
    eventually(lambda: list(states(sweep).values()).count("running") == 2)
    workers = [json.loads((run.directory / "status.json").read_text())["process"] for run in sweep.runs]
    os.kill(int(job["job"]), signal.SIGKILL)
    eventually(lambda: all(process_started(worker) is None for worker in workers))
