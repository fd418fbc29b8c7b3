"""Whole runs at toy size: every experiment, a person's own data and models, and how a run ends badly."""

import fcntl
import json
from pathlib import Path

import pytest

from rlhf_lab.data.tables import read_table, write_table
from rlhf_lab.launch.compose import ROOT
from rlhf_lab.launch.execute import RunFailed, execute
from rlhf_lab.run import RunRefused, is_finished

pytestmark = pytest.mark.slow


def last_line(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture
def questions(tmp_path) -> Path:
    """A person's own prompts, some of several turns."""
    prompts = [f"how do I mend a bicycle number {i} ?" for i in range(30)]
    rows = [{"prompt": prompt} for prompt in prompts] + [{"prompt": [prompt, "ride it", "why ?"]} for prompt in prompts]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "questions.jsonl"


@pytest.mark.parametrize("experiment", sorted((ROOT / "experiments").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_runs_small(experiment, plan_of, smoke_runs, without_reports):
    reference = experiment.relative_to(ROOT / "experiments").with_suffix("")
    plan = plan_of(f"experiments={reference}", "debug=smoke", f"runs_dir={smoke_runs}")
    execute(plan)
    assert is_finished(plan.directory)
    assert plan.output.is_dir()


def test_evaluation_alone(plan_of, smoke_runs, without_reports):
    execute(plan_of("stage=evaluate", "debug=smoke", f"runs_dir={smoke_runs}", "name=evaluated"))
    assert any(key.startswith("eval/test/") for key in last_line(smoke_runs / "evaluated"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "gpt2", "opt"])
def test_own_model_and_own_data(architecture, hf_folder, questions, plan_of, smoke_runs, without_reports):
    plan = plan_of(
        *("dataset=table", "algorithm=ppo_lag", "reward=ensemble_uwo", "debug=smoke", f"runs_dir={smoke_runs}"),
        *(f"model.policy={hf_folder(architecture)}", f"dataset.path={questions}", f"name=own_{architecture}"),
    )
    execute(plan)
    line = last_line(plan.directory)
    assert any(key.startswith("eval/test/") for key in line)
    assert "gold/helpfulness/mean" not in line
    assert "held out as 'test'" in (plan.directory / "warnings.jsonl").read_text()


def test_the_command_line_from_nothing_to_a_finished_run(command_line, questions, hf_folder, smoke_runs):
    """What the README promises, as a person types it; then the same again, and with another configuration."""
    typed = ["algorithm=ppo_lag", "reward=ensemble_uwo", "debug=smoke", f"runs_dir={smoke_runs}", "name=typed"]
    typed += [f"model.policy={hf_folder('llama')}", f"dataset.path={questions}"]
    answer = command_line(*typed, MY_API_KEY="s3cr3t-v4lue")
    assert answer.returncode == 0, answer.stderr
    assert f"dataset=table, since dataset.path={questions}" in answer.stdout
    run = smoke_runs / "typed"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "report.html", "policy/model.safetensors"):
        assert (run / name).exists()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert not any(b"s3cr3t-v4lue" in path.read_bytes() for path in run.rglob("*") if path.is_file())

    written = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    again = command_line(*typed)
    assert again.returncode == 0
    assert f"{run} is finished already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written

    other = command_line(*typed, "algorithm.gamma=0.5")
    assert other.returncode == 2
    assert "algorithm.gamma: 1.0 -> 0.5" in other.stderr
    assert "name=" in other.stderr


def test_an_artifact_whose_builder_was_killed_after_its_last_result_is_completed(plan_of, smoke_runs):
    plan = plan_of("debug=smoke", "stage=annotate", f"runs_dir={smoke_runs}", "name=needs_a_page")
    execute(plan)
    artifact = plan.needs[0].directory
    (artifact / "report.html").unlink()
    half, spare = artifact / "plots/.overview.png.1.tmp", artifact / "checkpoints/step_000001"
    half.write_bytes(b"half")
    spare.mkdir(parents=True)
    with (artifact / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        execute(plan)  # its builder is still at it
        assert half.exists()
        assert spare.exists()
    execute(plan)
    assert (artifact / "report.html").exists()
    assert not half.exists()
    assert not spare.parent.exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_with_an_impossible_point_is_refused_whole(command_line, tmp_path):
    typed = ["-m", "algorithm=sft", "debug=smoke", f"runs_dir={tmp_path}", f"sweeps_dir={tmp_path}"]
    answer = command_line(*typed, "seed=0,1", "algorithm.spare=1")
    assert answer.returncode == 2
    answer = command_line(*typed, "seed=0,1,x")
    assert answer.returncode == 2
    assert "seed='x': must be a valid integer" in answer.stderr
    assert "1 of 3 points cannot run; nothing was started" in answer.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_runs_every_point_says_which_failed_and_draws_its_page(command_line, tmp_path):
    typed = ["-m", "algorithm=sft", "debug=smoke", f"runs_dir={tmp_path / 'runs'}", f"sweeps_dir={tmp_path}", "sweep=s"]
    answer = command_line(*typed, "learner.lr.policy=1e30,0.001")
    assert answer.returncode == 1
    assert "learner.lr.policy=1e+30" in answer.stderr
    names = ["sft-s0-learner.lr.policy=0.001", "sft-s0-learner.lr.policy=1e+30"]
    assert [is_finished(tmp_path / "s" / name) for name in names] == [True, False]
    assert "1 failed" in (tmp_path / "s/report.html").read_text()


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "x"}], "say which one it is with dataset.columns.prompt="),
        ([], "is empty"),
        ([{"prompt": f"p{i}", "response": "" if i == 7 else "r"} for i in range(20)], "1 with an empty response"),
    ],
)
def test_bad_data_are_refused_and_leave_nothing(rows, said, plan_of, tmp_path, without_reports):
    data = write(tmp_path / "d.jsonl", *rows)
    plan = plan_of("dataset=table", "algorithm=sft", f"dataset.path={data}", f"runs_dir={tmp_path / 'runs'}", "name=x")
    with pytest.raises(ValueError, match=said):
        execute(plan)
    assert not list((tmp_path / "runs").glob("*"))


