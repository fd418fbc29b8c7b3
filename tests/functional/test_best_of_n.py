"""The estimator is the mean over every subset, its weights are ratios of binomials, its KL is the published table."""

from fractions import Fraction
from itertools import combinations
from math import comb
from statistics import fmean

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.functional.best_of_n import ascending, curves, expected_best, kl_of_best_of_n, weights

TABLE = {1: 0.0, 2: 0.193, 16: 1.835, 128: 3.860, 1024: 5.932, 6144: 7.723, 8192: 8.011, 12500: 8.434}


def by_enumeration(selector: list[float], value: list[float], n: int) -> float:
    """The mean, over all subsets of n samples, of the value of the one with the highest score; the later of equals."""
    return fmean(value[max(drawn, key=lambda i: (selector[i], i))] for drawn in combinations(range(len(value)), n))


@pytest.mark.parametrize("n", range(1, 8))
def test_expected_best_is_the_mean_over_all_subsets(n):
    source = torch.Generator().manual_seed(n)
    selector, value = torch.randn(3, 7, generator=source), torch.randn(3, 7, generator=source)
    selector[1] = torch.tensor([0.0, 1, 1, 0, 2, 2, 1])  # ties
    expected = [by_enumeration(s, v, n) for s, v in zip(selector.tolist(), value.tolist(), strict=True)]
    assert expected_best(selector, value, n).tolist() == pytest.approx(expected, abs=1e-12)


def test_curves_of_several_values_are_those_of_each_alone():
    source = torch.Generator().manual_seed(2)
    selector = torch.randint(0, 4, (5, 9), generator=source).float()  # ties in every row
    values = [torch.randn(5, 9, generator=source), selector]
    found = curves(selector, values, [1, 4, 9])
    for i, n in enumerate((1, 4, 9)):
        for k, value in enumerate(values):
            by_hand = [by_enumeration(s, v, n) for s, v in zip(selector.tolist(), value.tolist(), strict=True)]
            assert found[:, i, k].tolist() == pytest.approx(by_hand, abs=1e-12)


def test_of_equal_samples_the_later_is_better():
    scores = torch.tensor([[2.0, 1.0, 2.0, 1.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert ascending(scores).tolist() == [[4, 1, 3, 0, 2], [4, 3, 2, 1, 0]]
    many = torch.randint(0, 50, (3, 3000), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(ascending(many), many.argsort(dim=1, stable=True))


def test_one_is_the_mean_and_all_is_the_maximum():
    scores = torch.randn(4, 33, generator=torch.Generator().manual_seed(0))
    assert_close(expected_best(scores, scores, 1).float(), scores.mean(1))
    assert_close(expected_best(scores, scores, 33).float(), scores.amax(1))
    assert_close(expected_best(-scores, scores, 33).float(), scores.amin(1))


@pytest.mark.parametrize(("size", "n"), [(5, 2), (60, 1), (60, 17), (60, 60), (200, 17)])
def test_weights_are_ratios_of_binomials(size, n):
    exact = [float(Fraction(comb(i - 1, n - 1), comb(size, n))) for i in range(1, size + 1)]
    assert weights(size, n).tolist() == pytest.approx(exact, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("n", [1, 2, 64, 1024, 6144, 12500, 12600])
def test_weights_of_the_published_size_sum_to_one(n):
    assert weights(12600, n).sum().item() == pytest.approx(1, abs=1e-9)


def test_kl_is_that_of_the_published_table():
    for n, nats in TABLE.items():
        assert kl_of_best_of_n(n) == pytest.approx(nats, abs=5e-4)


def test_kl_is_that_of_the_order_statistic():
    n, size = 5, 40  # of a discrete uniform distribution without ties it is a sum, which tends to the formula
    cells = 200_000
    grid = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    mass = (grid**n).diff()
    assert (mass * (mass * cells).log()).sum().item() == pytest.approx(kl_of_best_of_n(n), abs=1e-4)
    assert kl_of_best_of_n(size) > kl_of_best_of_n(n)


def test_the_order_is_that_of_the_aggregate_and_carries_every_value_with_it():
    """Members disagree about the best; what is measured belongs to the one that their aggregate chose."""
    members = torch.tensor([[[9.0, -9.0], [1.0, 1.0], [0.0, 3.0]]])  # (P, N, M)
    gold = torch.tensor([[10.0, 20.0, 30.0]])
    assert expected_best(members.mean(2), gold, 3).item() == 30
    assert expected_best(members.amin(2), gold, 3).item() == 20
    assert expected_best(members[..., 0], gold, 3).item() == 10


@pytest.mark.parametrize("n", [0, 4])
def test_n_outside_the_samples_is_refused(n):
    with pytest.raises(ValueError, match=f"best of {n} cannot be told from 3 samples"):
        weights(3, n)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        expected_best(torch.zeros(2, 3), torch.zeros(2, 4), 1)
