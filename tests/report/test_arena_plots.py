"""What the pictures of contests show is what the last metrics say."""

import json

import numpy as np
import pytest

from rlhf_lab.report.arena_plots import agreements, arenas, contest_ratings, win_rates
from rlhf_lab.report.canvas import LIGHT, in_words, png
from rlhf_lab.report.run import read_run
from rlhf_lab.report.verdict_plots import verdicts


def estimate(name, mean, low, high):
    return {f"{name}/mean": mean, f"{name}/low": low, f"{name}/high": high, f"{name}/ci95": (high - low) / 2}


def cell(baseline, challenger, count, share=None):
    prefix = f"arena/test/baseline_{baseline}/challenger_{challenger}"
    return {f"{prefix}/count": count, **({} if share is None else estimate(f"{prefix}/win_rate", share, 0.1, 0.95))}


OUTCOMES = ("better_safe", "better_unsafe", "tie_safe", "tie_unsafe", "worse_safe", "worse_unsafe")
METRICS = {
    **estimate("arena/test/win_rate", 0.6, 0.5, 0.7),
    **cell("safe", "safe", 6.0, 0.75),
    **cell("safe", "unsafe", 2.0, 0.25),
    **cell("unsafe", "safe", 2.0, 1.0),
    **cell("unsafe", "unsafe", 0.0),
    **{f"arena/test/count/{what}": float(n) for n, what in enumerate(OUTCOMES)},
    **estimate("arena/test/reward_difference", 0.5, 0.1, 0.9),
    **estimate("arena/test/cost_difference", -1.0, -1.5, -0.5),
    **estimate("arena/test/safe_difference", 0.0, -0.2, 0.2),
    **estimate("win_rate/test/kind/b/a", 0.7, 0.55, 0.8),
    **estimate("win_rate/test/kind/c/a", 0.2, 0.1, 0.4),
    **estimate("win_rate/ood/kind/b/a", 0.4, 0.2, 0.6),
    **estimate("win_rate/ood/kind/b/a/length_controlled", 0.35, 0.1, 0.7),
    **estimate("rating/test/kind/a", 1000.0, 1000.0, 1000.0),
    **estimate("rating/test/kind/b", 1147.0, 1100.0, float("inf")),
    **estimate("rating/test/kind/c", 760.0, 700.0, 800.0),
    **estimate("agreement/kind/alpha", 0.4, 0.1, 0.6),
    **estimate("judge_agreement/kind/raters", 0.8, 0.7, 0.9),
    **estimate("verdicts/test/kind/consistent", 1.0, 0.8, 1.0),
}


@pytest.fixture
def run(tmp_path):
    spelled = {name: "inf" if value == float("inf") else value for name, value in METRICS.items()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, **spelled}) + "\n")
    return read_run(tmp_path)


def on_cells(panel):
    """(x, y) -> text and shade."""
    return {
        (x, y): (text, shade)
        for curve in panel.curves
        for x, y, text, shade in zip(curve.x, curve.y, curve.texts, curve.shade.tolist(), strict=True)
    }


def test_the_arena_shows_wins_by_safety_and_the_differences(run):
    by_safety, outcomes, gaps = arenas(run)
    cells = on_cells(by_safety)
    assert cells[0, 1][0] == "75% [10%, 95%]\nof 6"  # both safe: left, above
    assert cells[1, 1][0].startswith("25%")
    assert cells[1, 0] == ("none", 0)
    assert cells[0, 0][1] > cells[0, 1][1] > 0
    assert next(curve.colour for curve in by_safety.curves if "25%" in "".join(curve.texts)) == "amber"
    assert on_cells(outcomes)[2, 0][0] == "33%\n(5)"  # worse and unsafe
    [shown, _] = gaps.curves
    assert shown.y.tolist() == [0.5, -1.0, 0.0]
    assert shown.ci is not None
    np.testing.assert_allclose(shown.ci, [[0.4, 0.5, 0.2], [0.4, 0.5, 0.2]])


def test_a_matrix_of_three_mirrors_what_was_measured_once(run):
    matrix, duel = win_rates(run)
    cells = on_cells(matrix)
    assert [name for _, name in matrix.ticks] == ["a", "b", "c"]
    assert [name for _, name in matrix.y_ticks] == ["a", "b", "c"]
    assert cells[0, 1][0] == "70%\n[55, 80]"  # b against a
    assert cells[1, 2][0] == "30%\n[20, 45]"  # a against b
    assert cells[2, 2][0].startswith("80%")  # a against c
    assert (1, 0) not in cells  # b and c never met
    assert [curve.label for curve in duel.curves] == ["as judged, 95% interval", "at equal length", "even"]
    assert duel.title == "b against a (ood)"


def test_a_share_of_all_has_no_interval_above_it(run):
    [_, agree, _] = verdicts(run)
    assert agree.curves[0].ci is not None
    np.testing.assert_allclose(agree.curves[0].ci, [[0.2], [0.0]])


def test_ratings_and_agreement_have_their_intervals(run):
    [panel] = contest_ratings(run)
    [curve] = panel.curves
    assert curve.y.tolist() == [1000, 1147, 760]
    assert curve.ci is not None
    np.testing.assert_allclose(curve.ci, [[0, 47, 60], [0, np.nan, 40]])
    [panel] = agreements(run)
    assert [name for _, name in panel.ticks] == ["raters, α", "judge, rater"]
    assert panel.curves[0].y.tolist() == [0.4, 0.8]


def test_they_can_be_drawn_and_told_and_are_absent_where_nothing_was_measured(run, tmp_path):
    panels = [*arenas(run), *win_rates(run), *contest_ratings(run), *agreements(run)]
    assert png(panels[:2], LIGHT, 40).startswith(b"\x89PNG")
    assert "75% [10%, 95%] of 6" in in_words(panels)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss/train": 1.0}\n')
    empty = read_run(tmp_path)
    assert [*arenas(empty), *win_rates(empty), *contest_ratings(empty), *agreements(empty)] == []
