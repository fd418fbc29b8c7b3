"""What people say of contestants: their win rates, how far they agree with one another, and a judge with them."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from rlhf_lab.evaluation.arena import clusters
from rlhf_lab.evaluation.rating_sheets import Item, Rating, Scale
from rlhf_lab.evaluation.win_rates import Judgement
from rlhf_lab.functional.agreement import MISSING, cohen_kappa, fleiss_kappa, krippendorff_alpha
from rlhf_lab.functional.estimates import Estimate, bootstrapped, rate
from rlhf_lab.types import Metrics

Question = tuple[str, str, str, int, str, str]  # split, prompt id, condition, sample, first, second


def question(of: Item | Judgement) -> Question:
    """What is compared, by whomever."""
    return of.split, of.prompt_id, of.condition, of.sample, of.first, of.second


def judgements(ratings: Sequence[Rating], scale: Scale) -> list[Judgement]:
    """Ratings as verdicts: `wins` by their sign, `mean` by how strong they are, from 0 to 1.

    Several raters' verdicts on one pair stand side by side; intervals are over prompts.
    """
    found = []
    for each in ratings:
        item, wins = each.item, _wins(each.value)
        found.append(
            Judgement(
                split=item.split,
                condition=item.condition,
                prompt_id=item.prompt_id,
                sample=item.sample,
                criterion=each.criterion,
                first=item.first,
                second=item.second,
                wins=wins,
                by_order_first=wins if item.first_is_a else None,
                by_order_second=None if item.first_is_a else wins,
                mean=0.5 + 0.5 * each.value / scale.most,
                longer=item.longer,
            )
        )
    return found


def _wins(value: float) -> float:
    return 0.5 + 0.5 * ((value > 0) - (value < 0))


def _table(ratings: Sequence[Rating]) -> tuple[list[Question], Tensor, Tensor]:
    """What was rated; (items, raters) values, NaN where there is none; and (items,) int64 the prompts."""
    items = list(dict.fromkeys(question(each.item) for each in ratings))
    raters = sorted({each.item.rater for each in ratings})
    place = {item: i for i, item in enumerate(items)}
    values = torch.full((len(items), len(raters)), float("nan"), dtype=torch.float64)
    for each in ratings:
        values[place[question(each.item)], raters.index(each.item.rater)] = each.value
    return items, values, clusters([(prompt_id, condition) for _, prompt_id, condition, *_ in items])


def agreement(ratings: Sequence[Rating], scale: Scale, draws: int, seed: int) -> Metrics:
    """How far raters agree, under `agreement/<criterion>/…`; each with its interval over prompts.

        alpha         Krippendorff's, of ordered values
        kappa         Cohen's for two raters, Fleiss' for more, of who is better: first, neither, second; only if all
                      rated all
        pairwise      chance that two raters of a pair agree on who is better; a tie against a win is half agreement
        a_preferred   share of verdicts for the response that was shown as A, ties as halves

    Of alpha and kappa there is none where all ratings are equal, of the first three none for a single rater.
    """
    metrics: Metrics = {}
    for criterion in dict.fromkeys(each.criterion for each in ratings):
        of_it = [each for each in ratings if each.criterion == criterion]
        _, values, prompts = _table(of_it)
        prefix = f"agreement/{criterion}"
        shown = [_wins(each.value if each.item.first_is_a else -each.value) for each in of_it]
        their_prompts = clusters([(each.item.prompt_id, each.item.condition) for each in of_it])
        metrics |= rate(torch.tensor(shown, dtype=torch.float64), their_prompts).named(f"{prefix}/a_preferred")
        if values.shape[1] < 2:
            continue
        known = ~values.isnan()
        ranks = torch.where(known, values.nan_to_num() + scale.most, MISSING).long()
        sides = torch.where(known, values.nan_to_num().sign() + 1, MISSING).long()

        def alpha(rows: Tensor, ranks: Tensor = ranks) -> float:
            return krippendorff_alpha(ranks[rows], 2 * scale.most + 1, "ordinal")

        def kappa(rows: Tensor, sides: Tensor = sides) -> float:
            drawn = sides[rows]
            return cohen_kappa(drawn[:, 0], drawn[:, 1], 3) if drawn.shape[1] == 2 else fleiss_kappa(drawn, 3)

        metrics |= _finite(bootstrapped(alpha, prompts, draws, seed), f"{prefix}/alpha")
        if bool(known.all()):
            metrics |= _finite(bootstrapped(kappa, prompts, draws, seed), f"{prefix}/kappa")
        same, rows = _pairwise(values)
        if len(same):
            metrics |= rate(same, prompts[rows]).named(f"{prefix}/pairwise")
    return metrics


def _pairwise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of every item that two raters rated: how far they agree, from 0 to 1; and which item it is."""
    wins = 0.5 + 0.5 * values.sign()
    same, rows = [], []
    for i, j in combinations(range(values.shape[1]), 2):
        both = (~values[:, i].isnan() & ~values[:, j].isnan()).nonzero()[:, 0]
        same.append(1 - (wins[both, i] - wins[both, j]).abs())
        rows.append(both)
    return torch.cat(same), torch.cat(rows)


