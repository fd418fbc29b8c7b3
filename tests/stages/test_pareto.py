"""Fronts of methods from runs written by hand: volumes, intervals, gains, seeds, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlhf_lab.console import Console
from rlhf_lab.data.tables import read_table
from rlhf_lab.run import Run
from rlhf_lab.stages.pareto import Pareto
from rlhf_lab.tracking import NoTracker


@pytest.fixture
def made(tmp_path):
    """`made(method, {(helpful, humour): weight}, …)`: a finished run for each point, as a sweep over weights leaves."""

    def make(method, means, seed=0, noise=0.0, prompts=40) -> list[str]:
        paths = []
        for k, (h, j) in enumerate(means):
            draws = np.random.default_rng((seed, k))
            folder = tmp_path / f"{method}_{k}_s{seed}"
            (folder / "samples").mkdir(parents=True)
            weights = {"helpful": float(k), "humour": 1.0}
            (folder / "config.yaml").write_text(
                yaml.safe_dump({"seed": seed, "stage": {"objective": {"weights": weights}}})
            )
            (folder / "status.json").write_text(json.dumps({"state": "finished", "seconds": 360.0}))
            rows = [
                {"split": "test", "id": f"p{p}", "scores": {}, "gold": {"h": h + noise * draws.normal(),
                 "c": -j + noise * draws.normal()}}
                for p in range(prompts)
            ]  # fmt: skip
            (folder / "samples/step_000001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            paths.append(str(folder))
        return paths

    return make


@pytest.fixture
def carried_out(tmp_path):
    def carry_out(runs, **changes) -> tuple[Path, dict[str, float]]:
        settings = {
            "objectives": ["gold/h", "gold/c"], "costs": ["gold/c"], "reference": {"gold/h": 0.0, "gold/c": 0.0},
            "splits": None, "bootstrap_draws": 100,
        }  # fmt: skip
        paths = [path for each in runs.values() for path in each]
        methods = [method for method, each in runs.items() for _ in each]
        stage = Pareto(**{**settings, "runs": paths, "methods": methods, **changes})
        stage.check()
        run = Run.open(tmp_path / "pareto", config={"seed": 0, "keep_checkpoints": 1}, overrides=[], artifacts={},
                       tracker=NoTracker(), console=Console())  # fmt: skip
        return run.directory, stage.run(run)

    return carry_out


def test_volumes_of_two_methods_by_hand(made, carried_out):
    runs = {"old": made("old", [(2, 1), (1, 3), (1, 1)]), "new": made("new", [(2, 3)])}
    folder, metrics = carried_out(runs)
    assert metrics["pareto/test/old/hypervolume/mean"] == 4
    assert metrics["pareto/test/new/hypervolume/mean"] == 6
    assert metrics["pareto/test/new/hypervolume/gain/mean"] == 2
    assert metrics["pareto/test/old/spread/mean"] == pytest.approx(5**0.5)
    assert metrics["pareto/test/old/hypervolume/ci95"] == 0  # responses without noise
    assert metrics["pareto/old/hours"] == pytest.approx(0.3)
    rows = read_table(folder / "data/points.parquet")
    assert {row["run"]: row["on_front"] for row in rows} == {
        "old_0_s0": True, "old_1_s0": True, "old_2_s0": False, "new_0_s0": True,
    }  # fmt: skip
    assert [row["gold/c"] for row in rows] == [-1, -3, -1, -3]  # in its own sign
    assert rows[1]["weight_helpful"] == 1
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step.get("pareto/test/old/gold/h/mean") for step in steps] == [2, 1, 1, None]
    assert [step.get("pareto/test/new/on_front") for step in steps] == [1, None, None, None]


def test_intervals_are_over_prompts_and_gains_are_paired(made, carried_out):
    _, metrics = carried_out({"a": made("a", [(2, 2)], noise=0.5), "b": made("b", [(2, 2)], noise=0.5)})
    # of one point (x, y) the volume is x y; its variance 4 (var x + var y) / 40, var = .25 each
    expected = 1.96 * (4 * 0.5 / 40) ** 0.5
    assert metrics["pareto/test/a/hypervolume/ci95"] == pytest.approx(expected, rel=0.35)
    # the same noise for both, since it is drawn from the same seed: nothing is left of it in the difference
    assert metrics["pareto/test/b/hypervolume/gain/mean"] == 0
    assert metrics["pareto/test/b/hypervolume/gain/ci95"] == 0


def test_seeds_are_averaged_and_drawn(made, carried_out):
    two = [*made("a", [(1, 1)], seed=0), *made("a", [(3, 1)], seed=1)]
    _, metrics = carried_out({"a": two})
    assert metrics["pareto/test/a/seeds"] == 2
    assert metrics["pareto/test/a/hypervolume/mean"] == 2
    assert (metrics["pareto/test/a/hypervolume/low"], metrics["pareto/test/a/hypervolume/high"]) == (1, 3)


def test_runs_are_joined_by_prompt(made, carried_out):
    runs = {"a": made("a", [(1, 1)], prompts=30), "b": made("b", [(1, 1)], prompts=40)}
    folder, metrics = carried_out(runs)
    assert (metrics["pareto/test/prompts"], metrics["pareto/test/excluded"]) == (30, 10)
    assert "10 of 40 prompts are not in every run" in (folder / "warnings.jsonl").read_text()


def test_points_below_the_reference_are_said(made, carried_out):
    folder, metrics = carried_out({"a": made("a", [(-1, 5), (1, 1)])})
    assert metrics["pareto/test/a/hypervolume/mean"] == 1
    assert "1 points of a are not above" in (folder / "warnings.jsonl").read_text()


def test_what_cannot_be_compared_is_refused(made, carried_out):
    runs = {"a": made("a", [(1, 1), (2, 2)])}
    with pytest.raises(ValueError, match=r"reference is of \['gold/h'\]"):
        carried_out(runs, reference={"gold/h": 0.0})
    with pytest.raises(ValueError, match="two or more"):
        carried_out(runs, objectives=["gold/h"], reference={"gold/h": 0.0}, costs=[])
    with pytest.raises(ValueError, match="name each run's method"):
        carried_out(runs, methods=["a"])
    with pytest.raises(ValueError, match=r"costs names gold/x"):
        carried_out(runs, costs=["gold/x"])
    with pytest.raises(ValueError, match=r"splits=\['ood'\].* are \['test'\]"):
        carried_out(runs, splits=["ood"])


def test_an_unbalanced_or_doubled_sweep_is_refused(made, carried_out):
    runs = made("a", [(1, 1), (2, 2)])
    with pytest.raises(ValueError, match=r"seed 1 has no 'helpful=1,humour=1'; every seed needs the same"):
        carried_out({"a": [*runs, *made("a", [(1, 1)], seed=1)]})


def test_one_preference_twice_under_one_name_is_refused(made, carried_out):
    with pytest.raises(ValueError, match=r"both have .* with seed 0; give them different names"):
        carried_out({"a": [*made("a", [(1, 1)]), *made("b", [(1, 1)])]})
