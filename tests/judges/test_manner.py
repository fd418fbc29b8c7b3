"""The model of somebody who errs: against a slow simulation of its story, closed forms, and its own limits."""

import math
import random

import numpy as np
import pytest

from rlhf_lab.judges.manner import Manner


def manner(**changes):
    plain = {"noise": 1.0, "flip": 0.0, "position_bias": 0.0, "inconsistency": 0.0, "tie_width": 0.0}
    return Manner(**(plain | changes))


def draws(count, seed=0):
    return np.random.default_rng(seed).random((count, 3))


def test_without_slips_ties_or_bias_it_is_bradley_and_terrys():
    chances = manner(noise=0.5).chances([0.0, 1.0, -2.0])
    expected = [1 / (1 + math.exp(-margin / 0.5)) for margin in (0.0, 1.0, -2.0)]
    np.testing.assert_allclose(chances[:, 0, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(chances.sum(-1), 1.0, rtol=1e-12)


def test_bias_favours_what_is_shown_first_whichever_that_is():
    (chances,) = manner(position_bias=0.8).chances([0.0])
    assert chances[0, 0] == pytest.approx(1 / (1 + math.exp(-0.8)))  # the first is shown first
    assert chances[1, 0] == pytest.approx(1 / (1 + math.exp(0.8)))


def test_ties_are_rao_and_kuppers():
    # pi_1 / (pi_1 + theta pi_2) with pi = e^margin, theta = e^width
    (chances,) = manner(tie_width=0.7).chances([1.2])
    theta, pi = math.exp(0.7), math.exp(1.2)
    assert chances[0].tolist() == pytest.approx([pi / (pi + theta), 1 / (1 + theta * pi)])


def test_verdicts_come_as_often_as_a_story_told_one_by_one_says():
    """The story: noise of its own logistic kind, slips that turn the verdict, second thoughts for the second order."""
    told = manner(noise=0.7, flip=0.1, position_bias=0.4, inconsistency=0.35, tie_width=0.3)
    margin, count, chance = 0.5, 40_000, random.Random(1)

    def verdict(bias, u):
        def p(x):
            return 1 / (1 + math.exp(-x))

        x = margin / 0.7 + bias
        first = 0.9 * p(x - 0.3) + 0.1 * p(-x - 0.3)
        second = 0.9 * p(-x - 0.3) + 0.1 * p(x - 0.3)
        return 1.0 if u < first else 0.0 if u >= 1 - second else 0.5

    story = []
    for _ in range(count):
        u = chance.random()
        story.append((verdict(0.4, u), verdict(-0.4, chance.random() if chance.random() < 0.35 else u)))
    said = [tuple(row) for row in told.says(np.full(count, margin), draws(count)).tolist()]
    for pair in {*story, *said}:
        share = story.count(pair) / count
        assert said.count(pair) / count == pytest.approx(share, abs=4 * math.sqrt(2 * 0.25 / count))


def test_one_who_never_thinks_afresh_contradicts_themselves_only_by_bias():
    margins = np.linspace(-2, 2, 500)
    sure = manner(flip=0.2, tie_width=0.2).says(margins, draws(500))
    assert (sure[:, 0] == sure[:, 1]).all()
    biased = manner(position_bias=1.0).says(margins, draws(500))
    assert (biased[:, 0] >= biased[:, 1]).all()
    assert (biased[:, 0] > biased[:, 1]).any()
    fickle = manner(inconsistency=1.0).says(np.zeros(2000), draws(2000))
    assert (fickle[:, 0] == fickle[:, 1]).mean() == pytest.approx(0.5, abs=0.05)
