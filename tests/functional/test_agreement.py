"""Published worked examples of each coefficient, and alpha against a loop over pairs."""

import math
from itertools import permutations

import pytest
import torch

from rlhf_lab.functional.agreement import MISSING, cohen_kappa, fleiss_kappa, krippendorff_alpha

# Krippendorff 2011: four observers, twelve units, values 1 to 5
OBSERVED = (
    ["11.1", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", ".555", "..11", "..3."]
)  # fmt: skip
# Fleiss 1971's kind of table: ten subjects, fourteen raters, five categories; kappa 0.210
FLEISS = "0 0 0 0 14, 0 2 6 4 2, 0 0 3 5 6, 0 3 9 2 0, 2 2 8 1 1, 7 7 0 0 0, 3 2 6 3 0, 2 5 3 2 2, 6 5 2 1 0, 0 2 2 3 7"


def as_ratings(units):
    return torch.tensor([[MISSING if value == "." else int(value) - 1 for value in unit] for unit in units])


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815)])
def test_alpha_of_the_published_example(level, alpha):
    assert krippendorff_alpha(as_ratings(OBSERVED), 5, level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_is_a_ratio_of_disagreements_over_pairs():
    ratings = torch.randint(-1, 3, (30, 4), generator=torch.Generator().manual_seed(2))
    units = [[value for value in row if value != MISSING] for row in ratings.tolist()]
    units = [unit for unit in units if len(unit) > 1]
    every = [value for unit in units for value in unit]
    within = sum(sum(a != b for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units) / len(every)
    among = sum(a != b for a, b in permutations(every, 2)) / (len(every) * (len(every) - 1))
    assert krippendorff_alpha(ratings, 3, "nominal") == pytest.approx(1 - within / among)


def test_fleiss_kappa_of_the_known_table():
    rows = [[int(n) for n in row.split()] for row in FLEISS.split(",")]
    ratings = torch.tensor([[value for value, n in enumerate(row) for _ in range(n)] for row in rows])
    assert fleiss_kappa(ratings, 5) == pytest.approx(0.210, abs=5e-4)
    with pytest.raises(ValueError, match="two or more ratings of every item"):
        fleiss_kappa(as_ratings(OBSERVED), 5)


def test_cohen_kappa_of_a_table_by_hand():
    # both yes 20, yes/no 5, no/yes 10, both no 15: (0.7 - 0.5) / (1 - 0.5)
    first = torch.tensor([1] * 25 + [0] * 25)
    second = torch.tensor([1] * 20 + [0] * 5 + [1] * 10 + [0] * 15)
    assert cohen_kappa(first, second, 2) == pytest.approx(0.4)
    assert cohen_kappa(first, first, 2) == 1
    assert math.isnan(cohen_kappa(torch.ones(4).long(), torch.ones(4).long(), 2))
