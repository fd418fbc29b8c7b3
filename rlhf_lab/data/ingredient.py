"""What goes into a mixture, and how much of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction as Ratio
from typing import Any

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Template
from rlhf_lab.records import Demonstration, PreferencePair, Prompt, Quadruple, Ranking, SafetyPair
from rlhf_lab.types import Count, Fraction, Positive

Record = Prompt | Demonstration | PreferencePair | Quadruple | Ranking | SafetyPair


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """The records that serve one taste.

    Fields:
        dataset: where they are.
        condition: what the policy is told when it is to serve this taste; "" for what the records say themselves.
        share: of the mixture, beside the shares of the others; no row is taken twice.
        proportion: of the training rows that there are: 0.5, or 1/3 as a text; 2.5 is every row twice, and half of them
            once more; 0 leaves the part out.
        count: exactly so many training rows; of a part with fewer, whole copies first, then others without
            repetition. Of share, proportion and count one is given.
        chosen_by: by what demonstrations are chosen: a column of the table, such as `score_humour` of
            stage=score_table; or a gold score of the embedded world; null for all of them.
        best: share of the rows that are chosen, those with the highest values; 1 for all.

    Source: proportions, ratios and counts as in the data sets of Safe RLHF, Dai et al. 2023, arXiv:2310.12773.
    """

    dataset: Dataset
    condition: str
    share: Positive | None = None
    proportion: float | str | None = None
    count: Count | None = None
    chosen_by: str | None = None
    best: Fraction = 1.0

    def __post_init__(self) -> None:
        if (self.chosen_by is None) != (self.best == 1):
            raise ValueError(
                f"best={self.best} with chosen_by={self.chosen_by}: a share of the rows is the best by something; "
                "set both, or chosen_by=null and best=1.0"
            )
        amounts = {"share": self.share, "proportion": self.proportion, "count": self.count}
        if len(given := {name: value for name, value in amounts.items() if value is not None}) != 1:
            raise ValueError(f"a part of a mixture has {given or 'no amount'}; give one of share, proportion and count")
        if self.proportion is not None and self._ratio < 0:
            raise ValueError(f"proportion={self.proportion} is negative; expected 0 or more")

    @property
    def _ratio(self) -> Ratio:
        try:
            return Ratio(str(self.proportion))  # as it was typed: .1 is a tenth
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"proportion={self.proportion!r} is no number and no ratio like 1/3") from error

    def wanted(self, there: int) -> int:
        """How many of the training rows that are there a proportion or a count asks for."""
        return self.count if self.count is not None else round(self._ratio * there)

    def records(self, reads: str, split: str, template: Template) -> list[Record]:
        """The chosen rows of a split, in their order, under the condition.

        Raises:
            ValueError: there is nothing of that name to choose by.
        """
        if self.chosen_by is None:
            found: list[Record] = getattr(self.dataset, reads)(split, template)
        else:
            rows, prompts, sides = self.dataset.table(split, "demonstrations", template)
            all_of_them = [Demonstration(prompt=p, response=r) for p, r in zip(prompts, sides[""], strict=True)]
            values = self._values(rows, all_of_them)
            order = sorted(range(len(all_of_them)), key=lambda i: -values[i])
            found = [all_of_them[i] for i in sorted(order[: round(self.best * len(all_of_them))])]
        return [told(record, self.condition) for record in found] if self.condition else found

    def _values(self, rows: Sequence[Mapping[str, Any]], records: Sequence[Demonstration]) -> list[float]:
        by = str(self.chosen_by)
        if by in self.dataset.gold:
            return [self.dataset.gold[by](record.prompt.request, record.response) for record in records]
        if by not in rows[0]:
            raise ValueError(
                f"chosen_by={by}, but {self.dataset.path} has the columns {sorted(rows[0])} and the gold scores "
                f"{sorted(self.dataset.gold)}; stage=score_table adds the scores of reward models as columns"
            )
        return [float(row[by]) for row in rows]


def told(record: Record, condition: str) -> Record:
    """The record under this condition."""
    if isinstance(record, Prompt):
        return record.conditioned(condition, {})
    if isinstance(record, Quadruple):
        strong, weak = (
            replace(pair, prompt=pair.prompt.conditioned(condition, {})) for pair in (record.strong, record.weak)
        )
        return Quadruple(strong=strong, weak=weak)
    return replace(record, prompt=record.prompt.conditioned(condition, {}))


def prompt_ids(record: Record) -> tuple[str, ...]:
    """Of the prompts of a record."""
    if isinstance(record, Prompt):
        return (record.id,)
    if isinstance(record, Quadruple):
        return record.strong.prompt.id, record.weak.prompt.id
    return (record.prompt.id,)


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of the shares that add up to `total` exactly.

    By largest remainders; of equal ones the first is served first.
    """
    ratios = [Ratio(str(share)) for share in shares]  # as they were typed: .1 is a tenth
    exact = [ratio * total / sum(ratios) for ratio in ratios]
    counts = [int(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda k: counts[k] - exact[k])
    for k in order[: total - sum(counts)]:
        counts[k] += 1
    return counts
