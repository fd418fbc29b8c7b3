"""A path is read where it first came so far."""

import numpy as np
import pytest

from rlhf_lab.functional.paths import first_passage


def by_walking(distance, values, x):
    """Along the path in small steps, until it is as far."""
    if distance[0] > x:
        return np.nan
    for i in range(len(distance) - 1):
        for share in np.linspace(0, 1, 2001):
            if distance[i] + share * (distance[i + 1] - distance[i]) >= x - 1e-9:
                return values[i] + share * (values[i + 1] - values[i])
    return np.nan


def test_it_is_where_a_walk_along_the_path_first_comes():
    distance = np.array([0.1, 0.9, 0.5, 1.6, 1.6, 1.2, 2.0])
    values = np.array([[0.0, 3.0], [1.0, 2.0], [7.0, 1.0], [2.0, 0.0], [9.0, 5.0], [8.0, 6.0], [3.0, -1.0]])
    grid = np.array([0.0, 0.1, 0.4, 0.9, 1.0, 1.6, 1.7, 2.0, 2.1])
    found = first_passage(distance, values, grid)
    expected = [[by_walking(distance, column, x) for column in values.T] for x in grid]
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert np.isnan(found[[0, 8]]).all()
    assert found[4].tolist() == pytest.approx([7 - 5 * 5 / 11, 1 - 5 / 11])  # from where it fell back to, not from .9


def test_a_path_of_one_point_and_other_lengths():
    assert first_passage(np.zeros(1), np.ones((1, 1)), np.array([0.0, 1.0]))[0, 0] == 1
    with pytest.raises(ValueError, match="2 distances and 1 values"):
        first_passage(np.zeros(2), np.ones((1, 1)), np.zeros(1))
