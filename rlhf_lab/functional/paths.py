"""Paths of training runs through (distance, value), read where they are equally far."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def first_passage(distance: Array, values: Array, grid: Array) -> Array:
    """What a path had when it was first as far as each point of a grid, between two measurements by a straight line.

    Args:
        distance: (T,) in the order in which it was measured; it may fall back, which is not gone along again.
        values: (T, K) measured at the same times.
        grid: (G,) distances.

    Returns:
        (G, K); NaN where the path began farther away, or never came so far.

    Raises:
        ValueError: the lengths differ, or there is no measurement.
    """
    if len(distance) != len(values) or not len(distance):
        raise ValueError(f"{len(distance)} distances and {len(values)} values; a path has one value at each distance")
    reached = np.maximum.accumulate(distance)
    after = np.searchsorted(reached, grid, side="left")  # the first measurement that is as far
    found = np.full((len(grid), values.shape[1]), np.nan)
    for g in np.flatnonzero((after < len(distance)) & (grid >= distance[0])):
        i = after[g]
        if i == 0:
            found[g] = values[0]
        else:
            share = (grid[g] - distance[i - 1]) / (distance[i] - distance[i - 1])
            found[g] = (1 - share) * values[i - 1] + share * values[i]
    return found
