"""The same command gives the same numbers: twice, after kill -9 at any step, and beside another process."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_lab.engine.accounting import CLOCKED
from rlhf_lab.launch.compose import ROOT
from rlhf_lab.launch.execute import RunFailed, execute
from rlhf_lab.run import is_finished

pytestmark = pytest.mark.slow


def metrics(run: Path) -> list[dict]:
    """The lines of a run's log, but for the time that they took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKED)} for line in lines]


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    differing = {
        (line["step"], key): (line.get(key), other.get(key))
        for line, other in zip(found, expected, strict=True)
        for key in line.keys() | other.keys()
        if line.get(key) != other.get(key)
    }
    assert differing == {}


def samples(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((run / "samples").glob("*"))}


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killed_when(process: subprocess.Popen[str], reached) -> None:
    """kill -9 as soon as `reached()`; the process must not have come to its end before."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def lines_in(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


RL = ["debug=smoke", "stage.steps=8", "stage.checkpoint_every=3", "stage.evaluate_every=4"]
SFT = ["debug=smoke", "algorithm=sft", "stage.epochs=8", "stage.checkpoint_every=5", "stage.evaluate_every=6"]


def test_the_same_seed_twice_gives_the_same_run_and_another_seed_another(plan_of, smoke_runs, without_reports):
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        execute(plan_of(*RL, f"runs_dir={smoke_runs}", f"name={name}", f"seed={seed}"))
    assert [line["step"] for line in metrics(smoke_runs / "first")] == list(range(9))  # 0: before the first
    assert_same(metrics(smoke_runs / "first"), metrics(smoke_runs / "second"))
    assert samples(smoke_runs / "first") == samples(smoke_runs / "second")
    assert list(samples(smoke_runs / "first")) == ["step_000000.jsonl", "step_000004.jsonl", "step_000008.jsonl"]
    assert metrics(smoke_runs / "first") != metrics(smoke_runs / "other")
    weights = [(smoke_runs / name / "policy/model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_what_was_measured_before_training_stays_beside_what_was_measured_after_each_step(
    plan_of, smoke_runs, without_reports
):
    run = smoke_runs / "each"
    execute(plan_of("debug=smoke", "stage.evaluate_every=1", f"runs_dir={smoke_runs}", f"name={run.name}"))
    for line in metrics(run):
        table = (run / f"samples/step_{line['step']:06d}.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, table) if row["split"] == "test"]
        mean = sum(row["scores"]["helpful"] for row in rows) / len(rows)
        assert line["eval/test/rewards/helpful/mean"] == pytest.approx(mean, abs=1e-5)
    first, second, third = (line["eval/test/rewards/helpful/mean"] for line in metrics(run))
    assert len({first, second, third}) == 3


def test_samples_of_an_evaluation_at_a_checkpoint_survive_a_resume(plan_of, smoke_runs, without_reports, monkeypatch):
    run = smoke_runs / "stopped_late"
    typed = ["debug=smoke", "stage.checkpoint_every=1", f"runs_dir={smoke_runs}", f"name={run.name}"]
    monkeypatch.setattr("rlhf_lab.stages.train_online.save_model", stop_here)
    with pytest.raises(RunFailed):
        execute(plan_of(*typed))  # every step is done, and the policy not yet written
    monkeypatch.undo()
    execute(plan_of(*typed))
    assert list(samples(run)) == ["step_000000.jsonl", "step_000002.jsonl"]
    assert [line["step"] for line in metrics(run)] == [0, 1, 2]
    assert json.loads((run / "status.json").read_text())["metrics"]["episode"] == 16.0


def stop_here(*_: object) -> None:
    raise RuntimeError("stopped")


@pytest.mark.parametrize(("kind", "typed"), [("rl", RL), ("sft", SFT)])
def test_a_killed_run_continues_as_if_it_had_not_been(kind, typed, plan_of, smoke_runs, without_reports):
    whole, broken = smoke_runs / f"{kind}_whole", smoke_runs / f"{kind}_broken"
    execute(plan_of(*typed, f"runs_dir={smoke_runs}", f"name={whole.name}"))
    stop = random.randrange(1, len(metrics(whole)) - 1)  # any step will do
    process = start(*typed, f"runs_dir={smoke_runs}", f"name={broken.name}")
    killed_when(process, lambda: lines_in(broken / "metrics.jsonl") >= stop)
    assert not is_finished(broken)
    execute(plan_of(*typed, f"runs_dir={smoke_runs}", f"name={broken.name}"))
    assert_same(metrics(broken), metrics(whole))
    if kind == "rl":
        assert samples(broken) == samples(whole)
        assert is_finished(broken)


def test_killed_annotation_continues_after_its_last_shard(plan_of, smoke_runs, without_reports):
    typed = ["debug=smoke", "stage=annotate", "stage.prompts_per_shard=4", f"runs_dir={smoke_runs}"]
    execute(plan_of(*typed, "name=pairs"))
    broken = smoke_runs / "pairs_broken"
    process = start(*typed, "name=pairs_broken")
    killed_when(process, lambda: len(list(broken.glob("shards/train_*"))) >= 3)
    kept = {path: path.stat().st_mtime_ns for path in broken.glob("shards/train_*/rows.parquet")}
    execute(plan_of(*typed, "name=pairs_broken"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_same(metrics(broken), metrics(smoke_runs / "pairs"))
    for table in (smoke_runs / "pairs/data").iterdir():
        assert table.read_bytes() == (broken / "data" / table.name).read_bytes()


def test_two_processes_that_need_the_same_artifact_build_it_once(tmp_path):
    typed = ["debug=smoke", "stage=annotate", f"runs_dir={tmp_path}"]
    processes = [start(*typed, f"name=job{i}") for i in (0, 1)]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum(len(re.findall(rf"^run {tmp_path}/tiny_help/a0/sft$", text, re.M)) for text in said) == 1
    assert sum("waiting for another process" in text for text in said) <= 1
    assert_same(metrics(tmp_path / "job0"), metrics(tmp_path / "job1"))
