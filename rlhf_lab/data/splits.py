"""Tables that know where their rows stood, splits by a hash of the prompt, and what two splits share."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_lab.data.readers import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The rows of one split, and where each of them stood in what was read.

    Fields:
        name: of the data set and the split, as errors call it.
        rows: under the names of the source's columns, or of the shape's.
        numbers: of each row, that of the source's row from which it was made, from 0.
        files: (number of its first row, its name) of each file of the split; () for one that needs no name.
        total: rows that were read.
        lost: reason -> how many rows that were read are not here.
    """

    name: str
    rows: Rows
    numbers: Sequence[int]
    files: tuple[tuple[int, str], ...] = ()
    total: int
    lost: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, parts: Sequence[tuple[str, Rows]]) -> "Table":
        """The rows of several files, one after the other."""
        rows = [row for _, part in parts for row in part]
        files: list[tuple[int, str]] = []
        first = 0
        for file, part in parts:
            files.append((first, file))
            first += len(part)
        return cls(
            name=name,
            rows=rows,
            numbers=range(len(rows)),
            files=tuple(files[: len(parts) * (len(parts) > 1)]),
            total=len(rows),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, i: int) -> str:
        """What an error calls row i: data set, split, the row as its file counts it, and the file if there are more."""
        return f"{self.name}, {self.row(i)}"

    def row(self, i: int) -> str:
        """`where`, for what has named the data set and the split already."""
        number = self.numbers[i]
        for first, file in reversed(self.files):
            if number >= first:
                return f"row {number - first} of {file}"
        return f"row {number}"

    @property
    def sources(self) -> int:
        """How many rows of the source its rows were made of; a shape may make several of one."""
        return len(set(self.numbers))

    def take(self, chosen: Sequence[int], reason: str = "") -> "Table":
        """These rows, in this order; the others are counted as lost, unless they are but in another split."""
        gone = len(self.rows) - len(chosen)
        numbers = [self.numbers[i] for i in chosen]
        return replace(
            self,
            rows=[self.rows[i] for i in chosen],
            numbers=numbers,
            lost={**self.lost, reason: self.lost.get(reason, 0) + gone} if reason and gone else self.lost,
            total=self.total if reason else self.total - self.sources + len(set(numbers)),
        )


def hold_out(rows: Rows, prompt_column: str, share: float) -> tuple[list[int], list[int]]:
    """Split rows by a hash of their prompt: (the rest, about `share` of the prompts, at least one of several).

    A prompt is on one side only, and stays there when rows are added or their order changes.
    """
    places = [_place(f"hold out {row.get(prompt_column)}") for row in rows]
    if len(set(places)) < 2:
        return list(range(len(rows))), []
    border = max(share, min(places))
    held = [i for i, place in enumerate(places) if place <= border]
    kept = [i for i, place in enumerate(places) if place > border]
    return kept, held


def divide(keys: Sequence[str], shares: Mapping[str, float]) -> dict[str, list[int]]:
    """split -> its rows: each key is in one split, by its hash alone, and the splits have about their shares of them.

    What is decided of a key depends on neither the other rows nor their order, nor on a seed, which another run of the
    same study might choose otherwise.

    Args:
        keys: of the prompt of each row.
        shares: of the splits; they add up to one.
    """
    borders: list[tuple[float, str]] = []
    reached = 0.0
    for split, share in shares.items():
        reached += share
        borders.append((reached, split))
    borders[-1] = (1.0, borders[-1][1])  # a sum of tenths may stop short of it
    found: dict[str, list[int]] = {split: [] for split in shares}
    for i, key in enumerate(keys):
        place = _place(f"divide {key}")
        found[next(split for border, split in borders if place < border)].append(i)
    return found


def _place(text: str) -> float:
    """A number in [0, 1) that a text has by its content."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big") / 2**32


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What one split shares with another.

    Fields:
        prompts: how many prompts are in both.
        rows: of the first split that have one of them.
        example: (row of the first, row of the other).
    """

    prompts: int
    rows: list[int]
    example: tuple[int, int]


def overlap(first: Sequence[Sequence[str]], other: Sequence[Sequence[str]]) -> Overlap | None:
    """What is in both; a row has one key for each of its prompts."""
    places: dict[str, int] = {}
    for i, keys in enumerate(other):
        for key in keys:
            places.setdefault(key, i)
    rows = [i for i, keys in enumerate(first) if any(key in places for key in keys)]
    if not rows:
        return None
    shared = {key for i in rows for key in first[i] if key in places}
    key = next(key for key in first[rows[0]] if key in places)
    return Overlap(prompts=len(shared), rows=rows, example=(rows[0], places[key]))


def check_shares(shares: Mapping[str, Any], train_split: str) -> None:
    """Refuse shares that are no shares, or do not add up to one, or leave nothing to learn from.

    Raises:
        ValueError: naming them.
    """
    said = f"dataset.shares={dict(shares)}"
    if train_split not in shares:
        raise ValueError(f"{said} has no share for the training split {train_split!r} (dataset.train_split)")
    if bad := [split for split, share in shares.items() if not 0 < share <= 1]:
        raise ValueError(f"{said}: that of {bad[0]!r} is not between 0 and 1")
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"{said} add up to {sum(shares.values()):g}; expected 1")
