"""What the cells of a table say: names of columns, and values that are texts, labels, numbers or conversations."""

import math
import re
from collections.abc import Mapping
from typing import Any

from rlhf_lab.data.sameness import Same, prompt_key
from rlhf_lab.data.splits import Table
from rlhf_lab.data.tables import need, prompt_of
from rlhf_lab.records import Prompt

# kind of record -> the columns that it needs, and what for
NEEDS = {
    "prompts": (["prompt"], "a run on prompts"),
    "demonstrations": (["prompt", "response"], "supervised fine-tuning"),
    "preferences": (["prompt"], "a reward model"),
    "pairs": (["prompt", "response_0", "response_1"], "a judge"),
    "rankings": (["prompt", "responses"], "a reward model of rankings"),
    "quadruples": (
        [f"{strength}_{name}" for strength in ("strong", "weak") for name in ("prompt", "chosen", "rejected")],
        "a method on preferences over preferences",
    ),
    "safety_pairs": (["prompt", "response_0", "response_1", "safer", "safe_0", "safe_1"], "a cost model"),
}
# kind of record -> the columns that it reads where there are any
MAY_READ = {
    "prompts": ("id", "messages"),
    "demonstrations": ("id", "messages", "condition"),
    "preferences": (
        "id",
        "chosen",
        "rejected",
        "response_0",
        "response_1",
        "better",
        "margin",
        "score_chosen",
        "score_rejected",
        "score_0",
        "score_1",
        "condition",
    ),
    "pairs": ("id", "messages"),
    "rankings": ("id", "ranks", "condition"),
    "quadruples": ("id", "strong_condition", "weak_condition", "condition"),
    "safety_pairs": ("id", "condition"),
}


