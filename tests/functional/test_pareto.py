"""Fronts by strict dominance, and their volume against hand cases, counted cubes and another library."""

from itertools import product

import numpy as np
import pytest

from rlhf_lab.functional.pareto import dominated, front, hypervolume, spacing, spread


def waves(num_points, num_objectives):
    """Points by formula, so that other software can be given the same: round(10 sin(1.7 i (k + 1) + k), 2)."""
    i, k = np.arange(num_points)[:, None], np.arange(num_objectives)[None]
    return (np.sin(1.7 * i * (k + 1) + k) * 10).round(2)


def test_a_point_is_dominated_by_one_that_is_nowhere_worse_and_somewhere_better():
    points = np.array([[0, 3.0], [1, 2], [1, 2], [1, 1], [3, 0], [0, 0]])
    assert dominated(points).tolist() == [False, False, False, True, False, True]  # equal points stay
    assert front(points).tolist() == [[0, 3], [1, 2], [3, 0]]


def test_no_distance_is_too_small_to_dominate():
    points = np.array([[1.0, 1.0], [np.nextafter(1.0, 2), 1.0]])  # the released plot let 0.01 and 0.5 of the range pass
    assert dominated(points).tolist() == [True, False]


def test_hypervolume_of_two_boxes_by_hand():
    # 2 x 1 and 1 x 3 above (0, 0), of which 1 x 1 is in both
    assert hypervolume(np.array([[2.0, 1.0], [1.0, 3.0]]), np.zeros(2)) == 4.0
    assert hypervolume(np.array([[2.0, 1.0], [1.0, 3.0], [1.0, 1.0]]), np.zeros(2)) == 4.0
    assert hypervolume(np.array([[3.0, 2.0], [2.0, 4.0]]), np.ones(2)) == 4.0


def test_what_is_not_better_than_the_reference_everywhere_adds_nothing():
    assert hypervolume(np.array([[5.0, -1.0], [0.0, 9.0]]), np.zeros(2)) == 0.0
    assert hypervolume(np.empty((0, 3)), np.zeros(3)) == 0.0
    with pytest.raises(ValueError, match=r"shape \(2, 2\), a reference of shape \(3,\)"):
        hypervolume(np.ones((2, 2)), np.zeros(3))
    with pytest.raises(ValueError, match="nan among the points"):
        hypervolume(np.array([[np.nan, 1.0]]), np.zeros(2))


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4, 5])
def test_hypervolume_counts_the_cells_below_some_point(num_objectives):
    points = np.random.default_rng(num_objectives).integers(0, 5, (7, num_objectives))
    cells = sum(
        any((np.array(cell) < point).all() for point in points) for cell in product(range(5), repeat=num_objectives)
    )
    assert hypervolume(points.astype(float), np.zeros(num_objectives)) == cells


@pytest.mark.parametrize(
    ("num_points", "num_objectives", "expected", "on_the_front"),
    [(20, 2, 270.6685, 6), (30, 3, 3392.465195, 15), (66, 3, 3633.731692, 30), (20, 4, 32066.38336886, 14),
     (16, 5, 188416.5739628, 13)],
)  # fmt: skip
def test_hypervolume_agrees_with_another_library(num_points, num_objectives, expected, on_the_front):
    # computed with moocore 0.3.2 (López-Ibáñez et al.), hypervolume and is_nondominated, maximise=True
    points = waves(num_points, num_objectives)
    assert hypervolume(points, np.full(num_objectives, -8.0)) == pytest.approx(expected, rel=1e-12)
    assert (~dominated(points)).sum() == on_the_front


def test_even_steps_have_no_spacing_and_the_diagonal_as_spread():
    line = np.array([[0.0, 3.0], [1.0, 2.0], [2.0, 1.0], [3.0, 0.0]])
    assert spacing(line) == 0
    assert spread(line) == pytest.approx(18**0.5)
    assert spacing(np.array([[0.0, 0], [1, 0], [4, 0]])) == pytest.approx(np.std([1, 1, 3], ddof=1))
    assert np.isnan(spacing(line[:1]))
