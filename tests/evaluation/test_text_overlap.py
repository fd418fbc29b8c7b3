"""ROUGE and exact match by hand, in latin letters and in others."""

import pytest

from rlhf_lab.evaluation.text_overlap import TextOverlap, Tokens


def overlap(tokens: Tokens = "ascii", use_stemmer: bool = False):
    found = TextOverlap(tokens, use_stemmer)
    found.check()
    found.load()
    return found


def test_rouge_is_the_f_measure_of_shared_words_and_of_the_longest_common_subsequence():
    # 3 of 4 and of 5 words are shared; in order: "the dog barks"
    found = overlap()("the old dog barks", ["the dog barks at night"])
    assert found["rouge_1"] == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert found["rouge_l"] == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    swapped = overlap()("barks dog the old", ["the dog barks at night"])
    assert swapped["rouge_1"] == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert swapped["rouge_l"] == pytest.approx(2 * 0.25 * 0.2 / 0.45)


def test_the_best_reference_counts_and_white_space_does_not():
    found = overlap()("a  b\nc", ["x y z", "a b c"])
    assert found == {"rouge_1": 1.0, "rouge_l": 1.0, "exact_match": 1.0}
    assert overlap()("a b c d", ["a b c"])["exact_match"] == 0.0


def test_a_stem_is_shared_only_if_asked_for():
    assert overlap()("he jumps", ["he jumped"])["rouge_1"] == pytest.approx(0.5)
    assert overlap(use_stemmer=True)("he jumps", ["he jumped"])["rouge_1"] == pytest.approx(1.0)


def test_a_reference_of_which_nothing_would_be_read_is_refused_and_read_as_unicode():
    with pytest.raises(ValueError, match="tokens=unicode"):
        overlap()("да нет", ["да"])
    assert overlap("unicode")("да нет", ["да"])["rouge_1"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="English alone"):
        TextOverlap("unicode", True).check()
