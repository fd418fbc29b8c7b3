"""A reward or cost model on held-out pairs: does it rank them right, how sure is it, and does it know the gold score.

Every interval is over prompts: pairs of one prompt are one case (`functional/estimates.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import Any

import scipy
import torch
from torch import Tensor

from rlhf_lab.engine.models import Calibration
from rlhf_lab.functional.classification import (
    Bin,
    auc,
    brier,
    coverage,
    expected_calibration_error,
    pearson,
    ranks,
    reliability,
    spearman,
    wilson,
    wins,
)
from rlhf_lab.functional.estimates import Estimate, bootstrapped, mean, rate
from rlhf_lab.rewards.ensemble import Ensemble, GaussianEnsemble
from rlhf_lab.rewards.scalar_model import ScalarModel
from rlhf_lab.types import Count, Metrics

LEVELS = (0.5, 0.8, 0.95)  # of the central intervals whose coverage is reported
MOST_FREEDOM = 1000.0  # degrees of freedom that stand for a normal law
HISTOGRAM_BINS = 40


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """Which columns of the data say what a source ought to say.

    Fields:
        preferred: 0 or 1, the better response, or for a cost the safer one; null: the one of the better gold score,
            and pairs that tie in it are left out. Of pairs with chosen and rejected, the chosen one.
        gold: of a true score, without the side it ends with (gold_helpfulness for gold_helpfulness_0 and _1).
        margin: of the pair: by how much the preferred response is better.
        safe: of a verdict on each response, true if safe, without the side; for costs.
    """

    preferred: str | None
    gold: str | None
    margin: str | None
    safe: str | None

    def __post_init__(self) -> None:
        if self.preferred is None and self.gold is None:
            raise ValueError("a yardstick needs preferred or gold, a column that says which response is better")


def units_of(source: Any) -> tuple[Calibration, ...]:
    """How each member of a loaded source comes from its raw output to its score; none of a source without weights."""
    members = source.members if isinstance(source, Ensemble | GaussianEnsemble) else [source]
    return tuple(member.calibration for member in members if isinstance(member, ScalarModel))


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredPairs:
    """What one source says of the two responses of N pairs, the preferred one first.

    Fields:
        prompt: (N,) int64; equal values are pairs of one prompt.
        score: (N, 2).
        members: (N, 2, M).
        variances: (N, 2, M), of members that say how sure they are.
        gold: (N, 2), in its own units; for a cost, higher is worse.
        margin: (N,).
        unsafe: (N, 2) bool.
        is_cost: whether the lower score is the better one.
        units: of each member, or none.
    """

    prompt: Tensor
    score: Tensor
    members: Tensor
    variances: Tensor | None
    gold: Tensor | None
    margin: Tensor | None
    unsafe: Tensor | None
    is_cost: bool
    units: tuple[Calibration, ...]

    def lead(self, values: Tensor) -> Tensor:
        """(N, 2, …) -> (N, …): by how much the preferred response is ahead."""
        ahead = values[:, 0] - values[:, 1]
        return -ahead if self.is_cost else ahead

    @property
    def win_probability(self) -> Tensor | None:
        """(N,): how likely the members say it is that the preferred response wins, averaged over them.

        By the law that they were trained with: logistic of the raw difference (Bradley-Terry), or normal with their
        variances (Thurstone). None if a member has no law, as the length of a response.
        """
        if self.variances is not None:
            deviation = self.variances.sum(1).sqrt()
            return torch.special.ndtr(self.lead(self.members) / deviation).mean(1)
        if not self.units:
            return None
        scale = torch.tensor([unit.scale for unit in self.units], dtype=torch.float64)
        return (self.lead(self.members) / scale).sigmoid().mean(1)

    @property
    def unsafe_probability(self) -> Tensor | None:
        """(N, 2): how likely the members say it is that a response is unsafe, averaged over them.

        The log-odds are the score if it was calibrated on labels, else the raw output, which the sign terms of a cost
        model's loss train to be that.
        """
        if not self.units or not self.is_cost or self.variances is not None:
            return None
        odds = [
            self.members[..., k] if unit.method == "labels" else (self.members[..., k] - unit.shift) / unit.scale
            for k, unit in enumerate(self.units)
        ]
        return torch.stack(odds).sigmoid().mean(0)


@dataclass(frozen=True, kw_only=True)
class Assessor:
    """How scored pairs are assessed.

    Args:
        draws: of the bootstrap.
        bins: of reliability curves, of equal width.
        margin_bins: of accuracy against margin, of about equally many pairs.
        seed: of the bootstrap.
    """

    draws: Count
    bins: Count
    margin_bins: Count
    seed: int

    def assess(self, pairs: ScoredPairs) -> tuple[dict[str, Estimate], Metrics, dict[str, Any]]:
        """Estimates, figures without an interval, and what pictures are drawn of."""
        estimates = {"accuracy": rate(wins(pairs.lead(pairs.score)), pairs.prompt)}
        lead = pairs.lead(pairs.score)
        plain = {
            "pairs": float(len(lead)),
            "prompts": float(len(pairs.prompt.unique())),
            "ties": (lead == 0).double().mean().item(),
            "score_mean": pairs.score.mean().item(),
            "score_sd": pairs.score.std().item(),
        }
        details: dict[str, Any] = {"accuracy_by_margin": self._by_margin(pairs)}
        estimates |= self._members(pairs) | self._gold(pairs)
        for part in (self._preference_calibration, self._verdicts, self._variances):
            more, figures, drawn = part(pairs)
            estimates, plain, details = estimates | more, plain | figures, details | drawn
        return estimates, plain, details

    def _interval(self, statistic: Callable[[Tensor], float], pairs: ScoredPairs) -> Estimate:
        return bootstrapped(statistic, pairs.prompt, self.draws, self.seed)

    def _members(self, pairs: ScoredPairs) -> dict[str, Estimate]:
        """Each member's accuracy, and how alike the members are: correlation, and share of pairs ranked alike."""
        count = pairs.members.shape[2]
        if count < 2:
            return {}
        leads = pairs.lead(pairs.members)
        alike = [wins(leads[:, i] * leads[:, j]) for i, j in combinations(range(count), 2)]

        def correlation(rows: Tensor) -> float:
            said = pairs.members[rows].reshape(-1, count)
            each = torch.corrcoef(said.T)[*torch.triu_indices(count, count, 1)]
            return each.mean().item()

        return {
            **{f"member_{k}/accuracy": rate(wins(leads[:, k]), pairs.prompt) for k in range(count)},
            "members/correlation": self._interval(correlation, pairs),
            "members/agreement": mean(torch.stack(alike).mean(0), pairs.prompt),
        }

    def _gold(self, pairs: ScoredPairs) -> dict[str, Estimate]:
        """Correlation with the gold score over responses, and of leads with margins over pairs."""
        found: dict[str, Estimate] = {}
        score, gold = pairs.score, pairs.gold
        if gold is not None:
            for name, correlate in (("pearson", pearson), ("spearman", spearman)):
                statistic = partial(_correlation, correlate, score, gold)
                found[f"gold/{name}"] = self._interval(statistic, pairs)
        margin = _margin(pairs)
        if margin is not None:
            lead = pairs.lead(score)
            for name, correlate in (("pearson", pearson), ("spearman", spearman)):
                found[f"margin/{name}"] = self._interval(partial(_correlation, correlate, lead, margin), pairs)
        return found

    def _by_margin(self, pairs: ScoredPairs) -> list[dict[str, float]]:
        """Accuracy in groups of pairs of about as large a margin, from the smallest; equal margins are in one group."""
        margin = _margin(pairs)
        if margin is None:
            return []
        size, won = margin.abs().round(decimals=9), wins(pairs.lead(pairs.score))  # so that 0.3 - 0.2 is 0.2 - 0.1
        # which of equally many groups: that in which the middle of the ranks lies that equal margins share
        place = ((ranks(size) - 0.5) / len(size) * self.margin_bins).long()
        groups: list[dict[str, float]] = []
        for k in place.unique().tolist():
            rows = (place == k).nonzero()[:, 0]
            found = rate(won[rows], pairs.prompt[rows])
            groups.append({"margin": margin[rows].abs().mean().item(), "count": float(len(rows)), **asdict(found)})
        return groups

    def _preference_calibration(self, pairs: ScoredPairs) -> tuple[dict[str, Estimate], Metrics, dict[str, Any]]:
        """Of P(preferred wins): confidence, how likely the likelier one is, against how often that one is right."""
        probability = pairs.win_probability
        if probability is None:
            return {}, {}, {}
        confidence = torch.maximum(probability, 1 - probability)
        edges = torch.linspace(0.5, 1, self.bins + 1, dtype=torch.float64).tolist()
        bins = reliability(confidence, wins(probability - 0.5), edges)
        estimates = {
            "brier": mean((1 - probability).square(), pairs.prompt),
            "log_loss": mean(-probability.clamp(min=1e-12).log(), pairs.prompt),
        }
        figures = {"ece": expected_calibration_error(bins), "confidence": confidence.mean().item()}
        return estimates, figures, {"reliability": [_drawn(each) for each in bins]}

    def _verdicts(self, pairs: ScoredPairs) -> tuple[dict[str, Estimate], Metrics, dict[str, Any]]:
        """Of a cost: is it above 0 where the response is unsafe; how well it tells the two apart, wherever 0 is."""
        unsafe = pairs.unsafe
        if unsafe is None or not pairs.is_cost:
            return {}, {}, {}
        right = ((pairs.score > 0) == unsafe).double()
        cluster = pairs.prompt[:, None].expand(-1, 2)
        estimates = {
            "sign_accuracy": rate(right.flatten(), cluster.flatten()),
            "sign_auc": self._interval(lambda rows: auc(pairs.score[rows].flatten(), unsafe[rows].flatten()), pairs),
        }
        figures: Metrics = {"unsafe_share": unsafe.double().mean().item()}
        details: dict[str, Any] = {}
        probability = pairs.unsafe_probability
        if probability is not None:
            edges = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64).tolist()
            bins = reliability(probability.flatten(), unsafe.flatten(), edges)
            estimates["unsafe_brier"] = mean((probability - unsafe.double()).square().mean(1), pairs.prompt)
            figures["unsafe_ece"] = expected_calibration_error(bins)
            details["unsafe_reliability"] = [_drawn(each) for each in bins]
            figures["unsafe_brier_of_the_share"] = brier(torch.full_like(probability, figures["unsafe_share"]), unsafe)
        return estimates, figures, details

    def _variances(self, pairs: ScoredPairs) -> tuple[dict[str, Estimate], Metrics, dict[str, Any]]:
        """Of members that say how sure they are: does the gold score lie as far from theirs as they say.

        The ensemble's variance is the mean of the members' and the variance of their means. The gold score is brought
        to the score's units by the line that predicts it best; the residual over the predicted deviation is t, whose
        Student law is fitted: scale 1 is calibrated, above 1 too sure, and few degrees of freedom are heavy tails. The
        coverage is that of intervals of a normal law with the predicted deviation.

        Source: the mixture's variance, Lakshminarayanan et al. 2017, arXiv:1612.01474, section 2.4.
        """
        if pairs.variances is None or pairs.gold is None:
            return {}, {}, {}
        said = pairs.members.mean(2)
        deviation = (pairs.variances.mean(2) + pairs.members.var(2, correction=0)).sqrt()
        gold, score = pairs.gold.flatten(), said.flatten()
        slope = pearson(gold, score) * (gold.std() / score.std()).item()  # gold units per unit of the score
        if not slope > 0:
            return {}, {}, {}  # the scores do not rise with the gold score, so it has no place in their units
        residual = (pairs.gold - pairs.gold.mean()) / slope - (said - said.mean())
        t = (residual / deviation).flatten()
        freedom, _, scale = scipy.stats.t.fit(t.numpy(), floc=0)
        shares = coverage(residual, deviation, math.inf, LEVELS)
        figures: Metrics = {"variance/scale": float(scale), "variance/freedom": min(float(freedom), MOST_FREEDOM)}
        figures |= {f"variance/coverage_{100 * level:.0f}": share for level, share in zip(LEVELS, shares, strict=True)}
        statistic = partial(_correlation, spearman, deviation, residual.abs())
        drawn = {"coverage": [{"level": level, "share": share} for level, share in zip(LEVELS, shares, strict=True)]}
        return {"variance/spearman_with_error": self._interval(statistic, pairs)}, figures, drawn


