"""Every way in which a directory may be less than whole is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_lab.engine.checkpoint import save_tree
from tests.chaos.whole import achieved, differences, faults

LOG = [{"step": 0, "reward": 0.5, "time/rollout": 1.0}, {"step": 1, "reward": 0.75, "time/rollout": 1.0}]


def write_log(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """The runs directories of two equal runs, the second being the undisturbed one."""
    run = tmp_path / "reference/run"
    for folder in ("policy", "samples", "shards/offline_0000"):
        (run / folder).mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "status.json").write_text(json.dumps({"state": "finished", "metrics": LOG[-1], "seconds": 3}))
    (run / "report.html").write_text("<html></html>\n")
    (run / "policy/config.json").write_text("{}")
    (run / "policy/model.safetensors").write_bytes(b"weights")
    (run / "samples/step_000000.jsonl").write_text('{"id": "a", "prompt": "p", "response": "r"}\n')
    (run / "shards/offline_0000/rows.parquet").write_bytes(b"rows")
    write_log(run / "metrics.jsonl", LOG)
    shutil.copytree(tmp_path / "reference", tmp_path / "runs")
    return tmp_path / "runs", tmp_path / "reference"


def test_equal_runs_have_no_fault_and_no_difference_whatever_time_they_took(two: tuple[Path, Path]):
    runs, reference = two
    write_log(runs / "run/metrics.jsonl", [row | {"time/rollout": 9.0} for row in LOG])
    (runs / "run/status.json").write_text(json.dumps({"state": "finished", "metrics": LOG[-1] | {"time/rollout": 9.0}}))
    assert list(faults(runs, reference)) == []
    assert list(differences(runs, reference)) == []


def test_a_run_on_its_way_has_no_fault_but_is_not_at_its_end(two: tuple[Path, Path]):
    runs, reference = two
    shutil.rmtree(runs / "run/policy")
    for temporary in ("run/.policy.1.tmp", "run/shards/.offline_0001.1.tmp"):
        (runs / temporary).mkdir()
        (runs / temporary / "half").write_bytes(b"hal")
    (runs / "run/status.json").write_text(json.dumps({"state": "running"}))
    write_log(runs / "run/metrics.jsonl", LOG[:1])
    with (runs / "run/metrics.jsonl").open("a") as log:
        log.write('{"step": 1, "rew')
    save_tree(runs / "run/checkpoints/step_000001", {"a": 1})
    assert list(faults(runs, reference)) == []
    assert len(list(differences(runs, reference))) >= 6
    assert achieved(runs)["step of run"] == 1
    assert achieved(runs)["run finished"] == 0
    assert achieved(runs)["run shard offline_0000"] == 1


DAMAGES: dict[str, Callable[[Path], object]] = {
    "half a file": lambda run: (run / "policy/model.safetensors").write_bytes(b"wei"),
    "half a folder": lambda run: (run / "policy/config.json").unlink(),
    "half a table": lambda run: (run / "samples/step_000000.jsonl").write_text("{"),
    "another table": lambda run: (run / "shards/offline_0000/rows.parquet").write_bytes(b"rowz"),
    "half a page": lambda run: (run / "report.html").write_text("<html>"),
    "a file of no run": lambda run: (run / "policy/model.safetensors.tmp").write_bytes(b""),
    "another number": lambda run: write_log(run / "metrics.jsonl", [LOG[0], LOG[1] | {"reward": 0.8}]),
    "a step twice": lambda run: write_log(run / "metrics.jsonl", [*LOG, LOG[1]]),
    "a step left out": lambda run: write_log(run / "metrics.jsonl", LOG[1:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_at_once_and_at_the_end(damage: str, two: tuple[Path, Path]):
    runs, reference = two
    DAMAGES[damage](runs / "run")
    assert len(list(faults(runs, reference))) >= 1
    assert len(list(differences(runs, reference))) >= 1


def test_what_is_left_over_or_half_a_line_is_found_at_the_end(two: tuple[Path, Path]):
    runs, reference = two
    (runs / "run/.policy.1.tmp").mkdir()
    with (runs / "run/metrics.jsonl").open("a") as log:
        log.write("{")
    assert list(differences(runs, reference)) == [
        "run/.policy.1.tmp is left over",
        "run/metrics.jsonl ends in half a line",
    ]


def test_half_a_status_is_no_status(two: tuple[Path, Path]):
    (two[0] / "run/status.json").write_text('{"state": "ru')
    with pytest.raises(ValueError, match="Unterminated"):
        list(faults(*two))


def test_a_checkpoint_of_which_a_file_is_gone_is_a_fault_and_lost(two: tuple[Path, Path]):
    runs, reference = two
    (runs / "run/status.json").write_text(json.dumps({"state": "running"}))
    for step in (2, 4):
        save_tree(runs / f"run/checkpoints/step_{step:06d}", {"a": step})
    assert achieved(runs)["step of run"] == 4
    (runs / "run/checkpoints/step_000004/tree.json").unlink()
    assert achieved(runs)["step of run"] == 2
    assert "step_000004: incomplete" in " ".join(faults(runs, reference))
