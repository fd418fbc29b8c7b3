"""The length-controlled share against its likelihood, and its interval against a bootstrap over prompts."""

import math

import pytest
import torch
from scipy.optimize import minimize

from rlhf_lab.functional.length_control import length_controlled


@pytest.fixture
def judged():
    """300 prompts, two responses each, by a judge who likes what is longer: wins, gaps, prompts."""
    source = torch.Generator().manual_seed(5)
    gap = (torch.randn(600, generator=source) * 30 + 25).round()
    taste = torch.randn(300, generator=source).repeat_interleave(2) * 1.5
    won = (torch.rand(600, generator=source) < torch.sigmoid(-0.4 + taste + 1.2 * torch.tanh(gap / 39))).double()
    won[::10] = 0.5
    return won, gap, torch.arange(300).repeat_interleave(2)


def test_length_control_is_the_likeliest_regression_without_its_length(judged):
    won, gap, prompt = judged
    x = torch.tanh(gap.double() / gap.double().square().mean().sqrt())

    def loss(theta):
        z = theta[0] + theta[1] * x
        return float(-(won * torch.nn.functional.logsigmoid(z) + (1 - won) * torch.nn.functional.logsigmoid(-z)).sum())

    best = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10})
    found = length_controlled(won, gap, prompt)
    assert found is not None
    assert found[0] == pytest.approx(1 / (1 + math.exp(-best.x[0])), abs=1e-6)
    assert found[0] < float(won.mean()) - 0.05  # it wins by length


def test_the_other_side_has_the_rest(judged):
    won, gap, prompt = judged
    share, low, high = length_controlled(won, gap, prompt) or (0, 0, 0)
    assert length_controlled(1 - won, -gap, prompt) == pytest.approx((1 - share, 1 - high, 1 - low), abs=1e-12)


def test_the_interval_is_that_of_a_bootstrap_over_prompts(judged):
    won, gap, prompt = judged
    source = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(300):
        drawn = torch.randint(300, (300,), generator=source)
        rows = torch.stack([2 * drawn, 2 * drawn + 1], 1).flatten()
        found = length_controlled(won[rows], gap[rows], prompt)
        shares.append(found[0] if found else math.nan)
    share, low, high = length_controlled(won, gap, prompt) or (0, 0, 0)
    low_drawn, high_drawn = torch.quantile(torch.tensor(shares), torch.tensor([0.025, 0.975])).tolist()
    assert high - low == pytest.approx(high_drawn - low_drawn, rel=0.15)
    # responses to one prompt agree, so taking all for independent would be too sure
    _, low_of_rows, high_of_rows = length_controlled(won, gap, torch.arange(600)) or (0, 0, 0)
    assert high - low > 1.05 * (high_of_rows - low_of_rows)
    assert low < share < high


def test_equal_lengths_change_nothing_and_what_cannot_be_told_is_none():
    won, prompt = torch.tensor([1.0, 0, 1, 0.5, 1]), torch.arange(5)
    assert (length_controlled(won, torch.zeros(5), prompt) or [0])[0] == pytest.approx(0.7)
    assert length_controlled(torch.ones(5), torch.randn(5), prompt) is None
    assert length_controlled((torch.arange(8) > 3).double(), torch.arange(-4.0, 4) + 0.5, torch.arange(8)) is None
    assert length_controlled(torch.full((5,), 0.5), torch.arange(5.0), prompt) is None
    assert length_controlled(won[:2], torch.zeros(2), prompt[:2]) is None
