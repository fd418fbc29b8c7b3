"""The matrix and its gaps are those of the rows of the tables, over prompts or over runs, paired where they can be."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import scipy

from rlhf_lab.console import Console
from rlhf_lab.data.generations import write
from rlhf_lab.run import Run
from rlhf_lab.stages.generalisation import Generalisation
from rlhf_lab.tracking import NoTracker

HOME = {"a": [1.0, 3.0], "b": [5.0, 5.0], "c": [0.0, 2.0]}
AWAY = {"x": [0.0, 1.0], "y": [2.0, 2.0]}


@pytest.fixture
def table(tmp_path):
    """`table(name, splits)` is the path of a generation table; splits: split -> prompt -> gold of its responses."""

    def make(name, splits, **constants):
        rows = [
            {
                "split": split,
                "condition": "",
                "prompt_id": prompt,
                "prompt": prompt,
                "sample": sample,
                "response": "yes",
                "gold_worth": value,
                **constants,
            }
            for split, prompts in splits.items()
            for prompt, values in prompts.items()
            for sample, value in enumerate(values)
        ]
        write(tmp_path / f"{name}.parquet", rows, {})
        return str(tmp_path / f"{name}.parquet")

    return make


@pytest.fixture
def compared(tmp_path):
    def compare(**settings):
        default = {"policies": {}, "sweep": None, "in_distribution": "home", "splits": None, "metrics": None}
        stage = Generalisation(**{**default, **settings})
        stage.check()
        run = Run.open(
            tmp_path / "run",
            config={"seed": 0, "keep_checkpoints": 2},
            overrides=[],
            artifacts={},
            tracker=NoTracker(),
            console=Console(),
        )
        try:
            return tmp_path / "run", stage.run(run)
        finally:
            run.close()

    return compare


def test_one_run_of_a_method_has_intervals_over_its_prompts_and_an_unpaired_gap(table, compared):
    directory, metrics = compared(policies={"ppo": table("ppo", {"away": AWAY, "home": HOME})})
    home, away = np.array([2.0, 5.0, 1.0]), np.array([0.5, 2.0])
    low, high = scipy.stats.t.interval(0.95, 2, home.mean(), scipy.stats.sem(home))
    assert metrics["generalisation/ppo/home/gold_worth/mean"] == pytest.approx(home.mean())
    assert metrics["generalisation/ppo/home/gold_worth/low"] == pytest.approx(low)
    assert metrics["gap/ppo/away/gold_worth/mean"] == pytest.approx(home.mean() - away.mean())
    reach = np.hypot((high - low) / 2, scipy.stats.t.ppf(0.975, 1) * scipy.stats.sem(away))
    assert metrics["gap/ppo/away/gold_worth/ci95"] == pytest.approx(reach)
    with (directory / "generalisation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["split"], row["over"], row["prompts"]) for row in rows] == [
        ("home", "prompts", "3"),
        ("away", "prompts", "2"),
    ]
    assert rows[1]["gap_is_paired"] == "False"


def test_splits_that_ask_the_same_are_compared_within_prompts(table, compared):
    harder = {prompt: [value - 1.0 for value in values] for prompt, values in HOME.items()}
    reordered = dict(reversed(harder.items()))
    directory, metrics = compared(policies={"ppo": table("ppo", {"home": HOME, "harder": reordered})})
    assert metrics["gap/ppo/harder/gold_worth/mean"] == pytest.approx(1.0)
    assert metrics["gap/ppo/harder/gold_worth/ci95"] == pytest.approx(0.0, abs=1e-12)  # each falls by just 1
    rows = json.loads((directory / "generalisation.json").read_text())["rows"]
    assert rows[1]["gap"]["is_paired"]


def test_several_runs_of_a_method_have_intervals_over_the_runs(table, compared):
    shifts = [0.0, 0.5, 2.0]
    runs = [
        table(f"s{k}", {"home": {p: [v + shift for v in vs] for p, vs in HOME.items()}, "away": AWAY})
        for k, shift in enumerate(shifts)
    ]
    _, metrics = compared(policies={"ppo": runs})
    means = 8 / 3 + np.array(shifts)
    low, high = scipy.stats.t.interval(0.95, 2, means.mean(), scipy.stats.sem(means))
    assert metrics["generalisation/ppo/home/gold_worth/mean"] == pytest.approx(means.mean())
    assert metrics["generalisation/ppo/home/gold_worth/high"] == pytest.approx(high)
    assert metrics["gap/ppo/away/gold_worth/low"] == pytest.approx(low - 1.25)


def test_what_has_no_value_is_left_out_and_counted(table, compared):
    holes = {"a": [None, 3.0], "b": [None, None], "c": [1.0, 1.0]}
    directory, metrics = compared(policies={"ppo": table("ppo", {"home": holes})})
    assert metrics["generalisation/ppo/home/gold_worth/mean"] == pytest.approx(2.0)
    [row] = json.loads((directory / "generalisation.json").read_text())["rows"]
    assert (row["excluded"], row["prompts"]) == (3, 2)


def test_shares_have_wilsons_interval_even_where_none_refuses(table, compared):
    splits = {name: {f"{name}{k}": [1.0, 1.0] for k in range(20)} for name in ("home", "away")}
    made = table("ppo", splits, text_refusal=0.0, verdict_honesty=1.0)
    _, metrics = compared(policies={"ppo": made}, metrics=["text_refusal", "verdict_honesty"])
    theirs = scipy.stats.binomtest(0, 20).proportion_ci(method="wilson")  # two samples of a prompt are one case
    assert metrics["generalisation/ppo/home/text_refusal/high"] == pytest.approx(theirs.high)
    assert metrics["generalisation/ppo/home/verdict_honesty/low"] == pytest.approx(1 - theirs.high)
    assert metrics["gap/ppo/away/text_refusal/high"] == pytest.approx(theirs.high)  # method 10 of Newcombe 1998


def test_runs_of_a_sweep_are_one_method_if_they_differ_by_the_seed_alone(tmp_path, table, compared):
    for k, (seed, method) in enumerate([(0, "ppo"), (1, "ppo"), (0, "sft")]):
        job = tmp_path / f"sweep/job{k}"
        job.mkdir(parents=True)
        (job / "overrides.yaml").write_text(json.dumps(["stage=evaluate", f"seed={seed}", f"algorithm={method}"]))
        (job / "status.json").write_text('{"state": "finished"}')
        made = table(f"job{k}", {"home": HOME, "away": AWAY})
        Path(made).rename(job / "generations.parquet")
    directory, _ = compared(sweep=str(tmp_path / "sweep"))
    rows = json.loads((directory / "generalisation.json").read_text())["rows"]
    assert {(row["method"], row["runs"]) for row in rows} == {("algorithm=ppo", 2), ("algorithm=sft", 1)}


def test_what_cannot_be_compared_is_refused(table, compared):
    made = table("ppo", {"home": HOME})
    with pytest.raises(ValueError, match="in_distribution=test"):
        compared(policies={"ppo": made}, in_distribution="test")
    with pytest.raises(ValueError, match=r"stage\.metrics has \['gold_wit'\]"):
        compared(policies={"ppo": made}, metrics=["gold_wit"])
    with pytest.raises(ValueError, match=r"either stage\.policies"):
        compared()
    with pytest.raises(ValueError, match="no such file"):
        compared(policies={"ppo": "runs/nowhere"})
