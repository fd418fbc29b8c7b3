"""Judges' verdicts on pairs of responses, counted: win rates, by criterion and by several together, and ratings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_lab.evaluation.arena import clusters
from rlhf_lab.functional.estimates import Estimate, mean, rate
from rlhf_lab.functional.length_control import length_controlled
from rlhf_lab.functional.ratings import bradley_terry, elo, elo_interval
from rlhf_lab.types import Metrics


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was said of two responses by one criterion, or by several together; a row of `verdicts.parquet`.

    Fields:
        first, second: the contestants.
        wins: of the first: 1 won, 0 lost, 0.5 tied, averaged over the orders; None if it could not be read.
        by_order_first, by_order_second: the same, with the first, with the second response shown first; None if that
            was not asked or not read.
        mean: of `wins` over the criteria; `wins` itself for one criterion.
        longer: characters that the first response has more than the second.
    """

    split: str
    condition: str
    prompt_id: str
    sample: int
    criterion: str
    first: str
    second: str
    wins: float | None
    by_order_first: float | None
    by_order_second: float | None
    mean: float | None
    longer: int

    @property
    def row(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def pair(self) -> tuple[str, str, str, str]:
        """What it counts for."""
        return self.split, self.criterion, self.first, self.second


def combined(judgements: Iterable[Judgement], name: str, criteria: Sequence[str]) -> list[Judgement]:
    """Verdicts by several criteria as one: whoever wins by more than loses, summed over the criteria.

        wins = 1, 1/2 or 0 as the sum over the criteria of (wins - 1/2) is positive, zero or negative

    None where any of the criteria has no verdict.

    Source: how Jang et al. 2023, arXiv:2310.11564, may come from single criteria to a combination of preferences; their
    code does not hold it.
    """
    found: dict[tuple[Any, ...], dict[str, Judgement]] = {}
    for each in judgements:
        if each.criterion in criteria:
            key = each.split, each.prompt_id, each.condition, each.sample, each.first, each.second
            found.setdefault(key, {})[each.criterion] = each
    made = []
    for each in found.values():
        one = next(iter(each.values()))
        wins = [each[criterion].wins for criterion in criteria if criterion in each]
        known = [value for value in wins if value is not None]
        is_whole = len(known) == len(criteria)
        total = sum(value - 0.5 for value in known)
        made.append(
            Judgement(
                split=one.split,
                condition=one.condition,
                prompt_id=one.prompt_id,
                sample=one.sample,
                criterion=name,
                first=one.first,
                second=one.second,
                wins=0.5 + 0.5 * ((total > 0) - (total < 0)) if is_whole else None,
                by_order_first=None,
                by_order_second=None,
                mean=sum(known) / len(known) if is_whole else None,
                longer=one.longer,
            )
        )
    return made


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often the first wins against the second on one split, by one criterion or several together.

    Fields:
        share: of wins, ties as halves; None if nothing could be read. Wilson's interval, over prompts.
        mean: of the criteria's win rates, with Student's interval over prompts.
        balanced: the share if both wrote equally long responses, see `length_controlled`; None if it cannot be told.
        judged, excluded: pairs with a verdict, and without one that could be read.
        ties: pairs of which neither response is any better; a win in one order and a loss in the other is one too.
        prompts: with a verdict.
    """

    split: str
    criterion: str
    first: str
    second: str
    share: Estimate | None
    mean: Estimate | None
    balanced: Estimate | None
    judged: int
    excluded: int
    ties: int
    prompts: int

    @property
    def row(self) -> dict[str, Any]:
        """As a table holds it."""
        counts = {name: getattr(self, name) for name in ("prompts", "judged", "ties", "excluded")}
        row: dict[str, Any] = {name: getattr(self, name) for name in ("split", "criterion", "first", "second")}
        for name, estimate in (("win_rate", self.share), ("mean", self.mean), ("length_controlled", self.balanced)):
            for end in ("value", "low", "high"):
                key = name if end == "value" else f"{name}_{end}"
                row[key] = getattr(estimate, end) if estimate else None
        return row | counts

    @property
    def metrics(self) -> Metrics:
        prefix = f"win_rate/{self.split}/{self.criterion}/{self.first}/{self.second}"
        named: Metrics = {f"{prefix}/{name}": float(getattr(self, name)) for name in ("judged", "excluded", "ties")}
        named |= self.share.named(prefix) if self.share else {}
        named |= self.mean.named(f"{prefix}/over_criteria") if self.mean else {}
        return named | (self.balanced.named(f"{prefix}/length_controlled") if self.balanced else {})


def _prompts(judgements: Sequence[Judgement]) -> Tensor:
    return clusters([(each.prompt_id, each.condition) for each in judgements])


def win_rates(judgements: Sequence[Judgement], *, length_control: bool) -> list[WinRate]:
    """Count every pair of contestants by every criterion on every split."""
    by_pair: dict[tuple[str, str, str, str], list[Judgement]] = {}
    for each in judgements:
        by_pair.setdefault(each.pair, []).append(each)
    found = []
    for (split, criterion, first, second), of_pair in by_pair.items():
        read = [each for each in of_pair if each.wins is not None]
        wins, means = (
            torch.tensor([getattr(each, name) for each in read], dtype=torch.float64) for name in ("wins", "mean")
        )
        prompts = _prompts(read)
        longer = torch.tensor([each.longer for each in read])
        balanced = length_controlled(wins, longer, prompts) if length_control and read else None
        found.append(
            WinRate(
                split=split,
                criterion=criterion,
                first=first,
                second=second,
                share=rate(wins, prompts) if read else None,
                mean=mean(means, prompts) if read else None,
                balanced=Estimate(value=balanced[0], low=balanced[1], high=balanced[2]) if balanced else None,
                judged=len(read),
                excluded=len(of_pair) - len(read),
                ties=int((wins == 0.5).sum()),
                prompts=len(prompts.unique()),
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class OrderBias:
    """How a judge's verdicts depend on what it is shown first, of pairs that it read in both orders.

    Fields:
        first_shown: the share of verdicts for the response that is shown first, ties as halves; without bias 0.5.
        consistent: the share of pairs of which it says the same in both orders.
        tied: the share of pairs that are a tie over both orders.
    """

    split: str
    criterion: str
    first_shown: Estimate
    consistent: Estimate
    tied: Estimate

    @property
    def metrics(self) -> Metrics:
        kinds = ("first_shown", "consistent", "tied")
        named = [getattr(self, kind).named(f"verdicts/{self.split}/{self.criterion}/{kind}") for kind in kinds]
        return {name: value for each in named for name, value in each.items()}


def order_bias(judgements: Sequence[Judgement]) -> list[OrderBias]:
    """For every split and criterion of which some pairs were read in both orders."""
    found = []
    for split, criterion in dict.fromkeys((each.split, each.criterion) for each in judgements):
        both = [
            (each, each.by_order_first, each.by_order_second)
            for each in judgements
            if (each.split, each.criterion) == (split, criterion)
            and each.by_order_first is not None
            and each.by_order_second is not None
        ]
        if not both:
            continue
        prompts = _prompts([each for each, _, _ in both])
        shown = torch.tensor([(first + 1 - second) / 2 for _, first, second in both], dtype=torch.float64)
        same = torch.tensor([float(first == second) for _, first, second in both], dtype=torch.float64)
        ties = torch.tensor([float(first + second == 1) for _, first, second in both], dtype=torch.float64)
        found.append(
            OrderBias(
                split=split,
                criterion=criterion,
                first_shown=rate(shown, prompts),
                consistent=rate(same, prompts),
                tied=rate(ties, prompts),
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Rating:
    """A contestant's strength on Elo's scale, by one criterion or several together on one split."""

    split: str
    criterion: str
    name: str
    points: Estimate

    @property
    def row(self) -> dict[str, Any]:
        ends = {"rating": self.points.value, "low": self.points.low, "high": self.points.high}
        return {"split": self.split, "criterion": self.criterion, "name": self.name, **ends}

    @property
    def metrics(self) -> Metrics:
        return self.points.named(f"rating/{self.split}/{self.criterion}/{self.name}")


def wins_of_prompts(judgements: Sequence[Judgement], names: Sequence[str]) -> Tensor:
    """(P, K, K) games that the row won against the column on each prompt, ties as halves; unread ones left out."""
    read = [each for each in judgements if each.wins is not None]
    prompts = _prompts(read)
    place = {name: i for i, name in enumerate(names)}
    games = torch.zeros(int(prompts.max()) + 1 if read else 0, len(names), len(names), dtype=torch.float64)
    for each, prompt in zip(read, prompts.tolist(), strict=True):
        first, second, wins = place[each.first], place[each.second], each.wins or 0.0
        games[prompt, first, second] += wins
        games[prompt, second, first] += 1 - wins
    return games


def ratings(
    judgements: Sequence[Judgement],
    names: Sequence[str],
    *,
    anchor: str,
    anchor_rating: float,
    virtual_ties: float,
    draws: int,
    seed: int,
) -> tuple[list[Rating], list[str]]:
    """Bradley-Terry ratings of all contestants, with bootstrap intervals over prompts.

    Args:
        names: the contestants.
        anchor: whose rating is `anchor_rating`, by declaration.
        virtual_ties: drawn games added to every pair, see `bradley_terry`.
        draws, seed: of the bootstrap.

    Returns:
        The ratings; and what is to be said of those that there are not, or whose intervals are incomplete.
    """
    found: list[Rating] = []
    notes: list[str] = []
    place = list(names).index(anchor)
    for split, criterion in dict.fromkeys((each.split, each.criterion) for each in judgements):
        of_both = [each for each in judgements if (each.split, each.criterion) == (split, criterion)]
        games = wins_of_prompts(of_both, names)
        if not len(games):  # virtual ties alone would rate all alike
            notes.append(f"no ratings by {criterion} on {split}: none of {len(of_both)} verdicts could be read")
            continue
        try:
            points = elo(bradley_terry(games.sum(0), virtual_ties), place, anchor_rating)
        except ValueError as error:
            notes.append(f"no ratings by {criterion} on {split}: {error}")
            continue
        low, high, left_out = elo_interval(games, virtual_ties, place, anchor_rating, draws, seed)
        if left_out:
            notes.append(f"ratings by {criterion} on {split}: {left_out} of {draws} resamples have none")
        ends = zip(names, points.tolist(), low.tolist(), high.tolist(), strict=True)
        found += [
            Rating(split=split, criterion=criterion, name=name, points=Estimate(value=value, low=lower, high=upper))
            for name, value, lower, upper in ends
        ]
    return found, notes


def read_judgements(rows: Iterable[Mapping[str, Any]]) -> list[Judgement]:
    """The rows of a table of verdicts."""
    return [Judgement(**row) for row in rows]
