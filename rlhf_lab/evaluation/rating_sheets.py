"""Sheets on which people compare responses, blind, in an order and on sides drawn for each; written, and read back."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf_lab.evaluation.matches import Match
from rlhf_lab.seeds import generator

Missing = Literal["error", "drop"]
FIXED = ("rater", "item", "prompt", "response_a", "response_b")
MOST_LISTED = 5  # mistakes in one message


@dataclass(frozen=True, kw_only=True)
class Item:
    """What a row of a sheet stands for; a row of the key, which raters do not see.

    Fields:
        item: its name on the sheets, the same on all of them; it says nothing of who wrote what.
        first, second: the contestants.
        first_is_a: whether this rater sees the first one's response as A.
        longer: characters that the first response has more than the second.
    """

    rater: str
    item: str
    split: str
    condition: str
    prompt_id: str
    sample: int
    first: str
    second: str
    first_is_a: bool
    longer: int

    @property
    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a preference is written: -most … -1 for A, 0 for neither, 1 … most for B.

    Fields:
        ties: whether 0 may be given.
    """

    most: int
    ties: bool

    @property
    def values(self) -> list[int]:
        return [value for value in range(-self.most, self.most + 1) if value or self.ties]


@dataclass(frozen=True, kw_only=True)
class Rating:
    """A person's preference: above 0 for the first contestant, below for the second, up to `most` of the scale."""

    item: Item
    criterion: str
    value: int


def sheets(
    matches: Sequence[Match], pairs: Iterable[tuple[str, str]], names: Sequence[str], raters: int, seed: int
) -> tuple[list[Item], dict[str, list[list[str]]], int]:
    """Lay the matches out for raters.

    Args:
        pairs: contestants that are compared, by name.
        names: of the contestants, in the order of a match's answers.

    Returns:
        The key; rater -> rows of the columns `FIXED`; and how many pairs of equal responses are left out.
    """
    key: list[Item] = []
    rows: dict[str, list[list[str]]] = {}
    shown = [
        (match, first, second, match.answers[names.index(first)].response, match.answers[names.index(second)].response)
        for first, second in pairs
        for match in matches
    ]
    apart = [each for each in shown if each[3].strip() != each[4].strip()]
    for number in range(1, raters + 1):
        rater = f"rater_{number}"
        draw = generator(seed, "sheet", rater)
        rows[rater] = []
        for place in torch.randperm(len(apart), generator=draw).tolist():
            match, first, second, *texts = apart[place]
            is_a = bool(torch.rand((), generator=draw) < 0.5)
            spelled = "\x1f".join(map(str, (seed, *match.key, first, second)))
            item = sha256(spelled.encode()).hexdigest()[:12]
            called: dict[str, Any] = {"rater": rater, "item": item, "first": first, "second": second, **match.row}
            key.append(Item(**called, first_is_a=is_a, longer=len(texts[0]) - len(texts[1])))
            sides = texts if is_a else texts[::-1]
            rows[rater].append([rater, item, _told(match), *map(_harmless, sides)])
    return key, rows, len(shown) - len(apart)


def _told(match: Match) -> str:
    """The conversation as a person reads it."""
    messages = match.prompt.messages
    if len(messages) == 1:
        return _harmless(messages[0]["content"])
    return "\n\n".join(f"{message['role'].upper()}: {message['content']}" for message in messages)


