"""How much texts, as sequences of words or tokens, differ from each other.

A set has the responses to one prompt, or one response to each of many prompts. What cannot be said of a set is NaN.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Text = Sequence[Hashable]
Gram = tuple[Hashable, ...]


def grams(text: Text, n: int) -> Iterable[Gram]:
    """Every n neighbours of the text, in order."""
    return zip(*(text[k:] for k in range(n)), strict=False)


def _distinct_and_all(texts: Sequence[Text], n: int) -> tuple[int, int]:
    return len({gram for text in texts for gram in grams(text, n)}), sum(max(len(text) - n + 1, 0) for text in texts)


def distinct(texts: Sequence[Text], orders: Sequence[int]) -> float:
    """Share of the set's n-grams that differ, averaged over the orders n; 1: none occurs twice.

    Falls with the length and the number of texts, so compare only sets of equal size; see `expected_distinct`.
    NaN if no text is long enough for an order.

    Source: Li et al. 2016, arXiv:1510.03055.
    """
    counts = [_distinct_and_all(texts, n) for n in orders]
    return float(np.mean([unique / total if total else math.nan for unique, total in counts]))


def expected_distinct(texts: Sequence[Text], orders: Sequence[int], vocabularies: Sequence[int]) -> float:
    """Distinct n-grams over those that as many uniform draws from a vocabulary would give (EAD), averaged over n.

    U / (V (1 - ((V - 1) / V)^C)) with U distinct ones of C; it may exceed 1 by a little. NaN as in `distinct`.

    Args:
        vocabularies: V of each order. The code of Kirk et al. 2024, arXiv:2310.06452, has 50257 for all; where words
            are few, that many n-grams of them are not, and V of order n is better the words' number to the power n.

    Source: Liu et al. 2022, arXiv:2202.13587, eq. 3.
    """
    if min(vocabularies) < 2:
        raise ValueError(f"a vocabulary of {min(vocabularies)}; EAD needs two words or more")
    found: list[float] = []
    for n, size in zip(orders, vocabularies, strict=True):
        unique, total = _distinct_and_all(texts, n)
        expected = -size * math.expm1(total * math.log1p(-1 / size))  # V is large: 1 - ((V - 1) / V)^C would round away
        found.append(unique / expected if total else math.nan)
    return float(np.mean(found))


def gram_vectors(texts: Sequence[Text], n: int) -> sparse.csr_array:
    """(texts, different n-grams) counts, each row of length 1; a text without an n-gram is a row of zeros."""
    columns: dict[Gram, int] = {}
    counts = [Counter(grams(text, n)) for text in texts]
    places = [columns.setdefault(gram, len(columns)) for count in counts for gram in count]
    rows = np.repeat(np.arange(len(texts)), [len(count) for count in counts])
    values = np.array([value for count in counts for value in count.values()], dtype=np.float64)
    norms = np.sqrt(np.bincount(rows, values**2, minlength=len(texts)))
    shape = (len(texts), max(len(columns), 1))
    return sparse.csr_array((values / norms[rows], (rows, np.array(places, dtype=np.intp))), shape=shape)


def mean_cosine(vectors: NDArray[np.float64] | sparse.csr_array) -> float:
    """Mean cosine of all pairs of rows of length 1; rows of zeros are left out. NaN for fewer than two.

    The squared length of the rows' sum has every pair twice and every row with itself once, so that no pair is formed.
    """
    norms = (vectors**2).sum(1)
    n = int(np.count_nonzero(norms))
    if n < 2:
        return math.nan
    total = np.asarray(vectors.sum(0)).ravel()
    return float((total @ total - n) / (n * (n - 1)))


def self_bleu(texts: Sequence[Text], max_order: int) -> float:
    """Mean BLEU of each text with all others as its references: higher is LESS diverse, 1 for copies.

    Counts of the orders from 2 on have 1 added, matches and all (Lin and Och 2004, COLING), so that one missing
    4-gram does not make a short text's BLEU 0. Empty texts are left out. NaN for fewer than two texts.

    Source: Zhu et al. 2018, arXiv:1802.01886; BLEU: Papineni et al. 2002, with the reference of closest length.
    """
    texts = [text for text in texts if len(text)]
    if len(texts) < 2:
        return math.nan
    lengths = np.sort([len(text) for text in texts])
    logs = np.zeros((len(texts), max_order))
    for n in range(1, max_order + 1):
        counts = [Counter(grams(text, n)) for text in texts]
        shared = _second_greatest(counts)
        added = 0 if n == 1 else 1
        for i, count in enumerate(counts):
            # BLEU clips by the greatest count of the others, which is at least this text's own, unless that is the
            # greatest of all: in both cases the second greatest of all gives the same
            matched = sum(min(own, shared[gram]) for gram, own in count.items())
            total = max(len(texts[i]) - n + 1, 0)
            logs[i, n - 1] = math.log((matched + added) / (total + added)) if matched + added else -math.inf
    brevity = [min(0.0, 1 - _closest_other(lengths, len(text)) / len(text)) for text in texts]
    return float(np.exp(logs.mean(1) + np.array(brevity)).mean())


def _second_greatest(counts: Sequence[Counter[Gram]]) -> dict[Gram, int]:
    """n-gram -> the second greatest of its counts in the texts, 0 if only one has it."""
    greatest: dict[Gram, tuple[int, int]] = {}
    for count in counts:
        for gram, value in count.items():
            first, second = greatest.get(gram, (0, 0))
            greatest[gram] = (value, first) if value > first else (first, max(second, value))
    return {gram: second for gram, (_, second) in greatest.items()}


def _closest_other(ordered: NDArray[np.int64], length: int) -> int:
    """Of the lengths, one of which is this text's own, the closest of the others; of two equally close, the shorter."""
    place = int(np.searchsorted(ordered, length))
    others = np.delete(ordered, place)
    return int(others[np.abs(others - length).argmin()])


def entropy_per_token(logprobs: NDArray[np.float64], tokens: NDArray[np.int64]) -> float:
    """Entropy of the policy on its own samples, nats per token: minus their log-probabilities over their tokens.

    Args:
        logprobs: (n,) of whole responses, summed over their tokens.
        tokens: (n,).
    """
    return float(-logprobs.sum() / tokens.sum())
