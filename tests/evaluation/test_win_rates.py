"""Win rates by hand, their mirror, combinations of criteria, order bias, and ratings over several contestants."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from rlhf_lab.evaluation.win_rates import Judgement, combined, order_bias, ratings, read_judgements, win_rates


def judgement(prompt, wins, criterion="kind", first="a", second="b", orders=(None, None), longer=0, sample=0):
    return Judgement(
        split="test",
        condition="",
        prompt_id=str(prompt),
        sample=sample,
        criterion=criterion,
        first=first,
        second=second,
        wins=wins,
        by_order_first=orders[0],
        by_order_second=orders[1],
        mean=wins,
        longer=longer,
    )


def mirrored(each):
    """The same with the contestants exchanged."""

    def rest(value):
        return None if value is None else 1 - value

    return replace(
        each,
        first=each.second,
        second=each.first,
        wins=rest(each.wins),
        mean=rest(each.mean),
        by_order_first=rest(each.by_order_second),
        by_order_second=rest(each.by_order_first),
        longer=-each.longer,
    )


def test_wins_ties_and_what_could_not_be_read():
    said = [judgement(i, wins) for i, wins in enumerate([1, 1, 0, 0.5, None, 0.75, None])]
    [found] = win_rates(said, length_control=False)
    assert found.share is not None
    assert found.share.value == pytest.approx(3.25 / 5)
    assert (found.judged, found.excluded, found.ties, found.prompts) == (5, 2, 1, 5)
    assert found.balanced is None
    assert found.metrics["win_rate/test/kind/a/b/excluded"] == 2
    [nothing] = win_rates([judgement(0, None)], length_control=True)
    assert nothing.share is None
    assert nothing.row["win_rate"] is None
    assert (nothing.judged, nothing.excluded) == (0, 1)


def test_exchanging_the_contestants_mirrors_the_result():
    source = torch.Generator().manual_seed(1)
    wins = torch.randint(0, 5, (120,), generator=source) / 4
    longer = torch.randint(-50, 90, (120,), generator=source).tolist()
    said = [
        judgement(i // 2, None if i % 17 == 0 else w, orders=(w, w), longer=n, sample=i % 2)
        for i, (w, n) in enumerate(zip(wins.tolist(), longer, strict=True))
    ]
    [one] = win_rates(said, length_control=True)
    [other] = win_rates([mirrored(each) for each in said], length_control=True)
    assert (one.first, one.second) == (other.second, other.first)
    for ours, theirs in ((one.share, other.share), (one.mean, other.mean), (one.balanced, other.balanced)):
        assert ours is not None
        assert theirs is not None
        assert (ours.value, ours.low, ours.high) == pytest.approx((1 - theirs.value, 1 - theirs.high, 1 - theirs.low))
    assert (one.judged, one.ties, one.excluded) == (other.judged, other.ties, other.excluded)
    [bias], [same_bias] = order_bias(said), order_bias([mirrored(each) for each in said])
    assert bias.first_shown.value == pytest.approx(same_bias.first_shown.value)


def test_a_combination_is_won_by_who_wins_more_than_loses():
    by_criterion = {"kind": [1, 1, 0, 0.5, 1], "brief": [1, 0, 0, 0.5, None], "sound": [0, 0.5, 0.5, 0.5, 1]}
    said = [judgement(i, w, criterion=name) for name, each in by_criterion.items() for i, w in enumerate(each)]
    made = combined(said, "all", ["kind", "brief", "sound"])
    assert [each.wins for each in made] == [1, 0.5, 0, 0.5, None]
    assert [each.mean for each in made] == pytest.approx([2 / 3, 0.5, 1 / 6, 0.5, None])
    [found] = win_rates(made, length_control=False)
    assert found.criterion == "all"
    assert found.share is not None
    assert found.mean is not None
    assert found.share.value == pytest.approx(0.5)
    assert found.mean.value == pytest.approx((2 / 3 + 0.5 + 1 / 6 + 0.5) / 4)
    assert found.excluded == 1


def test_a_judge_that_goes_by_the_order_is_found_out():
    # first shown always wins: (1, 0); sees the better one: (1, 1), (0, 0)
    [bias] = order_bias([judgement(i, 0.5, orders=(1, 0)) for i in range(6)])
    assert (bias.first_shown.value, bias.consistent.value, bias.tied.value) == (1, 0, 1)
    fair = [judgement(i, i % 2, orders=(i % 2, i % 2)) for i in range(6)]
    [bias] = order_bias(fair)
    assert (bias.first_shown.value, bias.consistent.value, bias.tied.value) == (0.5, 1, 0)
    assert bias.metrics["verdicts/test/kind/consistent/low"] > 0.5
    [mixed] = order_bias([*fair[:3], *(judgement(9 + i, 0.75, orders=(1, 0.5)) for i in range(3))])
    assert mixed.first_shown.value == pytest.approx((3 * 0.5 + 3 * 0.75) / 6)
    assert order_bias([judgement(0, 1, orders=(1, None))]) == []


@pytest.fixture
def three():
    """300 games a pair among three of strengths 1, 0, -1, of which one in ten could not be read."""
    source = torch.Generator().manual_seed(0)
    strength = {"a": 1.0, "b": 0.0, "c": -1.0}
    said = []
    for first, second in combinations(strength, 2):
        chance = 1 / (1 + math.exp(strength[second] - strength[first]))
        won = (torch.rand(300, generator=source) < chance).tolist()
        said += [judgement(i, None if i % 10 == 3 else float(w), first=first, second=second) for i, w in enumerate(won)]
    return said


SETTINGS = {"anchor": "b", "anchor_rating": 1000.0, "virtual_ties": 0.0, "draws": 200, "seed": 0}


def test_ratings_recover_strengths_whatever_the_order(three):
    found, notes = ratings(three, ["a", "b", "c"], **SETTINGS)
    assert notes == []
    per_nat = 400 / math.log(10)
    for rating, expected in zip(found, (1000 + per_nat, 1000, 1000 - per_nat), strict=True):
        assert rating.points.low <= expected <= rating.points.high
        assert rating.points.high - rating.points.low < 150
        assert rating.metrics[f"rating/test/kind/{rating.name}/mean"] == rating.points.value
    assert found[1].points.low == found[1].points.high == 1000
    turned = [mirrored(each) if i % 2 else each for i, each in enumerate(reversed(three))]
    again, _ = ratings(turned, ["a", "b", "c"], **SETTINGS)
    assert [each.points.value for each in again] == pytest.approx([each.points.value for each in found])


def test_who_won_everything_has_no_rating_without_virtual_ties(three):
    said = [*three, *(judgement(i, 1.0, first="d", second="c") for i in range(20))]
    found, notes = ratings(said, ["a", "b", "c", "d"], **SETTINGS)
    assert found == []
    assert "no ratings by kind on test: these games have no finite ratings" in notes[0]
    found, notes = ratings(said, ["a", "b", "c", "d"], **{**SETTINGS, "virtual_ties": 1.0})
    assert notes == []
    assert all(math.isfinite(each.points.high) for each in found)


@pytest.mark.parametrize("virtual_ties", [0.0, 1.0])
def test_a_criterion_of_which_nothing_could_be_read_has_no_ratings_and_leaves_the_others_theirs(three, virtual_ties):
    unread = [judgement(i, None, criterion="unread") for i in range(3)]
    found, notes = ratings([*unread, *three], ["a", "b", "c"], **{**SETTINGS, "virtual_ties": virtual_ties})
    assert {each.criterion for each in found} == {three[0].criterion}
    assert notes == ["no ratings by unread on test: none of 3 verdicts could be read"]


def test_rows_are_read_back(three):
    assert read_judgements([each.row for each in three]) == three
