"""Ensemble aggregates on the test vectors, and where they meet each other."""

import statistics

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.functional.aggregate import (
    lower_confidence,
    mean,
    total_variance,
    uncertainty_weighted,
    variance,
    worst_case,
)

SCORES = [0.2, 0.5, 0.9, 1.4, -0.3]
MEMBERS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def test_vectors():
    members = torch.tensor([SCORES, SCORES[::-1]])  # two rows: the members are the columns, in any order
    assert_close(mean(members), torch.full((2,), 0.54))
    assert_close(variance(members, 0), torch.full((2,), 0.3384))
    assert_close(variance(members, 1), torch.full((2,), 0.4230))
    assert_close(worst_case(members), torch.full((2,), -0.3))
    assert_close(uncertainty_weighted(members, 0.5, 0), torch.full((2,), 0.3708))
    assert_close(uncertainty_weighted(members, 0.5, 1), torch.full((2,), 0.3285))


def test_moments_are_those_of_the_standard_library():
    for row, average, population, sample in zip(
        MEMBERS.tolist(),
        mean(MEMBERS).tolist(),
        variance(MEMBERS, 0).tolist(),
        variance(MEMBERS, 1).tolist(),
        strict=True,
    ):
        assert average == pytest.approx(statistics.fmean(row), abs=1e-6)
        assert population == pytest.approx(statistics.pvariance(row), rel=1e-5)
        assert sample == pytest.approx(statistics.variance(row), rel=1e-5)


def test_weight_zero_is_the_mean_and_a_weight_lowers_what_members_disagree_on():
    assert_close(uncertainty_weighted(MEMBERS, 0.0, 0), MEMBERS.sum(1) / 4)
    assert uncertainty_weighted(MEMBERS, 0.1, 0).lt(MEMBERS.sum(1) / 4).all()


def test_members_that_agree_are_not_penalised():
    agreed = torch.tensor([[0.7, 0.7, 0.7]])
    for value in (mean(agreed), worst_case(agreed), uncertainty_weighted(agreed, 10.0, 0)):
        assert_close(value, torch.tensor([0.7]))


def test_an_ensemble_of_one_is_its_member():
    member = MEMBERS[:, :1]
    for value in (mean(member), worst_case(member), uncertainty_weighted(member, 0.5, 0)):
        assert_close(value, member[:, 0])


def test_a_sample_variance_of_one_member_is_refused():
    with pytest.raises(ValueError, match="more than 1 members, found 1"):
        uncertainty_weighted(MEMBERS[:, :1], 0.5, 1)


def test_total_variance_is_that_of_draws_from_a_member_drawn_at_random():
    members, variances = torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 4.0]])
    torch.manual_seed(0)
    which = torch.randint(2, (400_000,))
    draws = members[0, which] + variances[0, which].sqrt() * torch.randn(400_000)
    assert total_variance(members, variances).item() == pytest.approx(draws.var().item(), rel=0.01)
    assert total_variance(members, variances).item() == pytest.approx(2.5 + 2.25)


def test_lower_confidence_is_the_mean_less_deviations():
    members, variances = torch.tensor([[0.0, 3.0], [1.0, 1.0]]), torch.tensor([[1.0, 4.0], [9.0, 9.0]])
    assert lower_confidence(members, variances, weight=2.0).tolist() == pytest.approx([1.5 - 2 * 4.75**0.5, -5.0])
    assert lower_confidence(members, variances, weight=0.0).tolist() == [1.5, 1.0]
    assert lower_confidence(torch.tensor([[2.0]]), torch.tensor([[0.25]]), weight=1.0).tolist() == [1.5]
