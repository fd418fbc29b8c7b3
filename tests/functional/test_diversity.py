"""Every measure against a slow loop or a value worked out by hand."""

import math
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest

from rlhf_lab.functional.diversity import (
    distinct,
    entropy_per_token,
    expected_distinct,
    gram_vectors,
    mean_cosine,
    self_bleu,
)

FIVE = (1, 2, 3, 4, 5)
RELEASED = [50257] * 5
COPIES = [["one", "two", "three", "four", "five", "six", "seven", "eight"]] * 16
TEXTS = [
    ["the", "cat", "sat", "on", "the", "mat"],
    ["the", "cat", "sat", "on", "a", "chair", "today"],
    ["dogs", "bark", "at", "the", "cat"],
    ["the", "the", "the", "cat"],
]


def slow_bleu(hypothesis, references, max_order):
    logs = []
    for n in range(1, max_order + 1):

        def count(text, n=n):
            return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))

        matched = sum(min(c, max(count(r)[g] for r in references)) for g, c in count(hypothesis).items())
        total = max(len(hypothesis) - n + 1, 0)
        matched, total = (matched, total) if n == 1 else (matched + 1, total + 1)
        logs.append(math.log(matched / total) if matched else -math.inf)
    closest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    brevity = 1.0 if len(hypothesis) >= closest else math.exp(1 - closest / len(hypothesis))
    return brevity * math.exp(sum(logs) / max_order)


def test_sixteen_copies_of_eight_words():
    assert distinct(COPIES, FIVE) == pytest.approx(0.0625)
    assert expected_distinct(COPIES, FIVE, RELEASED) == pytest.approx(0.06256, abs=5e-6)
    assert self_bleu(COPIES, 4) == pytest.approx(1)
    assert mean_cosine(gram_vectors(COPIES, 3)) == pytest.approx(1)


def test_three_texts_without_a_common_word():
    apart = [list("abcdef"), list("ghijkl"), list("mnopqr")]
    assert distinct(apart, FIVE) == 1
    assert expected_distinct(apart, FIVE, RELEASED) == pytest.approx(1.0001, abs=5e-5)  # above 1, as released
    assert mean_cosine(gram_vectors(apart, 3)) == pytest.approx(0)
    assert self_bleu(apart, 4) == 0


def test_distinct_counts_by_hand():
    assert distinct([list("aab"), list("ab")], (1,)) == 2 / 5
    assert distinct([list("aab"), list("ab")], (2,)) == 2 / 3
    assert distinct([list("aab"), list("ab")], (1, 2)) == pytest.approx((2 / 5 + 2 / 3) / 2)
    # of 5 draws from two words: 2 (1 - 1 / 32) are expected to differ
    assert expected_distinct([list("aab"), list("ab")], (1,), [2]) == pytest.approx(2 / (2 * (1 - 0.5**5)))


def test_what_cannot_be_said_is_not_a_number():
    assert math.isnan(distinct([list("ab")], (1, 3)))
    assert math.isnan(distinct([[], []], (1,)))
    assert math.isnan(expected_distinct([[]], (1,), [9]))
    assert math.isnan(self_bleu([list("ab"), []], 4))
    assert math.isnan(mean_cosine(gram_vectors([list("ab"), list("abc")], 3)))


def test_each_order_has_a_vocabulary_of_its_own():
    # "aab": 3 letters of two, of which 2 (1 - 1 / 8) are expected to differ; 2 pairs of four, 4 (1 - 9 / 16) expected
    assert expected_distinct([list("aab")], (1, 2), [2, 4]) == pytest.approx((2 / 1.75 + 2 / 1.75) / 2)
    with pytest.raises(ValueError, match="a vocabulary of 1"):
        expected_distinct([list("aab")], (1,), [1])


def test_expected_distinct_does_not_fall_as_uniform_text_grows():
    draws = np.random.default_rng(0)
    for length in (20, 200, 2000):
        text = draws.integers(0, 100, length).tolist()
        assert expected_distinct([text], (1,), [100]) == pytest.approx(1, abs=0.1)
    assert distinct([text], (1,)) < 0.1


def test_self_bleu_is_the_mean_of_each_against_the_others():
    for texts in (TEXTS, [*TEXTS, TEXTS[0]], TEXTS[:2], [*TEXTS, ["cat"]]):
        slow = [slow_bleu(text, texts[:i] + texts[i + 1 :], 4) for i, text in enumerate(texts)]
        assert self_bleu(texts, 4) == pytest.approx(sum(slow) / len(slow))


def test_mean_cosine_is_that_of_all_pairs():
    def cosine(first, second):
        a, b = (Counter(pairwise(text)) for text in (first, second))
        dot = sum(a[g] * b[g] for g in a)
        return dot / math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))

    slow = [cosine(first, second) for first, second in combinations(TEXTS, 2)]
    assert mean_cosine(gram_vectors(TEXTS, 2)) == pytest.approx(sum(slow) / len(slow))
    assert mean_cosine(gram_vectors([*TEXTS, ["alone"]], 2)) == pytest.approx(sum(slow) / len(slow))

    rows = np.random.default_rng(0).normal(size=(9, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert mean_cosine(rows) == pytest.approx(np.mean([a @ b for a, b in combinations(rows, 2)]))


def test_entropy_is_weighed_by_tokens():
    # one response of 1 token with probability 1 / 2, one of 3 tokens with 1 / 4 each
    logprobs, tokens = np.array([math.log(1 / 2), 3 * math.log(1 / 4)]), np.array([1, 3])
    assert entropy_per_token(logprobs, tokens) == pytest.approx(math.log(2) * 7 / 4)
