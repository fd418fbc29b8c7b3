"""Couples of pairs: the stronger one is stronger, and how often a pair is either is what the strategy says."""

from collections import Counter

import pytest
import torch

from rlhf_lab.data.quadruples import flip, pair_up


@pytest.fixture(scope="module")
def margins():
    """400 different margins, some negative, in no order."""
    return torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("sampling", ["iterative", "random"])
def test_the_first_of_a_couple_wins_by_more_and_no_couple_comes_twice(sampling, margins):
    couples = pair_up(margins, sampling, 3, seed=1)
    assert all(margins[strong] > margins[weak] for strong, weak in couples)
    assert len(set(couples)) == len(couples)
    assert pair_up(margins, sampling, 3, seed=1) == couples
    assert pair_up(margins, sampling, 3, seed=2) != couples


@pytest.mark.parametrize("partners", [1, 2, 5])
def test_iterative_sampling_takes_every_pair_as_the_stronger_one_equally_often(margins, partners):
    strong = Counter(couple[0] for couple in pair_up(margins, "iterative", partners, seed=0))
    weakest_first = sorted(range(len(margins)), key=lambda i: margins[i])
    assert [strong[i] for i in weakest_first] == [min(rank, partners) for rank in range(len(margins))]


def test_iterative_sampling_draws_partners_evenly_among_the_weaker_ones():
    margins = [0.0, 1.0, 2.0, 3.0]
    drawn = Counter(
        weak for seed in range(3000) for strong, weak in pair_up(margins, "iterative", 1, seed) if strong == 3
    )
    assert all(abs(drawn[i] - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for i in range(3))  # four standard errors


def test_random_sampling_puts_strong_pairs_in_the_stronger_place(margins):
    """A pair with a fraction f of the others below it wins a random couple with probability f: twice f times even."""
    n = len(margins)
    strong = Counter(couple[0] for seed in range(30) for couple in pair_up(margins, "random", 2, seed))
    total = sum(strong.values())
    weakest_first = sorted(range(n), key=lambda i: margins[i])
    quarters = [sum(strong[i] for i in weakest_first[k * n // 4 : (k + 1) * n // 4]) / total for k in range(4)]
    assert quarters == pytest.approx([1 / 16, 3 / 16, 5 / 16, 7 / 16], abs=0.01)


def test_equal_margins_have_no_order():
    assert pair_up([1.0] * 50, "iterative", 3, seed=0) == []
    assert pair_up([1.0] * 50, "random", 3, seed=0) == []
    tied = pair_up([0.0, 0.0, 5.0], "iterative", 3, seed=0)
    assert sorted(tied) == [(2, 0), (2, 1)]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_noise_swaps_exactly_the_stated_share(share, margins):
    couples = pair_up(margins, "iterative", 1, seed=0)
    noisy = flip(couples, share, seed=0)
    swapped = [old[::-1] == new for old, new in zip(couples, noisy, strict=True)]
    kept = [old == new for old, new in zip(couples, noisy, strict=True)]
    assert sum(swapped) == round(share * len(couples))
    assert all(a != b for a, b in zip(swapped, kept, strict=True))
