"""The sign and the range of diversity by entailment, from label matrices written by hand."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_lab.functional.entailment import LABELS, direction_values, pair_values, sentences


def certain(label, n):
    return np.tile(np.eye(3)[LABELS.index(label)], (n, 1))


@pytest.mark.parametrize(("label", "expected"), [("entailment", -2), ("neutral", 0), ("contradiction", 2)])
@pytest.mark.parametrize("weighed", [True, False])
def test_a_set_of_one_kind(label, expected, weighed):
    # two texts of two and three sentences, and two of one each: seven pairs of sentences
    values = direction_values(certain(label, 7), weighed)
    pairs = pair_values(values, values, np.array([0] * 6 + [1]), 2)
    assert pairs.tolist() == [expected, expected]


def test_the_likeliest_label_counts_with_its_chance():
    chances = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3]])
    assert_allclose(direction_values(chances, True), [0.5, -0.7, 0])
    assert_allclose(direction_values(chances, False), [1, -1, 0])


def test_a_pair_of_texts_is_the_mean_over_its_sentences_of_both_directions():
    forwards, backwards = np.array([1, 0, -0.5]), np.array([0, -1, 0.5])
    assert_allclose(pair_values(forwards, backwards, np.array([0, 0, 1]), 2), [(1 + 0 + 0 - 1) / 2, 0])


def test_sentences_are_sentences():
    assert sentences("sure ! first wash the mug . it is 3.5 cm wide .\nenjoy !") == [
        "sure !", "first wash the mug .", "it is 3.5 cm wide .", "enjoy !",
    ]  # fmt: skip
    assert sentences("One. Two") == ["One.", "Two"]
    assert sentences("wait . . .") == ["wait . . ."]
    assert sentences("  ") == []
