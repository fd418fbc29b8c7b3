"""How rows of another make become ours; the ways of writing them are in `dialogues`, `instructions`, `summaries`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_lab.data.paths import MISSING, value_at

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


def field(row: Row, path: str) -> Any:
    """What stands at a path of a row.

    Raises:
        ValueError: nothing does.
    """
    if (value := value_at(row, path)) is MISSING:
        raise ValueError(f"it has the columns {sorted(row)}, but {path!r} leads nowhere; see dataset.shape")
    return value


def text(row: Row, path: str) -> str:
    """The text at a path of a row; null is an empty one.

    Raises:
        ValueError: something else is there, or nothing.
    """
    value = field(row, path)
    if value is None or isinstance(value, str):
        return value or ""
    raise ValueError(f"{path} is {str(value)[:60]!r}; expected a text")


def number(row: Row, path: str) -> float:
    """The number at a path of a row.

    Raises:
        ValueError: something else is there, or nothing.
    """
    value = field(row, path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path} is {str(value)[:60]!r}; expected a number")
    return float(value)


def listed(row: Row, path: str) -> list[Any]:
    """The list at a path of a row; null is an empty one.

    Raises:
        ValueError: something else is there, or nothing.
    """
    value = field(row, path)
    if value is None or isinstance(value, list | tuple):
        return list(value or [])
    raise ValueError(f"{path} is {str(value)[:60]!r}; expected a list")


def turns(row: Row, path: str, *, role: str, words: str) -> list[tuple[str, str]]:
    """The turns of a conversation at a path of a row, each who speaks and what they say.

    Raises:
        ValueError: there is no list of turns.
    """
    entries = listed(row, path)
    if wrong := [entry for entry in entries if not isinstance(entry, Mapping)]:
        raise ValueError(f"{path} has the turn {str(wrong[0])[:60]!r}; expected its {role} and its {words}")
    return [(text(entry, role), text(entry, words)) for entry in entries]


def choice(row: Row, path: str, first: int) -> int:
    """Which of two is meant, 0 or 1, by a label that counts from `first`, 0 or 1.

    Raises:
        Dropped: the label says that neither is better.
        ValueError: it is another label.
    """
    value = field(row, path)
    if value is None or (first == 1 and value == 0 and not isinstance(value, bool)):
        raise Dropped("no preference")
    if isinstance(value, bool) or value not in (first, first + 1):
        raise ValueError(f"{path} is {value!r}; expected {first} or {first + 1}")
    return int(value) - first
