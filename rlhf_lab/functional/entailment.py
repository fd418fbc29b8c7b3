"""What verdicts of natural-language inference say of the diversity of two texts.

A pair of texts is compared sentence by sentence and in both directions: higher is more diverse. A contradiction counts
+1, a neutral pair 0, an entailment -1 in each direction, so a pair of texts lies in [-2, 2].

Source: Stasaski and Hearst 2022, arXiv:2205.01497; the sum of both directions as in Kirk et al. 2024, arXiv:2310.06452.
"""

import re

import numpy as np
from numpy.typing import NDArray

LABELS = ("contradiction", "neutral", "entailment")
_WEIGHTS = np.array([1.0, 0.0, -1.0])
_END = re.compile(r"(?<=[.!?])\s+|\n+")


def sentences(text: str) -> list[str]:
    """The sentences of a text: what ends with `.`, `!` or `?` before a space, or with its line.

    A piece without a letter or a figure, such as a lone full stop, belongs to the sentence before it.
    """
    found: list[str] = []
    for piece in _END.split(text.strip()):
        if re.search(r"\w", piece):
            found.append(piece.strip())
        elif found and piece.strip():
            found[-1] = f"{found[-1]} {piece.strip()}"
    return found


def direction_values(probabilities: NDArray[np.float64], weigh_by_confidence: bool) -> NDArray[np.float64]:
    """(n, 3) chances of `LABELS` -> (n,) value of the likeliest label, in [-1, 1].

    Args:
        weigh_by_confidence: times that label's chance, as in the code of Kirk et al.
    """
    top = probabilities.argmax(1)
    confidence = probabilities[np.arange(len(top)), top] if weigh_by_confidence else 1.0
    return _WEIGHTS[top] * confidence


def pair_values(
    forwards: NDArray[np.float64], backwards: NDArray[np.float64], pair: NDArray[np.int64], num_pairs: int
) -> NDArray[np.float64]:
    """(num_pairs,) in [-2, 2] of pairs of texts: the mean over their pairs of sentences of both directions' sum.

    Args:
        forwards, backwards: (s,) value of each pair of sentences in either direction.
        pair: (s,) which pair of texts it belongs to; each has at least one.
    """
    counts = np.bincount(pair, minlength=num_pairs)
    return np.bincount(pair, forwards + backwards, minlength=num_pairs) / counts
