"""Where a value lies inside a row: `info.post`, `chosen[-1].content`, `summaries[0].text`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(-?\d+)\]")
MISSING = object()


@cache
def steps(path: str) -> tuple[str | int, ...]:
    """The names and places that lead to a value, outermost first.

    Raises:
        ValueError: it is none, such as `a..b` or `a[x]`.
    """
    found: list[str | int] = []
    place = 0
    while place < len(path):
        step = _STEP.match(path, place)
        # the first name has no point before it, every later one has
        if step is None or (step[1] is not None and (place == 0) == step[0].startswith(".")):
            break
        found.append(step[1] if step[1] is not None else int(step[2]))
        place = step.end()
    if place < len(path) or not found:
        raise ValueError(f"{path!r} does not lead into a row; expected names and places like chosen[-1].content")
    return tuple(found)


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value at a path, or `MISSING`; a column that is called so as a whole comes first."""
    if path in row:
        return row[path]
    value: Any = row
    for step in steps(path):
        if isinstance(step, str):
            value = value.get(step, MISSING) if isinstance(value, Mapping) else MISSING
        else:
            there = isinstance(value, list | tuple) and -len(value) <= step < len(value)
            value = value[step] if there else MISSING
    return value


def reached(rows: Sequence[dict[str, Any]], columns: Iterable[str]) -> list[dict[str, Any]]:
    """The rows with the values inside them that `columns` lead to, each in a column of the path's name.

    A row that has no such value has no such column. Plain names are left as they are.
    """
    nested = [column for column in columns if "." in column or "[" in column]
    if not nested:
        return list(rows)
    return [
        row | {path: value for path in nested if path not in row and (value := value_at(row, path)) is not MISSING}
        for row in rows
    ]
