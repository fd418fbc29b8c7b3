"""Ratings agree with the closed form of two players, are a stationary point, and recover strengths that were known."""

import math

import pytest
import torch
from scipy.stats import binom
from torch.testing import assert_close

from rlhf_lab.functional.ratings import bradley_terry, elo, elo_interval, linked

WINS = torch.tensor([[0.0, 7, 3, 9.5], [3, 0, 6, 5], [1, 4, 0, 2.5], [0.5, 5, 1.5, 0]])


def log_likelihood(theta: list[float], wins: list[list[float]]) -> float:
    players = range(len(theta))
    return sum(wins[i][j] * -math.log1p(math.exp(theta[j] - theta[i])) for i in players for j in players if i != j)


@pytest.mark.parametrize(("won", "lost"), [(3.0, 1.0), (1.0, 99.0), (5.5, 4.5), (2.0, 2.0)])
def test_two_players_have_the_closed_form(won, lost):
    points = elo(bradley_terry(torch.tensor([[0, won], [lost, 0]]), 0.0), 1, 1000.0)
    p = won / (won + lost)
    assert points.tolist() == pytest.approx([1000 + 400 * math.log10(p / (1 - p)), 1000], abs=1e-6)


def test_the_likelihood_has_its_maximum_there():
    theta = bradley_terry(WINS, 0.0).tolist()
    assert sum(theta) == pytest.approx(0, abs=1e-12)
    for k in range(4):
        up, down = ([t + s * 1e-4 * (i == k) for i, t in enumerate(theta)] for s in (1, -1))
        slope = (log_likelihood(up, WINS.tolist()) - log_likelihood(down, WINS.tolist())) / 2e-4
        assert slope == pytest.approx(0, abs=1e-6)
    assert log_likelihood(theta, WINS.tolist()) > log_likelihood([0.0] * 4, WINS.tolist())


def test_order_and_diagonal_do_not_matter_and_batches_are_their_parts():
    order = torch.tensor([2, 0, 3, 1])
    theta = bradley_terry(WINS, 1.0)
    assert_close(bradley_terry(WINS[order][:, order], 1.0), theta[order])
    assert_close(bradley_terry(WINS + 5 * torch.eye(4), 1.0), theta)
    assert_close(bradley_terry(torch.stack([WINS, WINS.T]), 1.0), torch.stack([theta, -theta]))


def test_known_strengths_are_recovered():
    source = torch.Generator().manual_seed(3)
    true = torch.tensor([0.9, 0.2, -0.1, -1.0], dtype=torch.float64)
    chance = torch.sigmoid(true[:, None] - true[None, :])
    upper = torch.triu(torch.binomial(torch.full_like(chance, 40_000), chance, generator=source), 1)
    games = upper + torch.tril(40_000 - upper.T, -1)
    assert_close(bradley_terry(games, 0.0), true, atol=0.03, rtol=0)


def test_games_without_finite_ratings_are_refused_and_virtual_ties_make_them_finite():
    never_met = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    always_won = torch.tensor([[0.0, 5, 5], [0, 0, 2], [0, 3, 0]])
    in_a_circle = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert [bool(linked(games)) for games in (never_met, always_won, in_a_circle)] == [False, False, True]
    for games in (never_met, always_won):
        with pytest.raises(ValueError, match=r"no finite ratings.*virtual_ties=1"):
            bradley_terry(games, 0.0)
        assert bool(bradley_terry(games, 1.0).isfinite().all())
    # one drawn game beside n won ones: odds of n + 1/2 to 1/2
    [first, second] = bradley_terry(torch.tensor([[0.0, 20], [0, 0]]), 1.0).tolist()
    assert first - second == pytest.approx(math.log(20.5 / 0.5))


def test_the_ends_of_two_players_are_those_of_binomial_wins():
    won = (torch.arange(200) < 130).double()
    games = torch.zeros(200, 2, 2, dtype=torch.float64)
    games[:, 0, 1], games[:, 1, 0] = won, 1 - won
    low, high, left_out = elo_interval(games, 0.0, 1, 0.0, 2000, 0)
    assert left_out == 0
    assert low[1] == high[1] == 0
    for end, level in ((low, 0.025), (high, 0.975)):
        share = 1 / (1 + 10 ** (-end[0].item() / 400))
        assert 200 * share == pytest.approx(binom.ppf(level, 200, 0.65), abs=1.01)


def test_one_prompt_says_nothing_of_others():
    low, high, _ = elo_interval(torch.tensor([[[0.0, 3.0], [1.0, 0.0]]]), 1.0, 0, 1000.0, 20, 0)
    assert low.tolist() == [1000.0, -torch.inf]
    assert high.tolist() == [1000.0, torch.inf]


def test_an_interval_of_games_that_seldom_have_ratings_says_that_it_is_unknown():
    games = torch.zeros(3, 2, 2)
    games[:2, 0, 1] = games[2, 1, 0] = 1
    low, high, left_out = elo_interval(games, 0.0, 1, 1000.0, 50, 0)
    assert left_out > 10
    assert low.tolist() == [-math.inf, 1000]
    assert high.tolist() == [math.inf, 1000]
    low, high, left_out = elo_interval(games, 1.0, 1, 1000.0, 50, 0)
    assert left_out == 0
    assert bool(low.isfinite().all())
