"""How the rows of a public data set become ours: one small class per way of writing them down."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
# a row of the source -> rows with our columns, see `Dataset`
Shape = Callable[[Row], list[dict[str, Any]]]


class Dropped(Exception):
    """Raised by a shape for a row that is left out, which is no error; the text says why, in words that rows share."""


def shaped(
    rows: Sequence[Row], shape: Shape, source: str
) -> tuple[list[dict[str, Any]], list[int], dict[str, list[int]]]:
    """Rows of the source -> our rows, the number of the source's row behind each, and reason -> rows left out.

    Args:
        source: the file and split that an error names.

    Raises:
        ValueError: a row is not as the shape expects it.
    """
    made: list[dict[str, Any]] = []
    origin: list[int] = []
    dropped: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        try:
            parts = shape(row)
        except Dropped as reason:
            dropped.setdefault(str(reason), []).append(number)
            continue
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        made += parts
        origin += [number] * len(parts)
    return made, origin, dropped
