"""Verdicts that follow from scores: the higher score wins, and what is as good as equal is a tie."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from rlhf_lab.interfaces import Judge
from rlhf_lab.records import Comparison, Verdict

Criteria = Mapping[str, Mapping[str, float]]
"""criterion -> score -> its weight; the weighted sum is what is better when higher, so that of a cost is negative."""


class Scoring(Judge, Protocol):
    """A judge that decides by a number of each response."""

    def load(self, hardware: Any, template: Any) -> "Scoring": ...

    def scores(self, comparisons: Sequence[Comparison], criterion: str) -> list[tuple[float, float]]:
        """How good the first and the second response of each comparison are by the criterion; higher is better."""
        ...


def check_criteria(criteria: Criteria, wanted: Collection[str], there: Collection[str], what: str) -> None:
    """Refuse criteria that nobody declared, or that weigh scores which are not there.

    Raises:
        ValueError: naming the criterion or the score, and what there is.
    """
    if unknown := sorted(set(wanted) - criteria.keys()):
        raise ValueError(
            f"the judge is asked for {', '.join(unknown)}, but judge.criteria declares {', '.join(sorted(criteria))}; "
            f"declare what it weighs, e.g. '+judge.criteria.{unknown[0]}={{{next(iter(there), '…')}: 1.0}}'"
        )
    for criterion in wanted:
        weights = criteria[criterion]
        if missing := sorted(weights.keys() - set(there)):
            raise ValueError(
                f"judge.criteria.{criterion} weighs {', '.join(missing)}, but {what}: {', '.join(sorted(there))}"
            )
        if not any(weights.values()):
            raise ValueError(f"judge.criteria.{criterion} weighs nothing; give a score a weight that is not 0")


def decided(first: float, second: float, tie_within: float) -> float:
    """1 if the first is better, 0 if the second is, 0.5 if they differ by `tie_within` or less."""
    if abs(first - second) <= tie_within:
        return 0.5
    return float(first > second)


def verdicts_of(scores: Sequence[tuple[float, float]], tie_within: float) -> Iterator[Verdict]:
    """A judge that goes by scores says the same in either order."""
    for first, second in scores:
        value = decided(first, second, tie_within)
        yield Verdict(by_order=(value, value), scores=(first, second), asked=2)
