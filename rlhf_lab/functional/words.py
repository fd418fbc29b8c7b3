"""Words of a text, and a text cut after some of them."""

import re
from itertools import islice

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def words(text: str) -> list[str]:
    """The words of a text as they are written; punctuation is none, and line ends part words like any space."""
    return _WORD.findall(text)


def cut(text: str, num_words: int) -> str | None:
    """The text up to the end of its word number `num_words`; None if it has fewer."""
    last = next(islice(_WORD.finditer(text), num_words - 1, None), None)
    return None if last is None else text[: last.end()]
