"""From verdicts to training pairs: who won, by how much, what becomes of ties, and exact label noise."""

from typing import Any

import pytest

from rlhf_lab.data.noise import LabelNoise
from rlhf_lab.data.verdicts import comparison, noisy, preference_rows, verdict_row
from rlhf_lab.records import Verdict

PAIR = {
    "id": "p",
    "prompt": "how ?",
    "preference": "kind+short",
    "told": "Be kind. Be short.",
    "response_0": "a",
    "response_1": "b",
    "gold_worth_0": 1.0,
    "gold_worth_1": 2.0,
    "better": 1,
}
TOLD = {"kind": "<kind>", "short": "<short>"}


def judged(*by_order: float | None, asked: int = 2, scores: tuple[float, float] | None = None, **pair: Any) -> dict:
    first, second = by_order
    verdict = Verdict(by_order=(first, second), scores=scores, reasons=("so", ""), asked=asked)
    return verdict_row(PAIR | pair, "kind", verdict)


def learnt(*verdicts: dict, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    settings: dict[str, Any] = {"ties": "drop", "margin_by": "wins", "told": TOLD, "held_out": False, "seed": 0}
    return preference_rows(list(verdicts), **settings | changes)


def test_a_verdict_keeps_what_was_said_and_what_is_known_of_the_responses():
    row = judged(1.0, None, asked=2)
    assert row == {
        **{name: PAIR[name] for name in ("id", "prompt", "response_0", "response_1", "gold_worth_0", "gold_worth_1")},
        **{"preference": "kind", "sampled_under": "kind+short", "asked": 2, "wins_shown_first": 1.0},
        **{"wins_shown_second": None, "wins": None, "score_0": None, "score_1": None},
        **{"reason_shown_first": "so", "reason_shown_second": ""},
    }
    assert comparison(PAIR).prompt.condition == ""  # a judge does not see what the policy was told


@pytest.mark.parametrize(
    ("by_order", "asked", "better", "margin"),
    [((1.0, 1.0), 2, 0, 1.0), ((0.0, 0.0), 2, 1, 1.0), ((0.5, 0.0), 2, 1, 0.5), ((1.0, None), 1, 0, 1.0)],
)
def test_the_winner_of_both_orders_is_better_by_how_far_they_agree(by_order, asked, better, margin):
    [row], left_out = learnt(judged(*by_order, asked=asked))
    assert (row["better"], row["clean_better"], row["margin"]) == (better, better, margin)
    assert (row["condition"], row["preference"], row["gold_worth_1"]) == ("<kind>", "kind", 2.0)
    assert left_out == {"unreadable": 0, "tied": 0}


def test_the_model_of_one_preference_is_not_told_it():
    [row], _ = learnt(judged(1.0, 1.0), told=None)
    assert "condition" not in row


def test_what_cannot_be_read_is_left_out_and_counted():
    rows, left_out = learnt(judged(1.0, None), judged(None, None), judged(0.0, 0.0))
    assert len(rows) == 1
    assert left_out["unreadable"] == 2


@pytest.mark.parametrize("tie", [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_ties_are_dropped_or_kept_as_both_answers_in_training_alone(tie):
    assert learnt(judged(*tie)) == ([], {"unreadable": 0, "tied": 1})
    rows, left_out = learnt(judged(*tie), ties="keep")
    assert [(row["better"], row["margin"]) for row in rows] == [(0, 0.0), (1, 0.0)]
    assert left_out["tied"] == 0
    assert learnt(judged(*tie), ties="keep", held_out=True) == ([], {"unreadable": 0, "tied": 1})


def test_a_coin_is_fair_and_the_same_text_wins_whichever_is_called_first():
    ties = [judged(0.5, 0.5, id=f"p{i}") for i in range(400)]
    turned = [judged(0.5, 0.5, id=f"p{i}", response_0="b", response_1="a") for i in range(400)]
    rows, _ = learnt(*ties, ties="coin")
    again, _ = learnt(*turned[::-1], ties="coin")
    assert [row["better"] for row in rows] == [1 - row["better"] for row in again[::-1]]
    assert sum(row["better"] for row in rows) == pytest.approx(200, abs=50)  # sd 10
    assert [row["better"] for row in learnt(*ties, ties="coin", seed=1)[0]] != [row["better"] for row in rows]


def test_margins_of_scores_are_those_of_the_winner_and_need_scores():
    rows, _ = learnt(
        judged(0.0, 0.0, scores=(3.0, 7.5)), judged(1.0, 1.0, scores=(3.0, 7.5)), margin_by="scores"
    )  # the second verdict disagrees with its scores
    assert [row["margin"] for row in rows] == [4.5, -4.5]
    with pytest.raises(ValueError, match="but the judge gave no scores by kind"):
        learnt(judged(1.0, 1.0), margin_by="scores")


def test_noise_turns_exactly_its_share_of_what_no_tie_decided():
    rows, _ = learnt(*[judged(*((1.0, 1.0) if i % 3 else (0.5, 0.5)), id=f"p{i}") for i in range(60)], ties="keep")
    assert len(rows) == 40 + 2 * 20

    def noise(seed: int) -> LabelNoise:
        return LabelNoise(recipe="exact", rate=0.25, seed=seed)

    turned = noisy(rows, noise(0))
    changed = [row for row in turned if row["better"] != row["clean_better"]]
    assert len(changed) == 10
    assert all(row["wins"] == 1.0 for row in changed)
    assert noisy(rows, noise(1)) != turned == noisy(rows, noise(0))
