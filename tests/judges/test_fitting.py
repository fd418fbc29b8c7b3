"""The manner of a judge is found again from what it said; the likelihood against counts and closed forms."""

import math

import numpy as np
import pytest

from rlhf_lab.judges.fitting import fit, log_likelihoods
from rlhf_lab.judges.manner import Manner

TRUE = Manner(noise=0.6, flip=0.05, position_bias=0.5, inconsistency=0.3, tie_width=0.3)


def judged(count, manner=TRUE, seed=0):
    draw = np.random.default_rng(seed)
    margin = draw.normal(size=count) * 1.5
    return margin, manner.says(margin, draw.random((count, 3)))


def test_the_nine_verdicts_have_chances_that_add_up_and_are_how_often_they_come():
    values = (1.0, 0.5, 0.0)
    said = np.array([[a, b] for a in values for b in values])
    for margin in (-0.8, 0.0, 1.1):
        chances = np.exp(log_likelihoods(TRUE, np.full(9, margin), said))
        assert chances.sum() == pytest.approx(1.0, abs=1e-9)
        draws = np.random.default_rng(1).random((60_000, 3))
        came = TRUE.says(np.full(60_000, margin), draws)
        shares = [(came == pair).all(1).mean() for pair in said]
        np.testing.assert_allclose(shares, chances, atol=4 * math.sqrt(0.25 / 60_000))


def test_one_order_has_its_own_chance_and_none_says_nothing():
    plain = Manner(noise=2.0, flip=0.0, position_bias=0.0, inconsistency=0.4, tie_width=1e-9)
    said = np.array([[1.0, np.nan], [np.nan, 0.0], [np.nan, np.nan]])
    found = log_likelihoods(plain, np.array([1.0, 1.0, 1.0]), said)
    wins = 1 / (1 + math.exp(-0.5))
    assert found == pytest.approx([math.log(wins), math.log(1 - wins), 0.0], abs=1e-8)


def test_a_manner_is_found_again_and_its_intervals_hold_it():
    margin, said = judged(500)
    said[::7, 1] = np.nan
    found = fit(margin, said, np.arange(500) // 2, draws=6, seed=0)
    for name, true in vars(TRUE).items():
        wide = found.high[name] - found.low[name]
        assert abs(getattr(found.manner, name) - true) < 2 * wide
        assert 0 < wide < 0.5
    assert found.log_likelihood >= log_likelihoods(TRUE, margin, said).sum() - 1e-6
    assert found.comparisons == 500


def test_an_exchange_of_the_responses_changes_nothing_of_the_manner():
    margin, said = judged(100)
    there = fit(margin, said, np.arange(100), draws=0, seed=0)
    back = fit(-margin, 1 - said[:, ::-1], np.arange(100), draws=0, seed=0)
    assert back.log_likelihood == pytest.approx(there.log_likelihood, abs=0.05)
    assert back.manner.position_bias == pytest.approx(there.manner.position_bias, abs=0.05)
    assert math.isnan(there.low["noise"])


@pytest.mark.parametrize(
    ("margin", "said", "message"),
    [
        ([1.0, 1.0], [[1.0, 1.0]] * 2, "2 comparisons were read, with 1 different margins"),
        ([1.0, 2.0], [[np.nan, np.nan]] * 2, "0 comparisons were read"),
        ([1.0, 2.0], [[0.75, 1.0]] * 2, "verdicts averaged over orders cannot be fitted"),
    ],
)
def test_what_cannot_be_fitted_is_refused(margin, said, message):
    with pytest.raises(ValueError, match=message):
        fit(np.array(margin), np.array(said), np.arange(2), draws=0, seed=0)
