"""A thousand calls to a server that fails and is partial, by a process that is killed half way."""

import pytest

from tests.judges.campaign import BETTER, CONCURRENCY, FAULTS, LIKES_FIRST, campaign


@pytest.mark.slow
def test_no_verdict_is_lost_and_none_paid_twice_and_the_favour_of_place_is_measured_and_removed(tmp_path):
    found = campaign(500, tmp_path)
    assert (found.verdicts, found.calls) == (500, 1000)
    assert (found.unread, found.wrong, found.lost, found.charged_twice, found.unexplained) == (0, 0, 0, 0, 0)
    assert 0.5 * FAULTS * 1000 < found.faults < 2 * FAULTS * 1000
    assert found.interrupted <= CONCURRENCY
    # A wins where A is better, and on a share of the rest: first_shown = (1 + share) / 2
    assert found.first_shown == pytest.approx((1 + LIKES_FIRST) / 2, abs=0.03)
    biased = found.truth + LIKES_FIRST * (1 - found.truth)
    assert found.first_order == pytest.approx(biased, abs=0.06)
    # in both orders a judge who likes a place halves its favour towards one half: (1 - share) truth + share / 2
    assert found.both_orders == pytest.approx((1 - LIKES_FIRST) * found.truth + LIKES_FIRST / 2, abs=0.03)
    assert found.truth == pytest.approx(BETTER, abs=0.07)