def judged_alike(
    ratings: Sequence[Rating], judged: Sequence[Judgement], draws: int, seed: int
) -> tuple[Metrics, dict[str, int]]:
    """How far a judge agrees with people, under `judge_agreement/<criterion>/…`; each with its interval over prompts.

        raters      chance that the judge and a rater of a pair agree on who is better, as `agreement` counts
        majority    the same, with what most raters of the pair say; their tie if they are evenly split
        kappa       Cohen's, of the judge and that majority

    Args:
        judged: the judge's verdicts; those on pairs that nobody rated are passed over, and which contestant is called
            the first does not matter.

    Returns:
        The metrics; and criterion -> how many rated pairs the judge has no verdict on.
    """
    wins = _by_question(judged)
    metrics: Metrics = {}
    unjudged: dict[str, int] = {}
    for criterion in dict.fromkeys(each.criterion for each in ratings):
        items, values, prompts = _table([each for each in ratings if each.criterion == criterion])
        said = [wins.get((criterion, *item)) for item in items]
        rows = torch.tensor([i for i, value in enumerate(said) if value is not None], dtype=torch.int64)
        unjudged[criterion] = len(items) - len(rows)
        if not len(rows):
            continue
        judge = torch.tensor([_wins(value - 0.5) for value in said if value is not None], dtype=torch.float64)
        people = 0.5 + 0.5 * values[rows].sign()
        majority = 0.5 + 0.5 * people.sub(0.5).nansum(1).sign()
        prefix, of_rows = f"judge_agreement/{criterion}", prompts[rows]
        metrics |= rate(1 - (people - judge[:, None]).abs().nanmean(1), of_rows).named(f"{prefix}/raters")
        metrics |= rate(1 - (majority - judge).abs(), of_rows).named(f"{prefix}/majority")
        both = torch.stack([majority, judge], 1).mul(2).long()

        def kappa(drawn: Tensor, both: Tensor = both) -> float:
            return cohen_kappa(both[drawn, 0], both[drawn, 1], 3)

        metrics |= _finite(bootstrapped(kappa, of_rows, draws, seed), f"{prefix}/kappa")
    return metrics, unjudged


def _by_question(judged: Sequence[Judgement]) -> Mapping[tuple[str, *Question], float]:
    """(criterion, question) -> wins of the first, with the contestants in either order."""
    found: dict[tuple[str, *Question], float] = {}
    for each in judged:
        if each.wins is not None:
            split, prompt_id, condition, sample, first, second = question(each)
            found[each.criterion, split, prompt_id, condition, sample, first, second] = each.wins
            found[each.criterion, split, prompt_id, condition, sample, second, first] = 1 - each.wins
    return found


def _finite(estimate: Estimate, name: str) -> Metrics:
    """Under its name, if there is any."""
    return estimate.named(name) if estimate.value == estimate.value else {}