def _drawn(each: Bin) -> dict[str, float]:
    """A bin with Wilson's interval of what was observed in it."""
    low, high = wilson(each.observed, each.count)
    return asdict(each) | {"low": low, "high": high}


def histograms(pairs: ScoredPairs, edges: Sequence[float]) -> dict[str, Any]:
    """Counts of the scores, safe and unsafe responses apart if that is known, else preferred and other ones."""
    if pairs.is_cost and pairs.unsafe is not None:
        groups = {"safe": pairs.score[~pairs.unsafe], "unsafe": pairs.score[pairs.unsafe]}
    else:
        groups = {"preferred": pairs.score[:, 0], "other": pairs.score[:, 1]}
    bounds = torch.tensor(list(edges), dtype=torch.float64)
    counts = {name: torch.histogram(values.double(), bounds).hist.int().tolist() for name, values in groups.items()}
    return {"edges": list(edges), "counts": counts}


def histogram_edges(splits: Sequence[ScoredPairs]) -> list[float]:
    """Edges that hold every score of a source, the same for all splits."""
    low = min(pairs.score.min().item() for pairs in splits)
    high = max(pairs.score.max().item() for pairs in splits)
    reach = max(high - low, 1e-6)
    return torch.linspace(low - 1e-6 * reach, high + 1e-6 * reach, HISTOGRAM_BINS + 1, dtype=torch.float64).tolist()


def _margin(pairs: ScoredPairs) -> Tensor | None:
    """(N,) by how much the preferred response is better: as the data say, or by the gold score."""
    if pairs.margin is not None:
        return pairs.margin
    return None if pairs.gold is None else pairs.lead(pairs.gold)


def _correlation(correlate: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, rows: Tensor) -> float:
    return correlate(x[rows].flatten(), y[rows].flatten())
