"""Which rows of a data set are read, by what is in their columns; those that are not are counted by reason."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Selected:
    """What a selection leaves: the numbers of the rows that are kept, in order, and reason -> those of the others."""

    kept: list[int]
    dropped: Mapping[str, list[int]]


# rows with our columns, after the shape -> which of them are read
Selection = Callable[[Sequence[Mapping[str, Any]]], Selected]
