"""KL estimators: published numbers, and expectations and gradients by enumeration of a small categorical."""

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from rlhf_lab.functional.kl import KLEstimator, kl_estimate

ESTIMATORS: tuple[KLEstimator, ...] = get_args(KLEstimator)
LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.0, -2.5], dtype=torch.float64)
REFERENCE = torch.tensor([-0.4, 0.6, 0.1, -1.2, 0.5], dtype=torch.float64).log_softmax(0)


def exact_kl(logits: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=logits), Categorical(logits=REFERENCE))


def gradient_of_the_expected_estimate(estimator: KLEstimator) -> Tensor:
    """Mean over samples of the estimate's gradient, as a loss on policy has it: the sampling carries no gradient."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    estimate = logprobs.exp().detach() @ kl_estimate(logprobs, REFERENCE, estimator)
    return torch.autograd.grad(estimate, logits)[0]


@pytest.mark.parametrize(("estimator", "nats"), [("k1", 0.1), ("k2", 0.005), ("k3", 0.0048374)])
def test_published_vectors_at_a_log_ratio_of_minus_one_tenth(estimator: KLEstimator, nats: float):
    # log r = log pi_ref - log pi = -0.1: the policy likes the token better than the reference does
    assert kl_estimate(torch.tensor(-1.0), torch.tensor(-1.1), estimator).item() == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize(("estimator", "nats"), [("k1", -0.1), ("k2", 0.005), ("k3", 0.0051709)])
def test_published_vectors_with_the_opposite_sign(estimator: KLEstimator, nats: float):
    assert kl_estimate(torch.tensor(-1.1), torch.tensor(-1.0), estimator).item() == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expectation_of_k1_and_of_k3_is_the_kl(estimator: KLEstimator):
    logprobs = LOGITS.log_softmax(0)
    assert_close(logprobs.exp() @ kl_estimate(logprobs, REFERENCE, estimator), exact_kl(LOGITS), rtol=1e-12, atol=0)


def test_the_expectation_of_k2_is_not_the_kl():
    logprobs = LOGITS.log_softmax(0)
    assert abs(logprobs.exp() @ kl_estimate(logprobs, REFERENCE, "k2") / exact_kl(LOGITS) - 1) > 0.05


def test_k2_and_k3_are_never_negative_however_small_or_large_the_ratio():
    size = torch.logspace(-12, 1.5, 20_001)
    logprobs = torch.cat([size, -size])
    for estimator in ("k2", "k3"):
        assert kl_estimate(logprobs, torch.zeros_like(logprobs), estimator).min() >= 0


def test_on_policy_the_gradient_of_k2_is_that_of_the_kl():
    logits = LOGITS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(exact_kl(logits), logits)
    assert expected.abs().max() > 0.1
    assert_close(gradient_of_the_expected_estimate("k2"), expected, rtol=1e-10, atol=1e-12)


def test_on_policy_the_gradient_of_k1_vanishes():
    assert gradient_of_the_expected_estimate("k1").abs().max() < 1e-12


def test_on_policy_the_gradient_of_k3_is_that_of_the_reverse_divergence():
    logits = LOGITS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(kl_divergence(Categorical(logits=REFERENCE), Categorical(logits=logits)), logits)
    assert_close(gradient_of_the_expected_estimate("k3"), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_where_both_are_zero_gives_zero(estimator: KLEstimator):
    assert kl_estimate(torch.zeros(2, 3), torch.zeros(2, 3), estimator).eq(0).all()
