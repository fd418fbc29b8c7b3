"""Weights that are shares of one whole."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations
from typing import Literal

from rlhf_lab.types import Count

Grid = Count | Literal["released"]  # of preferences: steps from 0 to 1 on the lattice, or the released list

MOST_ASTRAY = 1e-6  # how far from 1 the sum of typed weights may be


def check_simplex(weights: Sequence[float], name: str) -> None:
    """Refuse weights that are not shares of one whole.

    Raises:
        ValueError: one is negative or no number, or their sum is not 1; `name` says whose they are.
    """
    if not all(weight >= 0 for weight in weights):
        raise ValueError(f"{name}={list(weights)}: shares of a whole are 0 or more")
    if not abs(sum(weights) - 1) <= MOST_ASTRAY:
        raise ValueError(f"{name}={list(weights)} add up to {sum(weights):.6g}; they must add up to 1")


def simplex_lattice(num_weights: int, steps: int) -> Iterator[tuple[float, ...]]:
    """Every vector of `num_weights` multiples of 1 / `steps` that add up to 1, the first weight rising from 0 to 1.

    There are C(steps + num_weights - 1, num_weights - 1). Counted in whole steps, so none is lost to rounding.

    Example: `simplex_lattice(2, 2)` gives (0, 1), (0.5, 0.5), (1, 0).
    """
    places = steps + num_weights - 1  # of steps in a row, with a bar wherever the next weight begins
    for bars in combinations(range(places), num_weights - 1):
        yield tuple((high - low - 1) / steps for low, high in pairwise((-1, *bars, places)))


def preference_grid(num_weights: int, grid: Grid) -> Iterator[tuple[float, ...]]:
    """The preferences that are evaluated: the lattice of so many steps, for any number of rewards, or "released".

    Raises:
        ValueError: the released list is asked for and there are not three rewards.

    Source: the list of the code of Rewards-in-Context, Yang et al. 2024, arXiv:2402.10207, for three rewards: the
    corners, the orders of three mixtures, and the centre, there (0.33, 0.33, 0.33), which does not add up to 1. It has
    no point on an edge but the corners.
    """
    if isinstance(grid, int):
        yield from simplex_lattice(num_weights, grid)
        return
    if num_weights != 3:
        raise ValueError(f"the released grid is of 3 rewards, but there are {num_weights}; set a number of steps")
    for mixture in ((1.0, 0.0, 0.0), (0.8, 0.1, 0.1), (0.6, 0.2, 0.2), (0.4, 0.4, 0.2)):
        yield from sorted(set(permutations(mixture)))
    yield (1 / 3, 1 / 3, 1 / 3)
