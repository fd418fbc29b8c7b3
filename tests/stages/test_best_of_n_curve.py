"""Curves of best of n are means over every subset, each subset's best chosen by the curve's own selector."""

import csv
import json
from itertools import combinations
from statistics import fmean, pvariance
from typing import Literal

import numpy as np
import pytest

from rlhf_lab.console import Console
from rlhf_lab.data.generations import FILE, write
from rlhf_lab.report.best_of_n_plots import best_of_n_ensembles
from rlhf_lab.report.run import read_run
from rlhf_lab.run import Run
from rlhf_lab.stages.best_of_n_curve import BestOfNCurve
from rlhf_lab.tracking import NoTracker

P, N, M = 5, 7, 4
DRAWN = np.random.default_rng(0)
MEMBERS = (4 * DRAWN.normal(size=(P, N, M))).round() / 4  # ties, and sums without rounding
GOLD = MEMBERS.mean(2) + DRAWN.normal(size=(P, N))
RULES = {
    "member_1": lambda scores: scores[1],
    "mean": fmean,
    "wco": min,
    "uwo_0": fmean,
    "uwo_2": lambda scores: fmean(scores) - 2 * pvariance(scores),
}


@pytest.fixture
def curve(tmp_path):
    """`curve(**settings)` is the rows of best_of_n.csv, by (chosen_by, measure, n), and the metrics."""

    def draw(units: Literal["saved", "table"] = "saved", told="standardised", members=MEMBERS, name="run", **other):
        rows = (
            {
                **{"run": "r", "step": 0, "split": "test", "condition": "", "prompt_id": f"{p}", "prompt": f"ask {p}"},
                **{"sample": s, "response": f"{p} {s}", "gold_help": GOLD[p, s]},
                **{"score_help": members[p, s].mean(), "members_help": members[p, s].tolist()},
            }
            for p in range(P)
            for s in range(N)
        )
        write(tmp_path / FILE, rows, {"units": {"help": told}})
        settings = {"uwo_weights": [0.0, 2.0], "ddof": 0, "grid": None, "draws": 500, "reward": "help"} | other
        stage = BestOfNCurve(generations=str(tmp_path / FILE), units=units, **settings)
        stage.check()
        opening = {"config": {"seed": 0, "keep_checkpoints": 2}, "overrides": [], "artifacts": {}}
        run = Run.open(tmp_path / name, **opening, tracker=NoTracker(), console=Console())
        try:
            metrics = stage.run(run)
        finally:
            run.close()
        with (tmp_path / name / "data/best_of_n.csv").open() as file:
            read = list(csv.DictReader(file))
        assert len(read) == len(json.loads((tmp_path / name / "data/best_of_n.json").read_text()))
        return {(r["chosen_by"], r["measure"], int(r["n"])): r for r in read}, metrics

    return draw


def best_of(n, chosen_by, measured):
    """The mean over prompts and over all subsets of n; of equal ones the later is better."""
    return fmean(
        measured[p][max(drawn, key=lambda s: (chosen_by[p][s], s))]
        for p in range(P)
        for drawn in combinations(range(N), n)
    )


def test_each_selector_chooses_by_its_own_order_and_gold_goes_with_it(curve):
    rows, metrics = curve()
    for n in (1, 2, 4, 7):
        for name, rule in RULES.items():
            scores = [[rule(MEMBERS[p, s].tolist()) for s in range(N)] for p in range(P)]
            assert float(rows[name, "gold/help", n]["mean"]) == pytest.approx(best_of(n, scores, GOLD), abs=1e-9)
            assert float(rows[name, "proxy", n]["mean"]) == pytest.approx(best_of(n, scores, scores), abs=1e-9)
        alone = fmean(best_of(n, MEMBERS[..., k], GOLD) for k in range(M))
        assert float(rows["single", "gold/help", n]["mean"]) == pytest.approx(alone, abs=1e-9)
        over = float(rows["wco", "gold/help", n]["mean"]) - alone
        assert float(rows["wco", "gold/help", n]["over_single"]) == pytest.approx(over, abs=1e-9)
    assert float(rows["mean", "gold/help", 7]["mean"]) != pytest.approx(float(rows["member_0", "gold/help", 7]["mean"]))
    gain = float(rows["wco", "gold/help", 7]["mean"]) - GOLD.mean()
    assert metrics["best_of_n/test/wco/gain/gold/help/mean"] == pytest.approx(gain)
    assert metrics["best_of_n/kl"] == pytest.approx(np.log(7) - 6 / 7)
    row = rows["wco", "gold/help", 4]
    assert float(row["low"]) < float(row["mean"]) < float(row["high"])
    assert rows["wco", "gold/help", 1]["gain_low"] == rows["wco", "gold/help", 1]["gain_high"] == "0.0"


def test_every_selector_is_a_line_and_members_are_threads(curve, tmp_path):
    rows, _ = curve()
    gold, beside, proxy = best_of_n_ensembles(read_run(tmp_path / "run"))
    assert [line.label for line in gold.curves if line.kind == "band"] == [
        "single",
        "mean",
        "WCO",
        "UWO, λ = 0",
        "UWO, λ = 2",
    ]
    assert sum(line.kind == "thread" for line in gold.curves) == M
    assert gold.curves[0].x.tolist() == pytest.approx(np.sqrt([np.log(n) - (n - 1) / n for n in (1, 2, 4, 7)]))
    drawn = {line.label: line.y[-1] for line in beside.curves}
    assert drawn["WCO"] == pytest.approx(float(rows["wco", "gold/help", 7]["over_single"]))
    assert (beside.has_legend, gold.has_legend, proxy.has_legend) == (True, False, False)


def test_units_of_the_table_put_every_member_and_gold_at_zero_before_choosing(curve):
    shifted = MEMBERS * [1.0, 10.0, 1.0, 1.0] + [0.0, 0.0, 50.0, 0.0]
    rows, _ = curve(units="table", members=shifted, told="none")
    for name in ("member_0", "member_1", "member_2", "member_3"):
        assert float(rows[name, "proxy", 1]["mean"]) == pytest.approx(0, abs=1e-9)
        assert float(rows[name, "gold/help", 1]["mean"]) == pytest.approx(0, abs=1e-9)
    flat = MEMBERS.reshape(-1, M)
    standard = (MEMBERS - flat.mean(0)) / flat.std(0)
    gold = (GOLD - GOLD.mean()) / GOLD.std()
    expected = best_of(4, standard.min(2), gold)
    assert float(rows["wco", "gold/help", 4]["mean"]) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match=r"members of 'help' in .* are raw"):
        curve(units="saved", told="none", name="refused")
    same = MEMBERS * [1.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="members_help is the same for every response of test"):
        curve(units="table", members=same, name="same")


def test_refusals(curve):
    with pytest.raises(ValueError, match=r"stage.grid=\[2, 1\]; expected ascending"):
        curve(grid=[2, 1])
    with pytest.raises(ValueError, match="no scores by 'cost'"):
        curve(reward="cost")
    with pytest.raises(ValueError, match=r"stage.grid ends at 9, but .* has 7 samples"):
        curve(grid=[1, 9])


def test_a_single_reward_model_has_one_curve_and_no_ensembles(curve):
    rows, _ = curve(members=MEMBERS[..., :1])
    assert {name for name, _, _ in rows} == {"single", "member_0"}
