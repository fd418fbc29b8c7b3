"""A judge who knows the true scores of the embedded world: never wrong, never swayed by the order."""

from collections.abc import Collection, Sequence
from typing import Any, Self

from rlhf_lab.data.dataset import GOLD, WORLD
from rlhf_lab.judges.scored import Criteria, check_criteria, verdicts_of
from rlhf_lab.records import Comparison, Verdict
from rlhf_lab.types import NonNegative


class GoldJudge:
    """The response with the higher gold score wins.

    Args:
        criteria: criterion -> gold score -> weight; more of the weighted sum is better.
        tie_within: gold scores that differ by this or less tie, in their units.
    """

    def __init__(self, criteria: Criteria, tie_within: NonNegative) -> None:
        self.criteria, self.tie_within = criteria, tie_within

    def check(self, criteria: Collection[str], promised: Collection[str] = ()) -> None:
        check_criteria(self.criteria, criteria, GOLD, f"the gold scores of {WORLD} are")

    def load(self, hardware: Any, template: Any) -> Self:
        return self

    def scores(self, comparisons: Sequence[Comparison], criterion: str) -> list[tuple[float, float]]:
        """The weighted gold of both responses, to what the user asked, whatever the policy was told beside it."""
        weights = self.criteria[criterion]

        def worth(comparison: Comparison, response: str) -> float:
            return sum(weight * GOLD[name](comparison.prompt.request, response) for name, weight in weights.items())

        return [(worth(each, each.responses[0]), worth(each, each.responses[1])) for each in comparisons]

    def compare(self, comparisons: Sequence[Comparison], criterion: str) -> list[Verdict]:
        return list(verdicts_of(self.scores(comparisons, criterion), self.tie_within))