def test_bad_rows_can_be_dropped_and_are_counted_loudly(plan_of, tmp_path, without_reports, capsys):
    data = write(tmp_path / "d.jsonl", *({"prompt": f"p{i}", "response": "" if i == 7 else "r"} for i in range(40)))
    plan = plan_of(
        *("dataset=table", "algorithm=sft", f"dataset.path={data}", "dataset.bad_rows=drop", "debug=smoke"),
        *(f"runs_dir={tmp_path / 'runs'}", "name=x", "tracker=none"),
    )
    execute(plan)
    assert "dropped 1 of" in capsys.readouterr().out
    assert "1 with an empty response" in (plan.directory / "warnings.jsonl").read_text()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("it broke\nbadly"), r"stopped: RuntimeError: it broke; the traceback is in .*error.txt"),
        (OSError(28, "No space left on device", "/full/disk"), r"No space left on device \(/full/disk\).*continues"),
    ],
)
def test_a_failure_says_where_and_can_be_continued(error, said, plan_of, tmp_path, without_reports, monkeypatch):
    from rlhf_lab.stages.train_offline import TrainOffline

    typed = ["algorithm=sft", "debug=smoke", f"runs_dir={tmp_path}", "name=x"]
    finished: list[str] = []

    def fail(self: object, run: object) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(TrainOffline, "run", fail)
        broken.setattr("rlhf_lab.tracking.NoTracker.finish", lambda self, state: finished.append(state))
        with pytest.raises(RunFailed, match=said):
            execute(plan_of(*typed))
    assert finished == ["failed"]
    assert json.loads((tmp_path / "x/status.json").read_text())["state"] == "failed"
    assert "test_execute.py" in (tmp_path / "x/error.txt").read_text()
    execute(plan_of(*typed))
    assert is_finished(tmp_path / "x")
    assert not (tmp_path / "x/error.txt").exists()


def test_an_artifact_of_another_configuration_is_refused(plan_of, tmp_path, without_reports):
    import yaml

    execute(plan_of("experiments=tiny_help/sft", "debug=smoke", f"runs_dir={tmp_path}"))
    frozen = tmp_path / "tiny_help/a0/sft/config.yaml"
    config = yaml.safe_load(frozen.read_text())
    config["stage"]["batch_size"] = 99
    frozen.write_text(yaml.safe_dump(config))
    with pytest.raises(RunRefused, match=r"another configuration \(stage.batch_size: 99 -> 16.*runs_dir="):
        execute(plan_of("stage=annotate", "debug=smoke", f"runs_dir={tmp_path}"))


def test_an_artifact_built_from_another_input_is_refused(plan_of, tmp_path, without_reports):
    typed = ["experiments=tiny_help/reward_model", "debug=smoke", f"runs_dir={tmp_path}"]
    execute(plan_of(*typed))
    [rows] = (tmp_path / "tiny_help/a0/preferences/data").glob("train.parquet")
    write_table(read_table(rows)[:-1], rows)
    with pytest.raises(RunRefused, match=r"reward_model_s0 was built from another .*preferences/data"):
        execute(plan_of("reward=single", "debug=smoke", f"runs_dir={tmp_path}"))
