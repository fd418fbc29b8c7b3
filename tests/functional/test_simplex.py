"""The lattice is complete, without repeats, and on the simplex; other weights are refused."""

from itertools import product
from math import comb, fsum

import pytest

from rlhf_lab.functional.simplex import check_simplex, preference_grid, simplex_lattice


@pytest.mark.parametrize("num_weights", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [1, 2, 7, 10])
def test_lattice_is_every_vector_of_whole_steps(num_weights, steps):
    found = [tuple(round(weight * steps) for weight in point) for point in simplex_lattice(num_weights, steps)]
    assert len(found) == comb(steps + num_weights - 1, num_weights - 1)
    if steps**num_weights <= 20_000:
        assert set(found) == {p for p in product(range(steps + 1), repeat=num_weights) if sum(p) == steps}
    assert len(set(found)) == len(found)
    assert found == sorted(found)


@pytest.mark.parametrize("num_weights", [2, 3, 4])
@pytest.mark.parametrize("steps", [3, 10, 30])
def test_lattice_sums_to_one_and_every_weight_is_the_nearest_number(num_weights, steps):
    for point in simplex_lattice(num_weights, steps):
        assert fsum(point) == pytest.approx(1, abs=2**-52)
        assert all(weight == round(weight * steps) / steps for weight in point)
        check_simplex(point, "weights")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.5, 0.6], r"stage.weights=\[0.5, 0.6\] add up to 1.1"),
        ([1.5, -0.5], r"\[1.5, -0.5\].*0 or more"),
        ([float("nan"), 1.0], "0 or more"),
        ([0.5, 0.49999], "add up to 0.99999"),
        ([], "add up to 0"),
    ],
)
def test_other_weights_are_refused(weights, said):
    with pytest.raises(ValueError, match=said):
        check_simplex(weights, "stage.weights")


def test_rounded_thirds_are_accepted():
    check_simplex([0.3333333, 0.3333333, 0.3333333], "weights")


def test_the_released_list_has_thirteen_points_on_the_simplex():
    found = list(preference_grid(3, "released"))
    assert len(found) == len(set(found)) == 13
    assert {tuple(sorted(point)) for point in found} == {
        (0, 0, 1), (0.1, 0.1, 0.8), (0.2, 0.2, 0.6), (0.2, 0.4, 0.4), (1 / 3, 1 / 3, 1 / 3),
    }  # fmt: skip
    for point in found:
        check_simplex(point, "weights")  # the released centre, three times 0.33, would not pass
    assert list(preference_grid(2, 4)) == list(simplex_lattice(2, 4))
    with pytest.raises(ValueError, match="of 3 rewards, but there are 2; set a number of steps"):
        list(preference_grid(2, "released"))
