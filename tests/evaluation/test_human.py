"""Agreement of people with one another and of a judge with them, on ratings whose agreement is known."""

import math

import pytest

from rlhf_lab.evaluation.human import agreement, judged_alike, judgements
from rlhf_lab.evaluation.rating_sheets import Item, Rating, Scale
from rlhf_lab.evaluation.win_rates import win_rates

SCALE = Scale(most=2, ties=True)


def rating(rater, prompt, value, first_is_a=True, criterion="kind"):
    item = Item(
        rater=f"rater_{rater}",
        item=f"item {prompt}",
        split="test",
        condition="",
        prompt_id=str(prompt),
        sample=0,
        first="old",
        second="new",
        first_is_a=first_is_a,
        longer=3,
    )
    return Rating(item=item, criterion=criterion, value=value)


def test_ratings_become_verdicts_by_sign_and_by_strength():
    said = judgements([rating(1, i, value) for i, value in enumerate([2, 1, 0, -1, -2])], SCALE)
    assert [each.wins for each in said] == [1, 1, 0.5, 0, 0]
    assert [each.mean for each in said] == [1, 0.75, 0.5, 0.25, 0]
    [rate] = win_rates(said, length_control=False)
    assert rate.share is not None
    assert rate.share.value == pytest.approx(0.5)
    assert (rate.first, rate.prompts, rate.ties) == ("old", 5, 1)


def test_two_raters_by_hand():
    # signs: + + 0 - against + - 0 -: they agree on three, and oppose each other on one
    said = [rating(1, i, v) for i, v in enumerate([2, 1, 0, -1])] + [
        rating(2, i, v) for i, v in enumerate([1, -1, 0, -2])
    ]
    found = agreement(said, SCALE, 50, 0)
    assert found["agreement/kind/pairwise/mean"] == pytest.approx(0.75)
    by_chance = (2 * 1 + 1 * 1 + 1 * 2) / 16
    assert found["agreement/kind/kappa/mean"] == pytest.approx((0.75 - by_chance) / (1 - by_chance))
    assert found["agreement/kind/a_preferred/mean"] == pytest.approx((2.5 + 1.5) / 8)
    assert found["agreement/kind/alpha/low"] <= found["agreement/kind/alpha/mean"] <= found["agreement/kind/alpha/high"]
    half = [rating(1, 0, 1), rating(2, 0, 0), rating(1, 1, 1), rating(2, 1, 1)]
    assert agreement(half, SCALE, 5, 0)["agreement/kind/pairwise/mean"] == pytest.approx(0.75)


def test_sides_are_told_apart_from_contestants():
    said = [rating(1, i, 1, first_is_a=bool(i % 2)) for i in range(8)]
    assert agreement(said, SCALE, 5, 0)["agreement/kind/a_preferred/mean"] == pytest.approx(0.5)
    for_a = [rating(1, i, 1 if i % 2 else -1, first_is_a=bool(i % 2)) for i in range(8)]
    assert agreement(for_a, SCALE, 5, 0)["agreement/kind/a_preferred/mean"] == pytest.approx(1)


def test_full_agreement_gaps_and_lone_raters():
    values = [2, -1, 0, 1, -2, 2]
    alike = [rating(rater, i, value) for rater in (1, 2, 3) for i, value in enumerate(values)]
    found = agreement(alike, SCALE, 20, 0)
    for name in ("alpha", "kappa", "pairwise"):
        assert found[f"agreement/kind/{name}/mean"] == pytest.approx(1)
    gaps = agreement(alike[:-1], SCALE, 20, 0)
    assert gaps["agreement/kind/alpha/mean"] == pytest.approx(1)
    assert "agreement/kind/kappa/mean" not in gaps
    assert list(agreement(alike[:6], SCALE, 20, 0)) == [
        f"agreement/kind/a_preferred/{e}" for e in ("mean", "low", "high", "ci95")
    ]
    equal = agreement([rating(rater, i, 1) for rater in (1, 2) for i in range(4)], SCALE, 20, 0)
    assert "agreement/kind/alpha/mean" not in equal
    assert equal["agreement/kind/pairwise/mean"] == 1


def test_a_judge_beside_people():
    people = [
        rating(r, i, v)
        for r, each in enumerate([[1, 1, 1, -1], [2, 1, -1, 0], [2, -1, -1, 1]])
        for i, v in enumerate(each)
    ]
    # majorities: first, first, second, neither
    judge = judgements([rating(9, i, v) for i, v in enumerate([2, -2, -2])], SCALE)
    found, unjudged = judged_alike(people, judge, 20, 0)
    assert unjudged == {"kind": 1}
    assert found["judge_agreement/kind/majority/mean"] == pytest.approx(2 / 3)
    assert found["judge_agreement/kind/raters/mean"] == pytest.approx((1 + 1 / 3 + 2 / 3) / 3)
    # majority F F S, judge F S S: observed 2/3, by chance 2/3 * 1/3 + 1/3 * 2/3
    assert found["judge_agreement/kind/kappa/mean"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert math.isfinite(found["judge_agreement/kind/majority/low"])
    nobody, unjudged = judged_alike(people, [], 20, 0)
    assert (nobody, unjudged) == ({}, {"kind": 4})


def test_which_contestant_a_judge_calls_first_does_not_matter():
    people = [rating(1, i, v) for i, v in enumerate([2, 1, -1, 2])]
    judge = judgements([rating(9, i, v) for i, v in enumerate([1, -1, -1, 0])], SCALE)
    turned = [
        type(each)(**{**each.row, "first": "new", "second": "old", "wins": 1 - (each.wins or 0)}) for each in judge
    ]
    assert judged_alike(people, judge, 20, 0) == judged_alike(people, turned, 20, 0)
    assert judged_alike(people, judge, 20, 0)[0]["judge_agreement/kind/raters/mean"] == pytest.approx(2.5 / 4)
