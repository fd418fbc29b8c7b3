"""Which generated responses are fit to be learnt from."""

import re
from collections.abc import Mapping, Sequence


class Cleaning:
    """Cuts what follows the response, and says why a response is to be left out.

    Args:
        cut_at: a response ends before the first of these, such as the marker of a further turn.
        drop_if: reason -> regular expression; a response in which it is found is left out.
        unfinished: whether responses that were cut at the length limit are kept. Learnt from, they would teach an end
            that they never had.

    Raises:
        ValueError: an expression is none, or a marker is empty.
    """

    def __init__(self, cut_at: Sequence[str], drop_if: Mapping[str, str], unfinished: bool) -> None:
        if not all(cut_at):
            raise ValueError(f"cleaning.cut_at={list(cut_at)}: an empty marker would cut every response to nothing")
        self.cut_at, self.unfinished = tuple(cut_at), unfinished
        self.drop_if: dict[str, re.Pattern[str]] = {}
        for reason, pattern in drop_if.items():
            try:
                self.drop_if[reason] = re.compile(pattern, re.DOTALL)
            except re.error as error:
                raise ValueError(f"cleaning.drop_if.{reason}={pattern!r} is no regular expression: {error}") from error

    def __call__(self, response: str, finished: bool) -> tuple[str, str]:
        """The response as it may be learnt from, and why it is left out; "" if it is not."""
        ends = [place for marker in self.cut_at if (place := response.find(marker)) >= 0]
        cut = response[: min(ends)] if ends else response
        kept = cut.strip()
        if not kept:
            return kept, "empty"
        if not (finished or ends or self.unfinished):
            return kept, "unfinished"
        return kept, next((reason for reason, pattern in self.drop_if.items() if pattern.search(kept)), "")
