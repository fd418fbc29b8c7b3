"""What a data set gave and what it left out: counts of rows, reasons, lengths and labels, as `data.json` holds them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """In tokens; of responses with their EOS, both sides of pairs together."""

    min: int
    median: float
    p95: float
    max: int

    @classmethod
    def of(cls, tokens: NDArray[np.int32]) -> "Lengths | None":
        """None if there is nothing to count."""
        if not tokens.size:
            return None
        median, p95 = np.percentile(tokens, [50, 95])
        return cls(min=int(tokens.min()), median=float(median), p95=float(p95), max=int(tokens.max()))


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """One split as it was read for one kind of record.

    Fields:
        reads: the kind of record.
        total: rows that were read from the source for this split. A shape may make several records of one, so `kept`
            may be larger.
        dropped: reason -> rows that were not kept.
        kept: records.
        prompts: how many of their prompts differ.
        prompt_tokens, response_tokens: None where there are none.
        labels: what is counted -> share of the records.
        flipped: numbers of the rows of the source whose label was exchanged on purpose; None where no noise was asked
            for.
    """

    reads: str
    total: int
    dropped: Mapping[str, int]
    kept: int
    prompts: int
    prompt_tokens: Lengths | None
    response_tokens: Lengths | None
    labels: Mapping[str, float]
    flipped: Sequence[int] | None


class Counted:
    """The statistics of one data set, by split and kind of record; reading a split again replaces its own."""

    def __init__(self) -> None:
        self.splits: dict[tuple[str, str], SplitStatistics] = {}

    def add(self, split: str, statistics: SplitStatistics) -> None:
        self.splits[split, statistics.reads] = statistics

    def as_json(self) -> list[dict[str, Any]]:
        """One object for each split and kind, in the order in which they were read."""
        return [{"split": split, **asdict(each)} for (split, _), each in self.splits.items()]


def counted_in(value: object, name: str = "", depth: int = 6) -> Iterator[tuple[str, str, Counted]]:
    """(where it is, its path, its statistics) of every data set that a stage, or something of its own, holds."""
    if depth and isinstance(value, Mapping):
        for key, entry in value.items():
            yield from counted_in(entry, f"{name}.{key}".lstrip("."), depth - 1)
    elif depth and type(value).__module__.startswith("rlhf_lab.") and hasattr(value, "__dict__"):
        if isinstance(counted := vars(value).get("counted"), Counted):
            yield name, str(getattr(value, "path", "")), counted
        for key, entry in vars(value).items():
            yield from counted_in(entry, f"{name}.{key}".lstrip("."), depth - 1)


def of_stage(stage: object) -> dict[str, Any]:
    """What `data.json` says of a stage's data sets, each once; empty if it read none."""
    found: dict[int, dict[str, Any]] = {}
    for name, path, counted in counted_in(stage):
        if counted.splits:
            found.setdefault(id(counted), {"name": name, "path": path, "splits": counted.as_json()})
    return {"datasets": list(found.values())} if found else {}
