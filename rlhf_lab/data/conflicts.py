"""Labels that contradict each other, and what becomes of their rows."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_lab.data.fitting import Item
from rlhf_lab.data.sameness import Same, digest, prompt_key
from rlhf_lab.records import SafetyPair

OnConflict = Literal["keep", "drop", "relabel", "error"]


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What is left of rows of which some contradict each other.

    Fields:
        kept: places of the rows that are left, in order.
        relabelled: which of these are the other way round now.
        dropped: reason -> how many rows are not left.
        note: what there is to say, "" if nothing contradicts anything.
    """

    kept: list[int]
    relabelled: set[int]
    dropped: dict[str, int]
    note: str


def settle_safety(records: Sequence[SafetyPair], policy: OnConflict, name: str, row: Callable[[int], str]) -> Settled:
    """Safety pairs of which the safer response alone is labelled unsafe.

    Args:
        row: place of a record -> what its row is called, as its file counts it.

    Raises:
        ValueError: there are some, and that is an error, or none is left.
    """
    torn = [i for i, record in enumerate(records) if record.is_torn]
    if not torn:
        return Settled(kept=list(range(len(records))), relabelled=set(), dropped={}, note="")
    said = (
        f"{name}: in {len(torn)} of {len(records)} pairs the safer response alone is labelled unsafe "
        f"(first: {row(torn[0])})"
    )
    if policy == "error":
        raise ValueError(f"{said}; mend them, or choose dataset.on_conflict=keep, drop or relabel")
    gone = set(torn) if policy == "drop" else set()
    if len(gone) == len(records):
        raise ValueError(f"{said}, and none is left; choose dataset.on_conflict=keep or relabel")
    return Settled(
        kept=[i for i in range(len(records)) if i not in gone],
        relabelled=set(torn) if policy == "relabel" else set(),
        dropped={"contradicting labels": len(gone)} if gone else {},
        note=f"{said}; dataset.on_conflict={policy}",
    )


def settle_preferences(
    pairs: Sequence[Item],
    ways: Sequence[bytes],
    kept: Sequence[int],
    policy: OnConflict,
    same: Same,
    name: str,
    row: Callable[[int], str],
) -> Settled:
    """Pairs of which there is one that prefers the one response, and one that prefers the other.

    Relabelled they are as most rows say, duplicates counted; without a majority they are left out.

    Args:
        pairs: of all rows, duplicates too: (prompt, (preferred response, the other)).
        ways: equal for rows that say the same, as `digest` has it.
        kept: places of those that are fit to be read, in order.
        row: place of a row -> what it is called, as its file counts it.

    Raises:
        ValueError: there are some, and that is an error, or none is left.
    """
    # a pair that no other row has, either way round, needs no second digest
    couples = [(prompt_key(prompt, same), prompt.condition, frozenset(texts)) for prompt, texts in pairs]
    recurs = Counter(map(hash, couples))
    votes = Counter(ways)
    against = {
        i: votes[digest(pairs[i][0], pairs[i][1][::-1], same)]
        for i in kept
        if same != "exact" or recurs[hash(couples[i])] > 1
    }
    torn = [i for i in kept if against.get(i)]
    if not torn:
        return Settled(kept=list(kept), relabelled=set(), dropped={}, note="")
    said = f"{name}: {len(torn)} of {len(kept)} pairs are preferred both ways round (first: {row(torn[0])})"
    if policy == "error":
        raise ValueError(f"{said}; mend them, or choose dataset.on_conflict=keep, drop or relabel")
    gone = set(torn) if policy == "drop" else set()
    if policy == "relabel":  # of the two ways that are left of each pair the one that fewer rows say, or both
        gone = {i for i in torn if votes[ways[i]] <= against[i]}
    if len(gone) == len(kept):
        raise ValueError(f"{said}, and none is left; choose dataset.on_conflict=keep, or other data")
    return Settled(
        kept=[i for i in kept if i not in gone],
        relabelled=set(),
        dropped={"contradicting labels": len(gone)} if gone else {},
        note=f"{said}; dataset.on_conflict={policy}",
    )
