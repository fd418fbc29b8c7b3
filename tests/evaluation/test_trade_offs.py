"""What a finished run obtained is read by prompt id, of soups, of told policies and of others; time is added up."""

import json

import numpy as np
import pytest
import yaml
from numpy.testing import assert_allclose

from rlhf_lab.data.tables import write_table
from rlhf_lab.evaluation.run_time import hours, with_needs
from rlhf_lab.evaluation.trade_offs import points, run_folder

OBJECTIVES = ("gold/helpfulness", "rewards/humour")


def samples(values, split="test"):
    """A row per (prompt, helpfulness, humour)."""
    return "".join(
        json.dumps({"split": split, "id": p, "gold": {"helpfulness": h}, "scores": {"humour": j, "cost": -j}}) + "\n"
        for p, h, j in values
    )


@pytest.fixture
def made(tmp_path):
    """`made(name, stage, files, …)` is a finished run's folder with these samples."""

    def make(name, stage, files, seconds=3600.0, reads=(), seed=0, state="finished"):
        folder = tmp_path / name
        (folder / "data").mkdir(parents=True)
        (folder / "policy").mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "stage": stage}))
        (folder / "status.json").write_text(json.dumps({"state": state, "seconds": seconds}))
        artifacts = {str(k): {"path": str(path)} for k, path in enumerate(reads)}
        (folder / "environment.json").write_text(json.dumps({"artifacts": artifacts, "num_processes": 4}))
        for place, text in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(text)
        return folder

    return make


def test_of_a_soup_the_points_of_its_lattice(made):
    ends = {f"lattice/{k:05d}/samples.jsonl": samples([("a", k, 0), ("b", 1, k)]) for k in range(2)}
    folder = made("soup", {"weights": [0.5, 0.5]}, ends | {"samples/step_000002.jsonl": samples([("a", 5, 5)])})
    write_table([{"weights": [0.0, 1.0], "split": "test"}, {"weights": [1.0, 0.0], "split": "test"}],
                folder / "data/lattice.parquet")  # fmt: skip
    first, second, written = points(str(folder / "policy"), "soup", OBJECTIVES)
    assert first.weights == {"policy 0": 0.0, "policy 1": 1.0}
    assert_allclose(second.values["a"], [1, 0])
    assert_allclose(second.values["b"], [1, 1])
    assert written.label == "policy 0=0.5,policy 1=0.5"
    assert_allclose(written.values["a"], [5, 5])


def test_of_a_told_policy_what_was_asked_and_obtained_after_the_last_phase(made):
    told = "helpful=1,cost=0"
    row = {"seed": 0, "id": "a", "gold": {"helpfulness": 2.0}, "scores": {"helpful": 3.0, "cost": 4.0, "humour": 0.0}}
    folder = made(
        "ric", {"costs": ["cost"]}, {"samples/step_000009.jsonl": json.dumps(row | {"split": f"test:{told}"}) + "\n"}
    )
    grid = {"split": "test", "weight_helpful": 1.0, "weight_cost": 0.0, "desired_helpful": 1.5, "desired_cost": -1.0}
    write_table([grid | {"phase": 0, "desired_helpful": 9.0}, grid | {"phase": 1}],
                folder / "data/preference_grid.parquet")  # fmt: skip
    (folder / "policy/rewards_in_context.json").write_text(
        json.dumps({"names": ["helpful", "cost"], "mean": [1.0, -2.0], "sd": [2.0, 4.0]})
    )
    [point] = points(str(folder), "ric", OBJECTIVES)
    assert point.label == told
    assert point.asked == {"helpful": 1.5, "cost": -1.0}
    assert_allclose(point.obtained["a"], [(3 - 1) / 2, (-4 + 2) / 4])  # a cost is told with its sign turned


def test_of_any_other_run_its_last_policy_under_each_condition(made):
    files = {
        "samples/step_000000.jsonl": samples([("a", 9, 9)]),
        "samples/step_000010.jsonl": samples([("a", 1, 2), ("a", 3, 2)]) + samples([("a", 0, 0)], "test:be brief"),
    }
    folder = made("morlhf", {"algorithm": {"objective": {"weights": {"helpful": 0.3, "humour": 0.7}}}}, files, seed=7)
    plain, brief = points(str(folder), "morlhf", OBJECTIVES)
    assert plain.weights == {"helpful": 0.3, "humour": 0.7}
    assert plain.seed == 7
    assert_allclose(plain.values["a"], [2, 2])  # the mean over a prompt's samples
    assert (brief.split, brief.label) == ("test", "helpful=0.3,humour=0.7, be brief")


def test_what_is_missing_is_said(made, tmp_path):
    folder = made("run", {}, {"samples/step_000001.jsonl": samples([("a", 1, 1)])})
    with pytest.raises(ValueError, match=r"names gold/kindness, but the samples .* have \['gold/helpfulness', "):
        points(str(folder), "x", ["gold/kindness"])
    with pytest.raises(ValueError, match="kept no samples"):
        points(str(made("empty", {}, {})), "x", OBJECTIVES)
    with pytest.raises(ValueError, match="is running, not finished"):
        run_folder(str(made("going", {}, {}, state="running")))
    with pytest.raises(ValueError, match="there is no run"):
        run_folder(str(tmp_path / "nowhere"))


def test_every_run_that_was_needed_is_counted_once(made):
    base = made("base", {}, {}, seconds=1800)
    left = made("left", {"hardware": {"device": "cuda"}}, {}, seconds=3600, reads=[base / "policy"])
    right = made("right", {}, {}, seconds=7200, reads=[base / "policy", "gone/policy"])
    soup = made("soup", {}, {}, seconds=900, reads=[left / "policy", right / "policy"])
    alone, all_of_it = hours([soup]), hours(with_needs([soup]))
    assert (alone.wall, alone.gpu, alone.missing) == (0.25, 0, 0)
    assert all_of_it.wall == pytest.approx(0.25 + 1 + 2 + 0.5)
    assert all_of_it.gpu == pytest.approx(4)  # an hour on four processes
    assert all_of_it.missing == 1


def test_a_mean_is_over_prompts_not_responses(made):
    folder = made("run", {}, {"samples/step_000001.jsonl": samples([("a", 0, 0), ("a", 2, 0), ("b", 5, 0)])})
    [point] = points(str(folder), "x", OBJECTIVES)
    assert np.mean([v[0] for v in point.values.values()]) == 3
