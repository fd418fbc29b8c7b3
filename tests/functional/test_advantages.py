"""Token rewards by hand, and advantage estimation against its definition as a mixture of n-step returns."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_lab.functional.advantages import gae, group_relative, last_index, leave_one_out, token_rewards


def mixture_of_returns(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Advantages by definition, (1 - lam) sum over n of lam^(n - 1) (n-step return - V); the last takes the rest."""
    steps = len(rewards)
    advantages = []
    for t in range(steps):
        mixed = 0.0
        for n in range(1, steps - t + 1):
            n_step = sum(gamma**k * rewards[t + k] for k in range(n))
            n_step += gamma**n * values[t + n] if t + n < steps else 0.0
            mixed += lam ** (n - 1) * (1 - lam if t + n < steps else 1.0) * n_step
        advantages.append(mixed - values[t])
    return advantages


def ragged(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def test_gae_on_three_tokens_worked_by_hand():
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 0.25]])
    advantages, returns = gae(rewards, values, ragged([3], 3), gamma=0.5, lam=0.5)
    # deltas: 2 - .25 = 1.75; 0 + .5 * .25 - 1 = -.875; 1 + .5 * 1 - .5 = 1
    assert_close(advantages, torch.tensor([[0.890625, -0.4375, 1.75]]))
    assert_close(returns, torch.tensor([[1.390625, 0.5625, 2.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 0.95), (0.7, 1.0), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_the_mixture_of_n_step_returns_on_ragged_rows(gamma: float, lam: float):
    draw = torch.Generator().manual_seed(1)
    lengths = [7, 1, 4, 6]
    rewards, values = torch.randn(2, 4, 7, generator=draw, dtype=torch.float64)
    mask = ragged(lengths, 7)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        expected = mixture_of_returns(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert_close(advantages[row, :length], torch.tensor(expected, dtype=torch.float64))
        assert_close(returns[row, :length] - values[row, :length], torch.tensor(expected, dtype=torch.float64))
    assert advantages[~mask].eq(0).all()
    assert returns[~mask].eq(0).all()


def test_gae_does_not_read_what_is_masked():
    draw = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, 3, 5, generator=draw)
    mask = ragged([5, 2, 3], 5)
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    dirty = gae(rewards.where(mask, torch.nan), values.where(mask, 1e9), mask, gamma=0.9, lam=0.8)
    assert_close(dirty, clean)


def test_token_rewards_put_the_score_at_the_last_token_and_the_penalty_at_each():
    penalty = torch.tensor([[0.5, -0.25, 1.0], [0.2, 0.4, 9.0], [-0.5, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([3.0, -1.0, 2.0]), penalty, ragged([3, 2, 1], 3), float("inf"))
    assert_close(rewards, torch.tensor([[-0.5, 0.25, 2.0], [-0.2, -1.4, 0.0], [2.5, 0.0, 0.0]]))


def test_the_clip_is_on_the_sum_of_score_and_penalty():
    score, penalty = torch.tensor([3.0, -3.0]), torch.tensor([[1.0, 2.0], [-5.0, -1.5]])
    rewards = token_rewards(score, penalty, ragged([2, 2], 2), 1.25)
    # 3 - 2 = 1 and -3 + 1.5 = -1.5; clipping the score before would give -0.75 and 0.25
    assert_close(rewards, torch.tensor([[-1.0, 1.0], [1.25, -1.25]]))


def test_an_empty_response_is_refused_and_counted():
    with pytest.raises(ValueError, match="2 responses are empty"):
        token_rewards(torch.zeros(3), torch.zeros(3, 4), ragged([0, 4, 0], 4), 50.0)


def test_last_index_finds_the_last_true_column():
    mask = torch.tensor([[True, False, False], [True, True, True], [False, True, False], [True, False, True]])
    assert last_index(mask).tolist() == [0, 2, 1, 2]


def loop_over_groups(returns: Tensor, group: Tensor, scale: bool) -> tuple[list[float], list[float]]:
    """Leave-one-out and group-relative advantages, one response at a time."""
    alone, relative = [], []
    for i, own in enumerate(returns.tolist()):
        siblings = [returns[j].item() for j in range(len(returns)) if group[j] == group[i] and j != i]
        everyone = [*siblings, own]
        mean = sum(everyone) / len(everyone)
        deviation = (sum((g - mean) ** 2 for g in everyone) / len(everyone)) ** 0.5 if scale else 1.0
        alone.append(own - sum(siblings) / len(siblings))
        relative.append((own - mean) / deviation)
    return alone, relative


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages_against_a_slow_loop_in_any_order_with_any_sizes(scale: bool):
    group = torch.tensor([7, 2, 7, 2, 2, 9, 7, 9, 2])
    returns = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone, relative = loop_over_groups(returns, group, scale)
    assert_close(leave_one_out(returns, group), torch.tensor(alone, dtype=torch.float64))
    assert_close(group_relative(returns, group, scale_by_sd=scale), torch.tensor(relative, dtype=torch.float64))


def test_a_group_of_equal_returns_teaches_nothing_and_rounding_does_not_either():
    group = torch.tensor([0, 0, 0, 1, 1])
    returns = torch.tensor([0.7, 0.7, 0.7, 1.0, 1.0 + 1e-6])
    advantages = group_relative(returns, group, scale_by_sd=True)
    assert advantages[:3].abs().max() < 1e-2
    assert advantages[3:].abs().max() < 1e-2
    assert leave_one_out(returns, group)[:3].abs().max() < 1e-6


@pytest.mark.parametrize("advantages", [leave_one_out, partial(group_relative, scale_by_sd=True)])
def test_a_response_without_siblings_is_refused(advantages: Callable[[Tensor, Tensor], Tensor]):
    with pytest.raises(ValueError, match=r"2 of 3 prompts have one response.*samples_per_prompt to 2"):
        advantages(torch.zeros(4), torch.tensor([0, 1, 1, 2]))