class Columns:
    """Reads cells by the names that this package gives to columns.

    Args:
        names: name here -> name in the data; what is not named is called alike in both.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = dict(names)
        self._prompts: dict[str, Prompt] = {}  # of texts: prompts recur, and are read for splits and for records
        self._sides: dict[tuple[str, ...], dict[str, tuple[str, str]]] = {}

    def __getitem__(self, name: str) -> str:
        return self.names.get(name, name)

    def check(self, table: Table, reads: str) -> None:
        """Refuse a table without the columns that `reads` needs, or without one that is named.

        Raises:
            ValueError: a column is missing.
        """
        wanted, purpose = NEEDS[reads]
        rows = table.rows
        need(rows, self.names, wanted, table.name, purpose)
        for name in MAY_READ[reads]:
            if name in self.names and not any(self.names[name] in row for row in rows):
                raise ValueError(
                    f"{table.name} has the columns {sorted(set().union(*rows))}, but dataset.columns.{name} says "
                    f"{self.names[name]!r}; name the column that it is, or null"
                )
        pair = ("response_0", "response_1", "better")
        if reads == "preferences" and not self.is_sided(table) and not self._has(table, *pair):
            raise ValueError(
                f"{table.name} has the columns {sorted(set().union(*rows))}, but a reward model needs 'chosen' and "
                "'rejected', or 'response_0', 'response_1' and 'better'; map them: dataset.columns.chosen=<column> …"
            )

    def is_sided(self, table: Table) -> bool:
        """Whether pairs are told by chosen and rejected, and not by two responses and which is better."""
        return self._has(table, "chosen", "rejected")

    def _has(self, table: Table, *names: str) -> bool:
        """Whether some row has each of these columns; JSON lines may leave out what is empty."""
        return all(any(self[name] in row for row in table.rows) for name in names)

    def texts(self, table: Table, i: int, *names: str) -> tuple[str, ...]:
        """The texts in these columns; "" where there is none."""
        row = table.rows[i]
        return tuple(self._text(table, i, row.get(self[name]), name) for name in names)

    def _text(self, table: Table, i: int, value: Any, name: str) -> str:
        """What a cell says; 0 is a text too, and a missing number is none.

        Raises:
            ValueError: it is a list, a structure or anything else that a person would not read as a text.
        """
        if isinstance(value, str):
            return value
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise ValueError(
            f"{table.where(i)}: {self[name]} is {str(value)[:60]!r}, of type {type(value).__name__}; expected a text: "
            f"name another column with dataset.columns.{name}, or make it one with dataset.shape"
        )

    def prompts(self, table: Table, side: str = "") -> list[Prompt]:
        """The prompts of `<side>prompt` under the conditions of `<side>condition`, or `condition` without that."""
        prompts: list[Prompt] = []
        name, own, shared = self[f"{side}prompt"], self[f"{side}condition"], self["condition"]
        for i, row in enumerate(table.rows):
            value = row.get(name)
            try:
                prompt = self._prompt("" if value is None or value == [] else value)
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{table.where(i)}: {name} is no Unicode, it holds half of a surrogate pair; mend the "
                    "row, or leave it out with dataset.select"
                ) from error
            except ValueError as error:
                raise ValueError(f"{table.where(i)}: {error}") from error
            told = row[own] if own in row else row.get(shared)
            condition = self._text(table, i, told, "condition")
            prompts.append(prompt.conditioned(condition, {}) if condition else prompt)
        return prompts

    def _prompt(self, value: Any) -> Prompt:
        if not isinstance(value, str):
            return prompt_of(value)
        if value not in self._prompts:
            self._prompts[value] = prompt_of(value)
        return self._prompts[value]

    def keys(self, table: Table, same: Same) -> list[tuple[str, ...]]:
        """What says whether the prompts of two rows are the same; () where a row has none, or a broken one."""
        names = [self[name] for name in ("prompt", "strong_prompt", "weak_prompt")]
        found: list[tuple[str, ...]] = []
        for row in table.rows:
            keys: list[str] = []
            for value in (row[name] for name in names if row.get(name)):
                try:
                    keys.append(prompt_key(self._prompt(value), same))
                except ValueError:
                    continue  # said by what reads the row, with its number
            found.append(tuple(keys))
        return found

    def label(self, table: Table, i: int, name: str) -> int:
        """A label that is 0 or 1, or false or true; a text that merely looks like one may mean anything."""
        value = table.rows[i].get(self[name])
        if value not in (0, 1):
            raise ValueError(f"{table.where(i)}: {self[name]} is {value!r}; expected 0 or 1")
        return int(value)

    def number(self, table: Table, i: int, column: str) -> float:
        """A finite number; nan or infinity in one row would be that of the whole loss."""
        row = table.rows[i]
        try:
            value = float(row[column])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"{table.where(i)}: {column} is {row.get(column)!r}; expected a finite number: mend the row, or leave "
                "it out with dataset.select"
            )
        return value

    def _scores(self, columns: tuple[str, ...], chosen: str, rejected: str) -> dict[str, tuple[str, str]]:
        """score -> its columns on two sides: `score_<name>_<side>`, "" for `score_<side>`."""
        if (known := self._sides.get((*columns, chosen, rejected))) is not None:
            return known
        named = (re.fullmatch(rf"score_(.+)_{chosen}", column) for column in columns)
        pairs = {match[1]: (match[0], f"score_{match[1]}_{rejected}") for match in named if match}
        pairs[""] = self[f"score_{chosen}"], self[f"score_{rejected}"]
        there = {name: both for name, both in pairs.items() if set(both) <= set(columns)}
        self._sides[*columns, chosen, rejected] = there
        return there

    def gaps(self, table: Table, i: int, chosen: str, rejected: str) -> dict[str, float]:
        """score -> how much higher it is on the side `chosen`."""
        scores = self._scores(tuple(table.rows[i]), chosen, rejected)
        return {name: self.number(table, i, a) - self.number(table, i, b) for name, (a, b) in scores.items()}

    def ranked(self, table: Table, i: int) -> tuple[str, ...]:
        """Two or more responses, the best first."""
        responses, ranks = table.rows[i].get(self["responses"]), table.rows[i].get(self["ranks"])
        if not isinstance(responses, list) or len(responses) < 2:
            raise ValueError(f"{table.where(i)}: {self['responses']} is {responses!r}; expected two or more, in a list")
        if ranks is not None and (
            not isinstance(ranks, list)
            or len(ranks) != len(responses)
            or len(set(ranks)) < len(ranks)
            or not all(isinstance(rank, int | float) and math.isfinite(rank) for rank in ranks)
        ):
            raise ValueError(
                f"{table.where(i)}: {self['ranks']} is {ranks!r}; expected {len(responses)} different numbers, one for "
                "each response, the lowest for the best"
            )
        order = range(len(responses)) if ranks is None else sorted(range(len(responses)), key=ranks.__getitem__)
        return tuple(self._text(table, i, responses[place], "responses") for place in order)
