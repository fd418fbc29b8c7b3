"""Clipped losses by hand, PPO against the policy gradient, Bradley-Terry against the probabilities it stands for."""

import math
from statistics import NormalDist

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.functional.losses import bradley_terry, clip_fraction, clipped_surrogate, clipped_value, probit


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),  # slope: of the loss in the log-probability
    [
        (1.5, 2.0, -2.4, 0.0),  # already likelier by more than the clip: nothing to gain
        (1.5, -2.0, 3.0, 3.0),  # likelier and bad: all of it counts
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, slope: float):
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    value = clipped_surrogate(new, old, torch.tensor([[advantage]], dtype=torch.float64), 0.2)
    (gradient,) = torch.autograd.grad(value.sum(), new)
    assert value.item() == pytest.approx(loss)
    assert gradient.item() == pytest.approx(slope)


def test_at_ratio_one_the_gradient_is_that_of_the_expected_reward():
    rewards = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)  # of each of four actions
    logits = torch.tensor([0.2, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    # all actions, each as often as the policy takes it
    surrogate = logprobs.exp().detach() @ clipped_surrogate(logprobs, logprobs.detach(), rewards, 0.2)
    (gradient,) = torch.autograd.grad(surrogate, logits)
    for i in range(4):
        moved = [logits.detach() + sign * 1e-6 * torch.eye(4, dtype=torch.float64)[i] for sign in (1, -1)]
        up, down = ((point.softmax(0) @ rewards).item() for point in moved)
        assert gradient[i].item() == pytest.approx(-(up - down) / 2e-6, abs=1e-8)


def test_at_ratio_one_each_sample_has_the_gradient_of_reinforce():
    advantages = torch.tensor([1.5, -2.0, 0.25])
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    chosen = torch.tensor([4, 0, 2])
    logprobs = logits.log_softmax(1)[torch.arange(3), chosen]
    (gradient,) = torch.autograd.grad(clipped_surrogate(logprobs, logprobs.detach(), advantages, 0.2).sum(), logits)
    # the score function of a softmax in closed form: indicator minus probability
    expected = -advantages[:, None] * (torch.eye(5)[chosen] - logits.detach().softmax(1))
    assert_close(gradient, expected)


def test_clip_fraction_marks_the_ratios_outside_on_either_side():
    ratios = torch.tensor([[1.5, 1.19, 1.0, 0.81, 0.79, 1.21]])
    assert clip_fraction(ratios.log(), torch.zeros(1, 6), 0.2).tolist() == [[1, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [
        (0.5, 0.0, 1.0, 0.125),  # within the clip: half the squared error
        (3.0, 0.0, 4.0, 4.5),  # the kept value, 1, is worse
        (3.0, 0.0, 0.0, 4.5),  # the new value is worse
        (-3.0, -1.0, -2.0, 0.5),  # kept at -2, which is right; the new value is not
        (-3.0, -1.0, -4.0, 2.0),
    ],
)
def test_clipped_value_by_hand(value: float, old: float, target: float, loss: float):
    arguments = [torch.tensor([[x]]) for x in (value, old, target)]
    assert clipped_value(*arguments, clip=1.0).item() == pytest.approx(loss)


def test_bradley_terry_is_the_negative_log_of_the_probability_that_the_first_wins():
    first, second = torch.randn(2, 20, generator=torch.Generator().manual_seed(3)) * 2
    loss = bradley_terry(first, second)
    for a, b, nats in zip(first.tolist(), second.tolist(), loss.tolist(), strict=True):
        assert nats == pytest.approx(-math.log(math.exp(a) / (math.exp(a) + math.exp(b))), rel=1e-5)


def test_the_two_outcomes_of_a_bradley_terry_comparison_are_exhaustive():
    first, second = torch.randn(2, 20, generator=torch.Generator().manual_seed(4)) * 2
    assert_close((-bradley_terry(first, second)).exp() + (-bradley_terry(second, first)).exp(), torch.ones(20))


def test_a_margin_handicaps_the_preferred_response():
    margin = torch.tensor([1.0, 0.0])
    loss = bradley_terry(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), margin)
    assert loss.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1))], rel=1e-6)


def test_bradley_terry_stays_finite_far_out():
    loss = bradley_terry(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0]))
    assert loss.tolist() == [1000.0, 0.0]


def test_probit_is_the_log_of_the_normal_distribution_of_the_difference():
    mean_w, mean_l = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.5, 1.0, 0.3])
    v_w, v_l = torch.tensor([0.0, 1.5, -3.0]), torch.tensor([0.7, -1.0, 2.0])
    for i, loss in enumerate(probit(mean_w, mean_l, v_w, v_l)):
        deviation = math.sqrt(math.exp(v_w[i]) + math.exp(v_l[i]))
        wins = NormalDist(0, deviation).cdf((mean_w[i] - mean_l[i]).item())
        assert loss.item() == pytest.approx(-math.log(wins), rel=1e-5)


def test_probit_teaches_most_where_it_is_sure_and_wrong():
    mean_w = torch.tensor([-30.0, -1.0, 30.0], requires_grad=True)
    zero = torch.zeros(3)
    loss = probit(mean_w, zero, zero, zero)
    assert loss.isfinite().all()
    (slope,) = torch.autograd.grad(loss.sum(), mean_w)
    # for x far below 0, -log Phi(x) = x^2 / 2 + log|x| + log sqrt(2 pi) + O(1 / x^2), here x = mean / sqrt(2)
    far = 30 / math.sqrt(2)
    assert loss[0].item() == pytest.approx(far**2 / 2 + math.log(far) + math.log(2 * math.pi) / 2, rel=1e-4)
    assert slope[0].item() == pytest.approx(-(far + 1 / far) / math.sqrt(2), rel=1e-4)
    assert slope[0] < slope[1] < slope[2] <= 0
    assert slope[2].abs() < 1e-30
