"""Secrets of the environment go nowhere: every byte that a sweep leaves is searched for them."""

import json
import time
from pathlib import Path

import pytest

from rlhf_lab.launch.main import FAILED, say_why
from rlhf_lab.launch.sweep import Sweep

PLANTED = {
    "WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
    "OPENAI_API_KEY": "sk-proj-planted0Planted1Planted2",
    "HF_TOKEN": "hf_plantedPlantedPlanted0123456789",
    "DATABASE_PASSWORD": "correct-horse-battery-9",
}


def holding(folder: Path) -> list[str]:
    """Files with a planted secret in their bytes, or in their names."""
    found = [path for path in folder.rglob("*") if any(secret in path.name for secret in PLANTED.values())]
    files = [path for path in folder.rglob("*") if path.is_file()]
    found += [path for path in files if any(secret.encode() in path.read_bytes() for secret in PLANTED.values())]
    return [str(path.relative_to(folder)) for path in found]


def test_a_traceback_holds_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    secret = PLANTED["DATABASE_PASSWORD"]
    monkeypatch.setenv("DATABASE_PASSWORD", secret)
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("no answer") from OSError(f"postgres://user:{secret}@host")
    assert say_why(raised.value, []) == FAILED
    said = capsys.readouterr()
    assert "no answer" in said.err
    assert "postgres://user:" in said.err
    assert secret not in said.out + said.err


def wait_for(sweep: Sweep, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    files = [run.directory / "status.json" for run in sweep.runs]
    over = ("finished", "failed")
    while not all(file.exists() and json.loads(file.read_text())["state"] in over for file in files):
        assert time.monotonic() < until, "the sweep does not end"
        time.sleep(0.5)


@pytest.mark.slow
def test_no_byte_that_a_sweep_writes_holds_a_secret(tmp_path: Path, command_line):
    places = [f"runs_dir={tmp_path / 'runs'}", f"sweeps_dir={tmp_path / 'sweeps'}", "sweep=searched"]
    typed = ["-m", "algorithm=sft", "learner.lr.policy=0.001,1e30", "debug=smoke", "tracker=wandb", "executor=pool"]
    answer = command_line(*typed, *places, **PLANTED)
    assert answer.returncode == 0, answer.stderr
    sweep = Sweep.read(tmp_path / "sweeps/searched")
    wait_for(sweep)
    states = [json.loads((run.directory / "status.json").read_text())["state"] for run in sweep.runs]
    assert states[0] == "finished"
    assert list(sweep.runs[0].directory.rglob("*.wandb")), "the tracker wrote nothing, so nothing of it was searched"
    assert holding(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "typed",
    [
        f"tracker.project={PLANTED['DATABASE_PASSWORD']}",
        f"+tracker.api_key={PLANTED['WANDB_API_KEY']}",
        "'tracker.project=${oc.env:DATABASE_PASSWORD}'",
        f"name=of-{PLANTED['OPENAI_API_KEY']}",
    ],
)
def test_a_secret_in_an_override_is_refused_and_not_repeated(typed: str, tmp_path: Path, command_line):
    places = [f"runs_dir={tmp_path / 'runs'}", f"sweeps_dir={tmp_path / 'sweeps'}"]
    for sweep in (["seed=0"], ["-m", "seed=0,1"]):
        arguments = [*sweep, "algorithm=sft", "debug=smoke", "tracker=wandb", typed.strip("'"), *places]
        answer = command_line(*arguments, **PLANTED)
        assert answer.returncode == 2
        assert "holds a secret" in answer.stderr or "no such key" in answer.stderr
        assert not any(secret in answer.stdout + answer.stderr for secret in PLANTED.values())
    assert list(tmp_path.iterdir()) == []
