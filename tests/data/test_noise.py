"""Labels that are wrong on purpose: as many as asked, whatever the order, and nested over rates."""

import hashlib

import pytest

from rlhf_lab.data.noise import LabelNoise

PAIRS = [hashlib.sha256(str(i).encode()).digest()[:16] for i in range(4000)]


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.25, 1000), (0.1, 400), (1.0, 4000), (0.333, 1332)])
def test_exactly_the_rate_is_flipped(rate, count):
    assert len(LabelNoise(recipe="exact", rate=rate, seed=0).flipped(PAIRS)) == count


def test_each_pair_is_flipped_with_its_probability_and_half_of_those_drawn_anew_are():
    each = LabelNoise(recipe="each", rate=0.25, seed=0).flipped(PAIRS)
    redrawn = LabelNoise(recipe="redrawn", rate=0.5, seed=0).flipped(PAIRS)
    assert abs(len(each) - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5
    assert abs(len(redrawn) - 1000) < 5 * (2000 * 0.25) ** 0.5
    assert set(redrawn) < set(LabelNoise(recipe="exact", rate=0.5, seed=0).flipped(PAIRS))


@pytest.mark.parametrize("recipe", ["exact", "each", "redrawn"])
def test_what_is_flipped_depends_on_the_pair_and_the_seed_alone(recipe):
    noise = LabelNoise(recipe=recipe, rate=0.3, seed=1)
    flipped = {PAIRS[i] for i in noise.flipped(PAIRS)}
    assert {PAIRS[::-1][i] for i in noise.flipped(PAIRS[::-1])} == flipped
    assert {PAIRS[i] for i in LabelNoise(recipe=recipe, rate=0.3, seed=2).flipped(PAIRS)} != flipped
    assert flipped < {PAIRS[i] for i in LabelNoise(recipe=recipe, rate=0.4, seed=1).flipped(PAIRS)}


def test_other_recipes_and_rates_are_refused():
    with pytest.raises(ValueError, match="expected exact, each or redrawn"):
        LabelNoise(recipe="some", rate=0.1, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a share of the pairs"):
        LabelNoise(recipe="exact", rate=1.5, seed=0)
