"""Weights that are shares of one whole."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

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
