"""What a run takes, judged by runs that are done: from directories whose seconds are known by construction."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lab.launch.history import Estimate, History, settings_of

HERE, ELSEWHERE = "this machine", "another machine"
PACE, EVALUATION = 2.0, 10.0  # seconds of a step, and of an evaluation with what belongs to it


def config(runs_dir: Path, name: str, **changes: Any) -> dict[str, Any]:
    """An on-policy run as it is frozen; `changes` by dotted keys of the stage."""
    stage: dict[str, Any] = {
        "_target_": "rlhf_lab.stages.train_online.TrainOnline",
        "algorithm": {"_target_": "rlhf_lab.algorithms.ppo.PPO", "kl_coef": 0.1},
        "model": {"policy": f"{runs_dir}/tiny_help/a0/sft/policy"},
        "dataset": {"path": "embedded:tiny_help", "seed": 0, "train_size": 5120, "eval_splits": ["test"]},
        "hardware": {"device": "cpu", "dtype": "float32", "threads": 1},
        "steps": 80,
        "prompts_per_step": 64,
        "samples_per_prompt": 1,
        "evaluate_every": 20,
    }
    for key, value in changes.items():
        *groups, last = key.split("__")
        place = stage
        for group in groups:
            place = place[group]
        place[last] = value
    return {"name": name, "seed": 0, "artifact_seed": 0, "runs_dir": str(runs_dir), "stage": stage}


def seconds_of(stage: dict[str, Any]) -> float:
    evaluations = 2 + (-(-stage["steps"] // stage["evaluate_every"]) - 1 if stage["evaluate_every"] else 0)
    return stage["steps"] * PACE + evaluations * EVALUATION


def finished(runs_dir: Path, name: str, host: str = HERE, factor: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Write the directory of a run that took what its configuration says, times `factor`."""
    made = config(runs_dir, name, **changes)
    folder = runs_dir / name
    folder.mkdir(parents=True)
    stage = made["stage"]
    (folder / "config.yaml").write_text(yaml.safe_dump(made))
    status = {"state": "finished", "seconds": factor * seconds_of(stage), "peak_memory_mib": 700, "host": host}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "environment.json").write_text(json.dumps({"host": host}))
    spent = {"time/rollout": 0.75 * factor * PACE, "time/update": 0.25 * factor * PACE, "time/share/rollout": 0.75}
    lines = [{"step": step, **spent} for step in range(1, stage["steps"] + 1)]
    lines[-1] |= {"time/evaluation": factor * EVALUATION, "time/tokens_per_second": 9e9}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def estimate(runs_dir: Path, **changes: Any) -> Estimate | None:
    return History([runs_dir], HERE).estimate(config(runs_dir, "to come", **changes), 1)


def test_the_same_run_under_other_seeds_and_names_is_measured(tmp_path):
    for seed, factor in enumerate((0.9, 1.0, 1.3)):
        finished(
            tmp_path,
            f"ppo-s{seed}",
            factor=factor,
            dataset__seed=seed,
            model__policy=f"{tmp_path}/tiny_help/a{seed}/sft/policy",
        )
    found = estimate(tmp_path, dataset__seed=9)
    assert found is not None
    whole = seconds_of(config(tmp_path, "x")["stage"])
    assert (found.trust, found.memory_mib) == ("measured", 700)
    assert (found.least, found.seconds, found.most) == pytest.approx((0.9 * whole, whole, 1.3 * whole))
    assert found.split == pytest.approx({"rollout": 0.75, "update": 0.25})


@pytest.mark.parametrize(("steps", "evaluate_every"), [(160, 20), (8, 4), (40, 0), (80, 40)])
def test_another_number_of_steps_scales_what_went_by_in_steps_and_evaluations(steps, evaluate_every, tmp_path):
    finished(tmp_path, "done")
    found = estimate(tmp_path, steps=steps, evaluate_every=evaluate_every)
    assert found is not None
    assert found.trust == "scaled"
    assert found.seconds == pytest.approx(seconds_of({"steps": steps, "evaluate_every": evaluate_every}))
    assert "evaluate_every" in found.source or "steps" in found.source


def test_a_real_value_is_said_and_anything_else_makes_it_rough(tmp_path):
    finished(tmp_path, "done")
    found = estimate(tmp_path, algorithm__kl_coef=0.3)
    assert found is not None
    assert (found.trust, found.source) == ("alike", "done; algorithm.kl_coef 0.1 -> 0.3")
    found = estimate(tmp_path, dataset__eval_splits=["test", "other"])
    assert found is not None
    assert found.trust == "rough"
    assert "dataset.eval_splits.length 1 -> 2" in found.source


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm___target_": "rlhf_lab.algorithms.rloo.RLOO"},
        {"model__policy": "owner/large"},
        {"prompts_per_step": 128},
        {"samples_per_prompt": 4},
        {"hardware__device": "cuda"},
        {"hardware__threads": 4},
    ],
)
def test_another_method_model_batch_or_machine_tells_nothing(change, tmp_path):
    finished(tmp_path, "done")
    assert estimate(tmp_path, **change) is None


def test_the_nearest_run_is_taken_and_this_machine_before_others(tmp_path):
    finished(tmp_path, "far", algorithm__kl_coef=0.3, factor=9)
    finished(tmp_path, "near", host=ELSEWHERE, factor=7)
    found = estimate(tmp_path)
    assert found is not None
    assert found.source == f"near; on {ELSEWHERE}"
    finished(tmp_path, "study/near_and_here", factor=2)
    found = estimate(tmp_path)
    assert found is not None
    assert found.source == "near_and_here"


def test_a_run_that_is_not_finished_or_not_readable_tells_nothing(tmp_path):
    finished(tmp_path, "done")
    status = tmp_path / "done/status.json"
    spoiled = [json.dumps(json.loads(status.read_text()) | {"state": "failed"}), "{", "[]", "{}"]
    for text in spoiled:
        status.write_text(text)
        assert estimate(tmp_path) is None


def test_the_time_of_drawing_the_page_is_in_it(tmp_path):
    finished(tmp_path, "done")
    page, status = tmp_path / "done/report.html", tmp_path / "done/status.json"
    page.touch()
    os.utime(page, (status.stat().st_mtime + 5,) * 2)
    found = estimate(tmp_path)
    assert found is not None
    assert found.seconds == pytest.approx(seconds_of(config(tmp_path, "x")["stage"]) + 5, abs=1e-3)


def test_settings_hold_what_costs_and_no_seed_name_or_place(tmp_path):
    one = config(tmp_path / "a", "one")
    other = copy.deepcopy(config(tmp_path / "b", "other", dataset__seed=3))
    other["seed"] = 3
    assert settings_of(one) == settings_of(other)
    assert settings_of(one, 2) != settings_of(one)
