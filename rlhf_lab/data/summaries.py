"""Rows of texts to be summed up, written as the studies of summarisation do, with summaries; see `shapes`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lab.data.shapes import Dropped, Row, choice, field, text

ENDING = "\nTL;DR:"


@dataclass(frozen=True, kw_only=True)
class Post:
    """A post of Reddit: the ways to where it stands, its title, and its text.

    Source: Stiennon et al. 2020, arXiv:2009.01325, as Kirk et al. 2023, arXiv:2310.06452, write it.
    """

    subreddit: str
    title: str
    post: str

    def __call__(self, row: Row) -> tuple[str, str]:
        """What is summed up, and how it is written.

        Raises:
            Dropped: there is nothing to sum up, or a heading within would be read as the next one.
        """
        parts = text(row, self.subreddit), text(row, self.title), text(row, self.post)
        if not parts[2].strip():
            raise Dropped("no post")
        written = self.write(*parts)
        if self.parse(written) != parts:
            raise Dropped("a heading of a post inside another")
        return parts[2], written

    @staticmethod
    def write(subreddit: str, title: str, post: str) -> str:
        return f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}{ENDING}"

    @staticmethod
    def parse(written: str) -> tuple[str, str, str]:
        """What a post was written of; the first heading of each name counts.

        Raises:
            ValueError: it is none.
        """
        found = re.fullmatch(r"SUBREDDIT: r/(.*?)\nTITLE: (.*?)\nPOST: (.*)\nTL;DR:", written, re.DOTALL)
        if found is None:
            raise ValueError(f"{written[:60]!r}… is no post of Reddit to be summed up")
        return found[1], found[2], found[3]


@dataclass(frozen=True, kw_only=True)
class Article:
    """An article of a newspaper: the way to it.

    Source: CNN/DailyMail, as Kirk et al. 2023, arXiv:2310.06452, write it.
    """

    article: str

    def __call__(self, row: Row) -> tuple[str, str]:
        """What is summed up, and how it is written.

        Raises:
            Dropped: there is nothing to sum up.
        """
        body = text(row, self.article)
        if not body.strip():
            raise Dropped("no article")
        return body, f"ARTICLE: {body}{ENDING}"


@dataclass(frozen=True, kw_only=True)
class Summaries:
    """A text to be summed up, and its summary, or two of which one is preferred, or one with marks.

    Becomes prompt; response, or response_0, response_1 and better; the source's own columns named in `keep`; and of
    the text to be summed up words, how many it has between single spaces, and characters.

    Fields:
        of: what is summed up, and how it is written.
        summary: way to the summary, null for none.
        summaries: ways to two, null for none.
        preference: column that says which is better, 0 or 1.
        keep: column here -> way to what it holds, such as subreddit: info.subreddit, for selections.

    Source: Stiennon et al. 2020, arXiv:2009.01325; CNN/DailyMail, Hermann et al. 2015, arXiv:1506.03340.
    """

    of: Post | Article
    summary: str | None
    summaries: Sequence[str] | None
    preference: str | None
    keep: Mapping[str, str]

    def __post_init__(self) -> None:
        if (self.summaries is None) != (self.preference is None) or (
            self.summaries is not None and len(self.summaries) != 2
        ):
            raise ValueError(
                f"dataset.shape.summaries={self.summaries}, preference={self.preference}: name two summaries and the "
                "column that says which is better, or neither"
            )

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        body, prompt = self.of(row)
        made: dict[str, Any] = {"prompt": prompt, "words": len(body.split(" ")), "characters": len(body)}
        made |= {name: field(row, path) for name, path in self.keep.items()}
        if self.summary is not None:
            made["response"] = text(row, self.summary)
        if self.summaries is not None and self.preference is not None:
            better = choice(row, self.preference, 0)
            both = [text(row, path) for path in self.summaries]
            made |= {"response_0": both[0], "response_1": both[1], "better": better, "response": both[better]}
        return [made]
