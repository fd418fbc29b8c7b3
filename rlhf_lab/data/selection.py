"""Which rows of a data set are read, by what is in their columns; those that are not are counted by reason."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_lab.data.paths import MISSING, value_at
from rlhf_lab.seeds import derive
from rlhf_lab.types import Fraction

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Selected:
    """What a selection leaves: the numbers of the rows that are kept, in order, and reason -> those of the others."""

    kept: list[int]
    dropped: Mapping[str, list[int]]


# rows with our columns, after the shape -> which of them are read
Selection = Callable[[Rows], Selected]


class UnreadableRow(ValueError):
    """A row of which a selection cannot say whether it is read.

    Fields:
        row: its place among the rows that the selection was given; whoever gave them knows where it stands.
        why: with a remedy.
    """

    def __init__(self, row: int, why: str) -> None:
        super().__init__(f"row {row}: {why}")
        self.row, self.why = row, why


def _value(row: Mapping[str, Any], column: str, number: int) -> Any:
    if (value := value_at(row, column)) is MISSING:
        raise UnreadableRow(
            number, f"it has the columns {sorted(row)}, but dataset.select reads {column!r}; name one that is there"
        )
    return value


def _number(row: Mapping[str, Any], column: str, number: int) -> float:
    value = _value(row, column, number)
    # nan compares false with everything, so it would be dropped for a reason that is not its own
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise UnreadableRow(
            number,
            f"{column} is {str(value)[:60]!r}, and dataset.select compares numbers; mend the row, or leave out what is "
            "none before, with a selection.Where",
        )
    return float(value)


def _told(rows: Rows, reasons: Sequence[str]) -> Selected:
    """Rows apart by why they are left out, "" if they are not."""
    dropped: dict[str, list[int]] = {}
    for number, reason in enumerate(reasons):
        if reason:
            dropped.setdefault(reason, []).append(number)
    return Selected(kept=[number for number in range(len(rows)) if not reasons[number]], dropped=dropped)


@dataclass(frozen=True, kw_only=True)
class Between:
    """Rows whose number, or length of text, lies between two, both included.

    Fields:
        column: a column, or the way to a value inside one.
        low, high: null for no limit.
        unit: "value" of a number; "characters" of a text; "words" of a text, the pieces between single spaces, as the
            length split of Kirk et al. 2023, arXiv:2310.06452, counts them.
    """

    column: str
    low: float | None
    high: float | None
    unit: Literal["value", "words", "characters"]

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError("dataset.select has neither low nor high; give one, or leave the selection out")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"dataset.select.low={self.low} is above high={self.high}; nothing lies between them")

    def __call__(self, rows: Rows) -> Selected:
        what = self.column if self.unit == "value" else f"{self.unit} of {self.column}"
        reasons: list[str] = []
        for number, row in enumerate(rows):
            size = self._size(row, number)
            under = self.low is not None and size < self.low
            over = self.high is not None and size > self.high
            reasons.append(f"{what} under {self.low}" if under else f"{what} over {self.high}" if over else "")
        return _told(rows, reasons)

    def _size(self, row: Mapping[str, Any], number: int) -> float:
        if self.unit == "value":
            return _number(row, self.column, number)
        value = _value(row, self.column, number)
        if not isinstance(value, str):
            raise UnreadableRow(
                number,
                f"{self.column} is {str(value)[:60]!r}, and dataset.select measures a text; name another column, or "
                "mend the row",
            )
        return len(value.split(" ")) if self.unit == "words" else len(value)


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """Rows whose column holds one of these values."""

    column: str
    values: Sequence[Any]

    def __call__(self, rows: Rows) -> Selected:
        held = [_value(row, self.column, number) for number, row in enumerate(rows)]
        return _told(rows, ["" if value in self.values else f"another {self.column}" for value in held])


@dataclass(frozen=True, kw_only=True)
class Where:
    """Rows in whose column a regular expression is found, or, if not `found`, is not.

    Raises:
        ValueError: the expression is none.
    """

    column: str
    pattern: str
    found: bool

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"dataset.select.pattern={self.pattern!r} is no regular expression: {error}") from error

    def __call__(self, rows: Rows) -> Selected:
        reason = f"{self.column} {'without' if self.found else 'with'} {self.pattern!r}"
        held = [_value(row, self.column, number) for number, row in enumerate(rows)]
        is_found = [value is not None and re.search(self.pattern, str(value)) is not None for value in held]
        return _told(rows, ["" if each == self.found else reason for each in is_found])


@dataclass(frozen=True, kw_only=True)
class AboveMinimum:
    """Rows whose number is not the least that any row has: of margins, those that tell the two sides apart least.

    Source: the filtered preferences of Chittepu et al. 2025, arXiv:2509.22851.
    """

    column: str

    def __call__(self, rows: Rows) -> Selected:
        values = [_number(row, self.column, number) for number, row in enumerate(rows)]
        least = min(values, default=0.0)
        return _told(rows, [f"the least {self.column}, {least:g}" if value == least else "" for value in values])


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of the rows, exactly round(share · n) of n, each once, drawn by a seed.

    Source: Kirk et al. 2023, arXiv:2310.06452, draw such shares with replacement, so that half has 39 % of the rows.
    """

    share: Fraction
    seed: int

    def __call__(self, rows: Rows) -> Selected:
        draw = random.Random(derive(self.seed, "share", str(self.share)))
        chosen = set(draw.sample(range(len(rows)), round(self.share * len(rows))))
        return _told(rows, ["" if number in chosen else "no place in the share" for number in range(len(rows))])


@dataclass(frozen=True, kw_only=True)
class First:
    """The first rows, as they stand in the file."""

    count: int

    def __call__(self, rows: Rows) -> Selected:
        return _told(
            rows,
            ["" if number < self.count else f"a place after the first {self.count}" for number in range(len(rows))],
        )


@dataclass(frozen=True, kw_only=True)
class Every:
    """Selections one after the other, each of what the ones before have left."""

    parts: Sequence[Selection]

    def __call__(self, rows: Rows) -> Selected:
        left, dropped = list(range(len(rows))), dict[str, list[int]]()
        for part in self.parts:
            try:
                chosen = part([rows[number] for number in left])
            except UnreadableRow as error:
                raise UnreadableRow(left[error.row], error.why) from error
            for reason, places in chosen.dropped.items():
                dropped[reason] = sorted([*dropped.get(reason, []), *(left[place] for place in places)])
            left = [left[place] for place in chosen.kept]
        return Selected(kept=left, dropped=dropped)
