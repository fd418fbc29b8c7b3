"""Pairs of responses to one prompt that wait for a judge."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, groupby
from typing import Any, Literal

from rlhf_lab.data.tables import Rows

Pairing = Literal["all", "once"]

# what holds for a prompt and all of its responses: who asked what, under which preference, in which words
HEAD = ("id", "prompt", "preference", "told")


def couples(
    head: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], pairing: Pairing
) -> tuple[Rows, Counter[str]]:
    """Two responses to one prompt a row, and how many pairs were left out, by reason.

    Args:
        head: the columns that all rows get.
        samples: of each response its text, `response`, and whatever else is known of it; each becomes a column that
            ends with `_0` or `_1`.
        pairing: "all" pairs, n (n - 1) / 2 of n responses; or each response "once", with its neighbour. Of an odd
            number the last is then left out.

    Returns:
        Pairs of different responses that say something, no two of the same texts.
    """
    n = len(samples)
    places = list(combinations(range(n), 2)) if pairing == "all" else [(i, i + 1) for i in range(0, n - 1, 2)]
    left_out: Counter[str] = Counter(unpaired=n % 2 if pairing == "once" else 0, empty=0, equal=0, repeated=0)
    seen: set[frozenset[str]] = set()
    rows: Rows = []
    for both in places:
        texts = frozenset(samples[i]["response"] for i in both)
        if not all(map(str.strip, texts)):
            left_out["empty"] += 1
        elif len(texts) == 1:
            left_out["equal"] += 1
        elif texts in seen:
            left_out["repeated"] += 1
        else:
            sides = {f"{name}_{side}": samples[i][name] for name in samples[0] for side, i in enumerate(both)}
            rows.append({**head, **sides})
            seen.add(texts)
    return rows, left_out


def paired(responses: Iterable[Mapping[str, Any]], pairing: Pairing) -> tuple[Rows, Counter[str]]:
    """`couples` of all prompts, from a row for each response; those to one prompt stand side by side."""
    rows: Rows = []
    left_out: Counter[str] = Counter()
    # by the words too: a table may hold conditions that are no preferences, which all have the same name, ""
    for _, group in groupby(responses, key=lambda row: (row["id"], row["preference"], row["told"])):
        samples = list(group)
        head = {name: samples[0][name] for name in HEAD}
        known = [{name: value for name, value in sample.items() if name not in HEAD} for sample in samples]
        pairs, lost = couples(head, known, pairing)
        rows += pairs
        left_out.update(lost)
    return rows, left_out


def said(left_out: Mapping[str, int]) -> str:
    """For a person, which pairs were left out."""
    counts = [f"{count} {reason}" for reason, count in left_out.items() if count]
    return f"left out {', '.join(counts)}" if counts else "none left out"
