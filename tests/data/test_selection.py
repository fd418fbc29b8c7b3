"""Which rows are read, and why the others are not, against loops spelled out."""

import random

import pytest

from rlhf_lab.data.selection import AboveMinimum, Between, Every, First, OneOf, Share, Where

ROWS = [{"text": "a b", "n": 3, "sub": "x"}, {"text": "a  b", "n": 1.5, "sub": "y"}, {"text": "", "n": -1, "sub": "x"}]


def test_between_counts_both_ends_and_says_on_which_side_a_row_fell_out():
    chosen = Between(column="n", low=-1, high=1.5, unit="value")(ROWS)
    assert (chosen.kept, chosen.dropped) == ([1, 2], {"n over 1.5": [0]})
    chosen = Between(column="n", low=0, high=2, unit="value")(ROWS)
    assert (chosen.kept, chosen.dropped) == ([1], {"n over 2": [0], "n under 0": [2]})
    assert Between(column="n", low=None, high=3, unit="value")(ROWS).kept == [0, 1, 2]


def test_words_are_what_stands_between_single_spaces_as_published():
    # len("a  b".split(" ")) is 3: an empty one between the two spaces
    assert Between(column="text", low=3, high=None, unit="words")(ROWS).kept == [1]
    assert Between(column="text", low=3, high=None, unit="characters")(ROWS).kept == [0, 1]


def test_one_of_and_where_and_first():
    assert OneOf(column="sub", values=["x", "z"])(ROWS).kept == [0, 2]
    assert OneOf(column="sub", values=["x"])(ROWS).dropped == {"another sub": [1]}
    batches = [{"batch": "cnndm2"}, {"batch": "batch3"}, {"batch": None}]
    assert Where(column="batch", pattern="cnndm", found=True)(batches).kept == [0]
    assert Where(column="batch", pattern="cnndm", found=False)(batches).dropped == {"batch with 'cnndm'": [0]}
    assert Where(column="batch", pattern=r"\d$", found=True)(batches).kept == [0, 1]
    assert First(count=2)(ROWS).dropped == {"a place after the first 2": [2]}


def test_every_row_of_the_least_margin_falls_out():
    rows = [{"margin": value} for value in (0.5, 0.0, 2.0, 0.0)]
    chosen = AboveMinimum(column="margin")(rows)
    assert (chosen.kept, chosen.dropped) == ([0, 2], {"the least margin, 0": [1, 3]})
    assert AboveMinimum(column="margin")([]).kept == []


@pytest.mark.parametrize(("share", "count"), [(0.1, 100), (0.5, 500), (1.0, 1000), (0.0, 0), (0.3337, 334)])
def test_a_share_has_its_exact_number_of_rows_each_once(share, count):
    rows = [{}] * 1000
    chosen = Share(share=share, seed=3)(rows).kept
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == sorted(chosen)
    assert chosen == Share(share=share, seed=3)(rows).kept
    if 0 < count < 1000:
        assert chosen != Share(share=share, seed=4)(rows).kept
        assert abs(sum(chosen) / count - 499.5) < 4 * 289 / count**0.5  # spread over the whole, not one end


def test_selections_one_after_another_count_each_row_once_for_the_first_reason():
    draw = random.Random(0)
    rows = [{"n": draw.randrange(10), "sub": draw.choice("xy")} for _ in range(200)]
    both = Every(parts=[OneOf(column="sub", values=["x"]), Between(column="n", low=3, high=6, unit="value")])
    chosen = both(rows)
    assert chosen.kept == [k for k, row in enumerate(rows) if row["sub"] == "x" and 3 <= row["n"] <= 6]
    assert chosen.dropped["another sub"] == [k for k, row in enumerate(rows) if row["sub"] == "y"]
    assert chosen.dropped["n over 6"] == [k for k, row in enumerate(rows) if row["sub"] == "x" and row["n"] > 6]
    everything = sorted([*chosen.kept, *(k for places in chosen.dropped.values() for k in places)])
    assert everything == list(range(200))


@pytest.mark.parametrize(
    ("select", "said"),
    [
        (lambda: Between(column="m", low=0, high=None, unit="value")(ROWS), r"row 0: it has the columns .* reads 'm'"),
        (
            lambda: Between(column="sub", low=0, high=None, unit="value")(ROWS),
            r"row 0: sub is 'x', .* compares numbers",
        ),
        (lambda: Between(column="n", low=0, high=None, unit="words")(ROWS), r"row 0: n is '3', .* measures a text"),
        (lambda: AboveMinimum(column="n")([{"n": 1.0}, {"n": float("nan")}]), r"row 1: n is 'nan'"),
        (lambda: Between(column="n", low=None, high=None, unit="value"), "neither low nor high"),
        (lambda: Between(column="n", low=2, high=1, unit="value"), "low=2 is above high=1"),
        (lambda: Where(column="n", pattern="(", found=True), "is no regular expression"),
    ],
)
def test_a_selection_that_cannot_be_made_is_refused(select, said):
    with pytest.raises(ValueError, match=said):
        select()
