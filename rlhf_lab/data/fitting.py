"""Which rows are fit to be read: whole, new, and neither too short nor too long."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_lab.console import Console
from rlhf_lab.data.sameness import Same, digest
from rlhf_lab.data.splits import Table
from rlhf_lab.data.templates import Template
from rlhf_lab.records import Prompt
from rlhf_lab.types import Count

BadRows = Literal["error", "drop"]
Item = tuple[Prompt, tuple[str, ...]]

CHUNK = 1024  # rows whose tokens are in memory at once
LONG_WORK = 20_000  # rows from which on progress is said
DUPLICATE = "a duplicate of an earlier row"


class RowFilter:
    """Finds bad rows and either refuses the data set or drops them and says how many, by reason."""

    def __init__(self, source: str, policy: BadRows) -> None:
        self.source, self.policy = source, policy
        self.reasons: dict[str, list[str]] = {}

    def reject(self, row: str, reason: str) -> None:
        """A row is bad, named as its file counts it, "row 3"."""
        self.reasons.setdefault(reason, []).append(row)

    def report(self, total: int) -> str:
        """What was dropped, or "" if nothing was.

        Raises:
            ValueError: rows are bad and the policy is to refuse, or nothing is left.
        """
        if not self.reasons:
            return ""
        found = "; ".join(f"{len(rows)} with {reason} (first: {rows[0]})" for reason, rows in self.reasons.items())
        dropped = sum(map(len, self.reasons.values()))
        if self.policy == "error":
            raise ValueError(f"{self.source}: {found}, of {total} rows; mend or drop them (dataset.bad_rows=drop)")
        if dropped == total:
            raise ValueError(f"{self.source}: no row is left of {total}: {found}")
        return f"{self.source}: dropped {dropped} of {total} rows: {found}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many tokens a prompt and a response may have, from and to, both included; the response with its EOS."""

    max_prompt_tokens: Count
    max_response_tokens: Count
    min_prompt_tokens: Count
    min_response_tokens: Count

    def fault(self, prompt: int, responses: Sequence[int]) -> str:
        """What is wrong with these lengths, "" if nothing."""
        if prompt > self.max_prompt_tokens:
            return f"a prompt over dataset.max_prompt_tokens={self.max_prompt_tokens}"
        if any(length > self.max_response_tokens for length in responses):
            return f"a response over dataset.max_response_tokens={self.max_response_tokens}"
        if prompt < self.min_prompt_tokens:
            return f"a prompt under dataset.min_prompt_tokens={self.min_prompt_tokens}"
        if any(length < self.min_response_tokens for length in responses):
            return f"a response under dataset.min_response_tokens={self.min_response_tokens}"
        return ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What there is to know of each row.

    Fields:
        faults: (n,) what is wrong with it by itself, "" if nothing.
        identities: (n,) equal for rows that are the same.
        prompt_tokens: (n,) how many; 0 where a fault was found before they were counted.
        response_tokens: (n, responses of the row with the most) the same; 0 where there is none.
    """

    faults: list[str]
    identities: list[bytes]
    prompt_tokens: NDArray[np.int32]
    response_tokens: NDArray[np.int32]


def measure(
    name: str, items: Sequence[Item], template: Template, limits: Limits, same: Same, *, distinct: bool
) -> Measured:
    """Tokenise rows, many at once and each text once, and say what is wrong with them.

    No more than `CHUNK` rows are held as tokens, so the memory that it takes is that of the lengths.

    Args:
        name: of the table, for who waits for a large one.
        distinct: the texts of a row must differ.
    """
    width = max((len(texts) for _, texts in items), default=0)
    prompts = np.zeros(len(items), dtype=np.int32)
    responses = np.zeros((len(items), width), dtype=np.int32)
    faults: list[str] = [""] * len(items)
    identities = [digest(prompt, texts, same) for prompt, texts in items]
    known: dict[tuple[str, str], int] = {}  # of prompts, which recur
    unknown: dict[str, list[str]] = {}  # condition -> its words that the tokenizer does not know
    first: dict[bytes, int] = {}
    for start, stop in _chunks(name, len(items)):
        fresh: list[int] = []
        for i in range(start, stop):
            prompt, texts = items[i]
            faults[i] = _fault_of_texts(prompt, texts, template, distinct=distinct)
            if not faults[i] and prompt.condition not in unknown:
                unknown[prompt.condition] = template.unknown(prompt.condition)
            if not faults[i] and (words := unknown[prompt.condition]):
                faults[i] = (
                    f"a condition of words that the tokenizer does not know, {words} (model.new_tokens adds them)"
                )
            if not faults[i] and (same != "exact" or first.setdefault(identities[i], i) == i):
                fresh.append(i)
        new = list({(items[i][0].id, items[i][0].condition): items[i][0] for i in fresh}.values())
        new = [prompt for prompt in new if (prompt.id, prompt.condition) not in known]
        for prompt, tokens in zip(new, template.prompts_tokens(new), strict=True):
            known[prompt.id, prompt.condition] = len(tokens)
        spoken = iter(template.responses_tokens([text for i in fresh for text in items[i][1]]))
        for i in fresh:
            prompt, texts = items[i]
            prompts[i] = known[prompt.id, prompt.condition]
            for k in range(len(texts)):
                responses[i, k] = len(next(spoken))
            faults[i] = limits.fault(int(prompts[i]), responses[i, : len(texts)].tolist())
        for i in range(start, stop):
            if same == "exact" and (earlier := first.get(identities[i], i)) != i:
                faults[i], prompts[i], responses[i] = faults[earlier], prompts[earlier], responses[earlier]
    return Measured(faults=faults, identities=identities, prompt_tokens=prompts, response_tokens=responses)


def _fault_of_texts(prompt: Prompt, texts: Sequence[str], template: Template, *, distinct: bool) -> str:
    if not all(map(_is_unicode, (*(message["content"] for message in prompt.messages), prompt.condition, *texts))):
        return "a text that is no Unicode: it holds half of a surrogate pair, as a text cut in the middle of an emoji"
    if not prompt.request.strip():
        return "an empty prompt"
    if not all(text.strip() for text in texts):
        return "an empty response"
    if distinct and len(set(texts)) < len(texts):
        return "equal responses"
    if forged := template.fault(prompt, texts):
        return forged
    return ""


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8, which JSON's escapes do not see to, and tokenizers need."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _chunks(name: str, total: int) -> Iterator[tuple[int, int]]:
    count = -(-total // CHUNK)
    counted = Console().steps(f"reading {name}, chunk", 0, count, {}) if total >= LONG_WORK else range(count)
    for k in counted:
        yield k * CHUNK, min(total, (k + 1) * CHUNK)


def ids_that_recur(table: Table, column: str) -> dict[int, str]:
    """Row -> why its id is no name for it: it has none, or that of an earlier row."""
    seen: dict[object, int] = {}
    found: dict[int, str] = {}
    for i, row in enumerate(table.rows):
        value = row.get(column)
        if value is None:
            found[i] = f"no {column}"
        elif seen.setdefault(str(value), i) != i:
            found[i] = f"the {column} of an earlier row"
    return found
