"""What it would take to have comparisons judged, before anything is paid."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_lab.interfaces import Judge
from rlhf_lab.records import Comparison

CHARACTERS_PER_TOKEN = 4.0  # of English text, as a rule of thumb, where no tokenizer is named


@dataclass(frozen=True, kw_only=True)
class Price:
    """Fields:
    calls: to be made, if every reply can be read.
    known: calls whose replies are in the ledger, and cost nothing.
    prompt_tokens: of the calls to be made, estimated.
    reply_tokens, dollars: of these, at most.
    counted_by: how tokens were estimated; "" where there are none.
    """

    calls: int = 0
    known: int = 0
    prompt_tokens: float = 0.0
    reply_tokens: float = 0.0
    dollars: float = 0.0
    counted_by: str = ""

    def __add__(self, other: "Price") -> "Price":
        return Price(
            calls=self.calls + other.calls,
            known=self.known + other.known,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            reply_tokens=self.reply_tokens + other.reply_tokens,
            dollars=self.dollars + other.dollars,
            counted_by=self.counted_by or other.counted_by,
        )

    def __str__(self) -> str:
        if not self.calls:
            return f"no calls, {self.known} replies are in the ledger" if self.known else "no calls, no cost"
        cents = math.ceil(100 * self.dollars)
        return (
            f"{self.calls} calls ({self.known} more are in the ledger), about {self.prompt_tokens:,.0f} tokens to read "
            f"({self.counted_by}) and at most {self.reply_tokens:,.0f} to write, at most {cents / 100:.2f} dollars"
        )


Asked = Sequence[tuple[str, Sequence[Comparison]]]
"""(criterion, comparisons) as they will be handed to the judge: a call shows several pairs of one of these alone."""


def price_of(judge: Judge, asked: Asked) -> Price:
    """What the judge would take; nothing, for one that makes no calls."""
    price = getattr(judge, "price", None)
    if price is None:
        return Price()
    return sum((price(comparisons, criterion) for criterion, comparisons in asked), Price())


class DryRun(Exception):
    """Nothing was asked, as was wished, and no mistake was made; the message is the price."""


def announce(judge: Judge, asked: Asked, say: Callable[[str], None]) -> None:
    """Say what is going to be asked and what it takes; what a stage does before its first verdict.

    Raises:
        DryRun: no more than that was wished, `judge.dry_run=true`.
    """
    price = price_of(judge, asked)
    count = sum(len(comparisons) for _, comparisons in asked)
    said = f"judging {count} comparisons by {', '.join(sorted({criterion for criterion, _ in asked}))}: {price}"
    if getattr(judge, "dry_run", False):
        raise DryRun(f"{said}; judge.dry_run=true, so nothing was asked. Leave it out to have them judged")
    say(said)


def account(judge: Judge, say: Callable[[str], None]) -> None:
    """Say what was asked and what it cost; what a stage does after its last verdict."""
    told = getattr(judge, "account", None)
    if told is not None:
        say("the judge: " + ", ".join(f"{name.removeprefix('judge/')} {value:g}" for name, value in told.items()))
