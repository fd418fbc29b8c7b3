"""Points of several objectives, more of each being better: which are dominated, and how good the rest is as a front."""

import math

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


def dominated(points: Points) -> NDArray[np.bool_]:
    """(n, m) points -> (n,) whether another is at least as good in every objective and better in one.

    No tolerance: the same rule for every method. Equal points do not dominate each other.

    Raises:
        ValueError: a value is not finite.
    """
    _refuse_holes(points)
    no_worse = np.all(points[None] >= points[:, None], axis=2)  # [i, j]: j beside i
    better = np.any(points[None] > points[:, None], axis=2)
    return np.any(no_worse & better, axis=1)


def front(points: Points) -> Points:
    """(f, m) the points that none dominates, each once, ascending in the first objective."""
    return np.unique(points[~dominated(points)], axis=0)


def hypervolume(points: Points, reference: Points) -> float:
    """Volume of what the points dominate above the reference, exactly: in the product of the objectives' units.

    A point that is not better than the reference in every objective contributes nothing.

    Args:
        points: (n, m), any m >= 1, n >= 0.
        reference: (m,) declared before looking at the points; volumes compare only under the same one.

    Raises:
        ValueError: the number of objectives differs, or a value is not finite.

    Source: While, Bradstreet, Barone 2012, IEEE Transactions on Evolutionary Computation 16 (1), the WFG algorithm: the
    volume is a sum over the points, each of its own box less what the later points cover of it.
    """
    if points.ndim != 2 or points.shape[1:] != reference.shape:
        raise ValueError(
            f"points of shape {points.shape}, a reference of shape {reference.shape}; expected (n, m) and (m,)"
        )
    _refuse_holes(points)
    _refuse_holes(reference)
    above = points[(points > reference).all(1)] - reference
    return _volume(front(above)) if len(above) else 0.0


def _volume(above: Points) -> float:
    """Of a front of which no point dominates another, ascending in the first objective, above the origin."""
    if above.shape[1] == 1:
        return float(above.max())
    if above.shape[1] == 2:  # a staircase: the second objective falls where the first rises
        return float(np.diff(above[:, 0], prepend=0.0) @ above[:, 1])
    total = 0.0
    for k, point in enumerate(above):
        total += float(point.prod())
        if k + 1 < len(above):
            total -= _volume(front(np.minimum(above[k + 1 :], point)))
    return total


def spacing(points: Points) -> float:
    """How unevenly a front is covered: standard deviation of each point's distance (L1) to its nearest neighbour.

    0 for equal steps; NaN for fewer than two points. In units of the objectives, which should be alike.

    Source: Schott 1995, Fault tolerant design using single and multicriteria genetic algorithm optimization, MIT.
    """
    if len(points) < 2:
        return math.nan
    distances = np.abs(points[:, None] - points[None]).sum(2)
    np.fill_diagonal(distances, np.inf)
    return float(distances.min(1).std(ddof=1))


def spread(points: Points) -> float:
    """How far a front reaches: length of the diagonal of the box around it, in units of the objectives.

    Source: the maximum spread of Zitzler, Deb, Thiele 2000, Evolutionary Computation 8 (2).
    """
    return float(np.linalg.norm(np.ptp(points, axis=0)))


def _refuse_holes(points: Points) -> None:
    if not np.isfinite(points).all():
        raise ValueError(f"{points[~np.isfinite(points)][0]} among the points; a front is made of finite numbers")
