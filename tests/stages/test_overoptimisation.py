"""Runs are compared where they are equally far from the reference, seed by seed, and by nothing else."""

import csv
import json
from typing import Any

import numpy as np
import pytest
import scipy
import yaml

from rlhf_lab.console import Console
from rlhf_lab.report.overoptimisation_plots import at_equal_kl
from rlhf_lab.report.run import read_run
from rlhf_lab.run import Run
from rlhf_lab.stages.overoptimisation import OverOptimisation
from rlhf_lab.tracking import NoTracker

SETTINGS: dict[str, Any] = {
    "group_by": ["reward"],
    "split": "test",
    "gold": "help",
    "reward": "helpful",
    "kl": "k1",
    "points": 9,
    "baseline": None,
    "best_of_n": None,
    "best_of_n_by": ["single"],
}


def gold(reward, seed, d):
    """Rises and falls with the distance: a parabola for each seed, lower by `d` for the single reward model."""
    return 2 * d - 0.5 * d**2 + 0.1 * seed * d - (0.3 * d if reward == "single" else 0)


@pytest.fixture
def study(tmp_path):
    """Two rewards, three seeds; the ensemble stays nearer. Evaluated often, so that straight lines are exact to .01."""
    for reward, farthest in (("single", 4.0), ("uwo", 2.0)):
        for seed in range(3):
            run = tmp_path / "runs" / f"{reward}_{seed}"
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "artifact_seed": 0, "kl": {"beta": 0.1}}))
            (run / "overrides.yaml").write_text(yaml.safe_dump([f"reward={reward}", f"seed={seed}"]))
            (run / "status.json").write_text(json.dumps({"state": "finished"}))
            lines = []
            for step, d in enumerate(np.linspace(0, farthest, 41)):
                lines += [{"step": step, "eval/test/kl": d**2, "eval/test/rewards/helpful/mean": 5 + d}]
                lines[-1] |= {"eval/test/gold/help/mean": 1 + gold(reward, seed, d)}
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def compare(study):
    """`compare(**settings)` is the rows of equal_kl.csv by (group, measure, sqrt(KL)), and the run's directory."""

    def run_it(name="out", runs=None, **changes):
        stage = OverOptimisation(runs=runs or [str(study / "runs")], **{**SETTINGS, **changes})
        stage.check()
        opening: dict[str, Any] = {"config": {"seed": 0, "keep_checkpoints": 2}, "overrides": [], "artifacts": {}}
        run = Run.open(study / name, **opening, tracker=NoTracker(), console=Console())
        try:
            stage.run(run)
        finally:
            run.close()
        with (study / name / "data/equal_kl.csv").open() as file:
            rows = list(csv.DictReader(file))
        return {(row["group"], row["measure"], float(row["sqrt_kl"])): row for row in rows}, study / name

    return run_it


def test_gains_and_differences_are_those_of_the_curves_behind_them(compare):
    rows, directory = compare()
    for d in (0.5, 1.0, 2.0):  # the grid has steps of one half, to 4
        for reward in ("single", "uwo"):
            values = [gold(reward, seed, d) for seed in range(3)]
            half = scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, 2)
            row = rows[reward, "gold", d]
            assert (float(row["gain"]), float(row["ci95"])) == pytest.approx((np.mean(values), half), abs=0.01)
            assert float(rows[reward, "proxy", d]["gain"]) == pytest.approx(d)
        over = rows["uwo", "gold", d]
        assert float(over["over_baseline"]) == pytest.approx(0.3 * d, abs=0.01)  # of pairs: seeds cancel
        assert float(over["over_ci95"]) == pytest.approx(0, abs=0.01)
    assert rows["single", "gold", 4.0]["seeds"] == "3"
    assert ("uwo", "gold", 2.5) not in rows  # it never came so far
    with (directory / "data/trails.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6 * 41
    panels = at_equal_kl(read_run(directory))
    assert [panel.title for panel in panels] == ["single", "uwo", "Gold of every reward", "Gold beside the baseline"]
    assert panels[1].curves[0].x.tolist() == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])