def _harmless(text: str) -> str:
    """Text that a spreadsheet shows and does not compute; what is read back are the items and the preferences."""
    return f" {text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def written(rows: Sequence[Sequence[str]], criteria: Sequence[str]) -> str:
    """A sheet as csv, with an empty column for each criterion and one for comments."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIXED, *criteria, "comment"])
    writer.writerows([*row, *[""] * (len(criteria) + 1)] for row in rows)
    return text.getvalue()


def instructions(criteria: Mapping[str, str], scale: Scale) -> str:
    """What raters are told, as markdown.

    Args:
        criteria: criterion -> the question that it asks.
    """
    steps = {1: "slightly ", scale.most: "much "} if scale.most > 1 else {1: ""}
    lines = [
        "# Which response is better?",
        "",
        "Each row of your sheet holds a prompt and two responses, A and B. Who wrote them is hidden, and which is A "
        "was decided by a coin, row by row. Read the prompt, then both responses, and answer each question by writing "
        "a number into its column:",
        "",
        "| write | if |",
        "| --- | --- |",
    ]
    for value in scale.values:
        better = f"{'A' if value < 0 else 'B'} is {steps.get(abs(value), '')}better"
        lines.append(f"| {value} | {better if value else 'neither is better'} |")
    lines += ["", "| column | question |", "| --- | --- |"]
    lines += [f"| {name} | {question} |" for name, question in criteria.items()]
    lines += [
        "",
        "- Judge each row by itself, and each question by itself. Longer is not better, and A is not better than B.",
        "- Do not talk about rows with other raters before all have finished.",
        "- Change no other column; rows may be sorted. Anything that you want to say goes into `comment`.",
        "- Save the sheet as CSV (UTF-8).",
        "",
    ]
    return "\n".join(lines)


def read_sheets(
    files: Sequence[Path], key: Sequence[Item], criteria: Sequence[str], scale: Scale, missing: Missing
) -> tuple[list[Rating], int]:
    """The preferences that people wrote, each turned to the contestants that it is of.

    Args:
        files: filled sheets, as csv with commas or semicolons; of one rater or of several.
        missing: what becomes of items without an answer: "error", or "drop" and count.

    Returns:
        The ratings, and how many are missing.

    Raises:
        ValueError: a file cannot be read, lacks a column, or has rows that cannot be used: which, why, what to do.
    """
    items = {(each.rater, each.item): each for each in key}
    found: dict[tuple[str, str, str], Rating] = {}
    mistakes: list[str] = []
    for file in files:
        for number, row in _rows(file, criteria):
            where = f"{file}, row {number}"
            rater, name = (row["rater"] or "").strip(), (row["item"] or "").strip()
            item = items.get((rater, name))
            if item is None:
                known = rater in {each.rater for each in key}
                mistakes.append(f"{where}: {f'item {name!r}' if known else f'rater {rater!r}'} is not in the key")
                continue
            for criterion in criteria:
                spelled = (row[criterion] or "").strip()
                if not spelled:
                    continue
                value = _number(spelled)
                if value not in scale.values:
                    allowed = ", ".join(map(str, scale.values))
                    mistakes.append(f"{where}: {criterion} is {spelled!r}, expected one of {allowed}")
                    continue
                place = rater, name, criterion
                if place in found:
                    mistakes.append(f"{where}: {criterion} of item {name} by {rater} was given before")
                    continue
                assert value is not None
                found[place] = Rating(item=item, criterion=criterion, value=-value if item.first_is_a else value)
    if mistakes:
        more = f"; and {len(mistakes) - MOST_LISTED} more" if len(mistakes) > MOST_LISTED else ""
        raise ValueError(
            f"{'; '.join(mistakes[:MOST_LISTED])}{more}. Mend these rows in the sheets and read them again"
        )
    absent = [(*place, criterion) for place in items for criterion in criteria if (*place, criterion) not in found]
    if not found or (absent and missing == "error"):
        rater, name, criterion = absent[0]
        raise ValueError(
            f"{len(absent)} of {len(items) * len(criteria)} ratings are missing, first {criterion} of item {name} by "
            f"{rater}, in {', '.join(map(str, files))}; have them filled in"
            + (", or count without them by stage.missing=drop" if found else "")
        )
    return list(found.values()), len(absent)


def _rows(file: Path, criteria: Sequence[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    """(row number as a spreadsheet counts, its columns)."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets put a mark at the beginning
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; give the filled sheet") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}); save it as CSV UTF-8") from error
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=";" if header.count(";") > header.count(",") else ",")
    there = reader.fieldnames or []
    if lacking := [name for name in ("rater", "item", *criteria) if name not in there]:
        raise ValueError(f"{file} has the columns {list(there)}, but not {lacking}; give the sheet with its header row")
    yield from enumerate(reader, start=2)


def _number(spelled: str) -> int | None:
    """1, +1, 1.0 and 1,0, as spreadsheets spell them; None for what is no whole number."""
    try:
        value = float(spelled.replace("\N{MINUS SIGN}", "-").replace(",", "."))
    except ValueError:
        return None
    return int(value) if value.is_integer() else None