def test_groups_are_what_was_typed_differently_but_for_seeds(compare, study):
    listed = [[str(study / f"runs/uwo_{s}/metrics.jsonl") for s in (0, 2)], str(study / "runs/single_0")]
    rows, _ = compare(runs=listed, group_by=None, baseline="single")
    assert rows["uwo", "gold", 2.0]["seeds"] == "2"
    assert rows["uwo", "gold", 2.0]["paired_seeds"] == "1"
    assert (rows["single", "gold", 2.0]["ci95"], rows["uwo", "gold", 2.0]["over_ci95"]) == ("", "")


def test_only_where_every_seed_came_so_far(compare, study):
    lines = (study / "runs/single_2/metrics.jsonl").read_text().splitlines()[:21]  # to 2
    (study / "runs/single_2/metrics.jsonl").write_text("\n".join(lines) + "\n")
    rows, _ = compare()
    assert max(d for group, _, d in rows if group == "single") == 2.0


def test_best_of_n_stands_on_the_same_axes(compare, study):
    told = [
        {"split": "test", "chosen_by": "single", "measure": measure, "n": n, "kl": kl, "gain": kl * times}
        for n, kl in ((1, 0.0), (2, 1.0), (4, 2.25))
        for measure, times in (("gold/help", 1.0), ("proxy", 2.0))
    ]
    (study / "curve/data").mkdir(parents=True)
    (study / "curve/data/best_of_n.json").write_text(json.dumps(told))
    _, directory = compare(best_of_n=str(study / "curve"))
    logged = {line["step"]: line for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())}
    assert logged[2]["overoptimisation/best_of_n/single/gold/mean"] == pytest.approx(1.0)  # sqrt(KL) 1
    assert logged[3]["overoptimisation/best_of_n/single/proxy/mean"] == pytest.approx(4.5)  # and 1.5
    assert "overoptimisation/best_of_n/single/gold/mean" not in logged[4]
    with pytest.raises(ValueError, match="has no gold/help of 'mean' on 'test'"):
        compare(name="other", best_of_n=str(study / "curve"), best_of_n_by=["mean"])


def test_refusals(compare, study):
    with pytest.raises(ValueError, match=r"single_0 and .*uwo_0 are both '0.1' with seed 0"):
        compare(group_by=["kl.beta"])
    with pytest.raises(ValueError, match=r"objective.w was not typed for this run .* change stage.group_by"):
        compare(group_by=["objective.w"])
    with pytest.raises(ValueError, match=r"never measured \['eval/test/kl_k2'\]"):
        compare(kl="k2")
    with pytest.raises(ValueError, match=r"stage.baseline=mean, but the groups are \['single', 'uwo'\]"):
        compare(baseline="mean")
    with pytest.raises(ValueError, match="there is no run"):
        compare(runs=[str(study / "nothing")])
    (study / "runs/uwo_0/status.json").write_text(json.dumps({"state": "stopped"}))
    with pytest.raises(ValueError, match="none of its runs has finished"):
        compare(runs=[str(study / "runs/uwo_0")])


def test_runs_of_a_folder_that_have_not_finished_are_named_and_a_run_counts_once(compare, study):
    (study / "runs/uwo_0/status.json").write_text(json.dumps({"state": "stopped"}))
    (study / "link").symlink_to(study / "runs/single_1")
    rows, directory = compare(runs=[str(study / "runs"), str(study / "runs/../runs"), str(study / "link")])
    assert {(group, row["seeds"]) for (group, _, _), row in rows.items()} == {("single", "3"), ("uwo", "2")}
    said = (directory / "warnings.jsonl").read_text()
    assert "1 runs have not finished, and are left out: uwo_0" in said
