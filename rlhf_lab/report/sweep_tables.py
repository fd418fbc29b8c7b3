"""A sweep in numbers: by combination, by factor, and pair by pair, each with what seeds allow to be said."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_lab.report.comparison import Difference, Mean, Pair, holm, mean_over_seeds, paired_difference
from rlhf_lab.report.summary import Estimate, judged, number
from rlhf_lab.report.sweep_runs import Member, SweepRuns
from rlhf_lab.report.sweep_values import Metric, Values

ALPHA = 0.05
FINEST = 0.005  # what two decimals still show


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric of one row.

    Fields:
        before: mean over the same seeds at the first evaluation; NaN where there was none.
        limit: how the mean stands to its limit, in words; "" where there is none.
        scale: the largest size that the metric has in the sweep.
    """

    after: Mean
    before: float
    limit: str
    scale: float

    def __str__(self) -> str:
        return spelled(self.after, self.scale)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: so many of the runs it should rest on, and its metrics."""

    label: str
    finished: int
    planned: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class PairedRow:
    """One level of a factor beside the baseline in one metric; see `Difference`.

    Fields:
        p_adjusted: by Holm, for all comparisons of this metric.
        verdict: what may be concluded.
        scale: the largest size that the metric has in the sweep.
    """

    level: str
    metric: Metric
    difference: Difference
    p_adjusted: float
    verdict: str
    scale: float

    @property
    def mean(self) -> str:
        said = spelled(self.difference.mean, self.scale)
        return f"+{said}" if self.difference.mean.value > 0 and not said.startswith("0.00") else said

    @property
    def count(self) -> str:
        """How often the level was the better one, or the higher one where neither is better."""
        better = self.difference.lower if self.metric.better < 0 else self.difference.higher
        word = "better" if self.metric.better else "higher"
        return f"{word} in {better} of {self.difference.num_pairs}"


@dataclass(frozen=True, kw_only=True)
class FactorTables:
    """One factor: its levels over the same blocks, and each beside the baseline.

    Fields:
        num_blocks: (other factors, seed) in which every level has a compared run; the margins rest on these alone.
        pairs: by metric; without those of `equal`.
        equal: metrics that differ in no pair.
    """

    factor: str
    baseline: str
    num_blocks: int
    levels: tuple[Row, ...]
    pairs: tuple[PairedRow, ...]
    equal: tuple[Metric, ...]


def spelled(mean: Mean, scale: float) -> str:
    """A mean with its interval. Beside values that show in hundredths, what is finer is 0.00, not an exponent.

    Unless it is told from 0: then how small it is matters.
    """
    if mean.num == 0:
        return "\N{EM DASH}"
    value, half_width = mean.value, mean.half_width
    if scale > FINEST and not half_width < abs(value) < FINEST:
        value, half_width = (0.0 if abs(part) < FINEST else part for part in (value, half_width))
    return str(Estimate(mean=value, ci=half_width))


def by_combination(values: Values, split: str) -> tuple[Row, ...]:
    """Every combination of the factors, over its seeds."""
    return tuple(
        row(values, values.sweep.label(combination), members, values.metrics[split])
        for combination, members in values.sweep.combinations.items()
    )


def row(values: Values, label: str, members: Sequence[Member], metrics: Sequence[Metric]) -> Row:
    counted = [member for member in members if member in values.sweep.counted]
    cells = []
    for metric in metrics:
        taken = [values.of(member, metric) for member in counted]
        after = mean_over_seeds([value.after for value in taken])
        before = mean_over_seeds([value.before for value in taken]).value
        cells.append(cell(values, metric, after, before))
    return Row(label=label, finished=len(counted), planned=len(members), cells=tuple(cells))


def cell(values: Values, metric: Metric, after: Mean, before: float) -> Cell:
    return Cell(after=after, before=before, limit=against_limit(after, metric), scale=values.scale[metric])


def against_limit(mean: Mean, metric: Metric) -> str:
    if mean.num == 0 or not math.isfinite(metric.limit):
        return ""
    return judged(Estimate(mean=mean.value, ci=mean.half_width), metric.limit)


def by_factor(values: Values) -> tuple[FactorTables, ...]:
    """Each factor with several levels, on the first split.

    P values are adjusted by Holm over all factors and levels, metric by metric.
    """
    sweep = values.sweep
    factors = [factor for factor, levels in sweep.factors.items() if len(levels) > 1]
    differences = {
        (factor, level, metric): paired_difference(
            blocks(values, factor, level, metric), blocks(values, factor, sweep.factors[factor][0], metric)
        )
        for metric in values.headline
        for factor in factors
        for level in sweep.factors[factor][1:]
    }
    adjusted: dict[tuple[str, str, Metric], float] = {}
    num_tests: dict[Metric, int] = {}
    for metric in values.headline:
        family = {key: found.p for key, found in differences.items() if key[2] == metric}
        adjusted |= dict(zip(family, holm(list(family.values())), strict=True))
        num_tests[metric] = sum(map(math.isfinite, family.values()))
    tables = []
    for factor in factors:
        baseline, *others = sweep.factors[factor]
        common = common_blocks(values, factor)
        equal = tuple(
            metric
            for metric in values.headline
            if (found := [differences[factor, level, metric] for level in others])
            and any(one.num_pairs for one in found)
            and all(one.higher == one.lower == 0 for one in found)
        )
        pairs = []
        for metric in values.headline:
            for level in others:
                key = (factor, level, metric)
                if metric not in equal and differences[key].num_pairs:
                    pairs.append(
                        PairedRow(
                            level=sweep.say(factor, level),
                            metric=metric,
                            difference=differences[key],
                            p_adjusted=adjusted[key],
                            verdict=verdict(differences[key], adjusted[key], metric, num_tests[metric]),
                            scale=values.scale[metric],
                        )
                    )
        tables.append(
            FactorTables(
                factor=factor,
                baseline=sweep.say(factor, baseline),
                num_blocks=len(common),
                levels=tuple(margin(values, factor, level, common) for level in sweep.factors[factor]),
                pairs=tuple(pairs),
                equal=equal,
            )
        )
    return tuple(tables)


def pair_of(sweep: SweepRuns, member: Member, factor: str) -> Pair:
    return tuple(value for key, value in member.factors.items() if key != factor), member.seed


def blocks(values: Values, factor: str, level: str, metric: Metric) -> Mapping[Pair, float]:
    """(other factors, seed) -> what the run of this level has there; runs that are not compared are left out."""
    return {
        pair_of(values.sweep, member, factor): values.of(member, metric).after
        for member in values.sweep.counted
        if member.factors[factor] == level
    }


def common_blocks(values: Values, factor: str) -> frozenset[Pair]:
    """The (other factors, seed) in which every level has a compared run, so that no level rests on easier ones."""
    found: dict[Pair, set[str]] = {}
    for member in values.sweep.counted:
        found.setdefault(pair_of(values.sweep, member, factor), set()).add(member.factors[factor])
    return frozenset(block for block, levels in found.items() if levels == set(values.sweep.factors[factor]))


def margin(values: Values, factor: str, level: str, common: frozenset[Pair]) -> Row:
    """A level's mean over the common blocks: first over the other factors within a seed, then over seeds."""
    members = [member for member in values.sweep.members if member.factors[factor] == level]
    kept = [
        member
        for member in members
        if member in values.sweep.counted and pair_of(values.sweep, member, factor) in common
    ]
    cells = []
    for metric in values.headline:
        by_seed: dict[tuple[str, ...], list[tuple[float, float]]] = {}
        for member in kept:
            value = values.of(member, metric)
            if math.isfinite(value.after):
                by_seed.setdefault(member.seed, []).append((value.before, value.after))
        after = mean_over_seeds([sum(after for _, after in runs) / len(runs) for runs in by_seed.values()])
        before = mean_over_seeds([sum(before for before, _ in runs) / len(runs) for runs in by_seed.values()]).value
        cells.append(cell(values, metric, after, before))
    return Row(label=values.sweep.say(factor, level), finished=len(kept), planned=len(members), cells=tuple(cells))


def verdict(difference: Difference, p_adjusted: float, metric: Metric, num_tests: int) -> str:
    """What may be concluded of a difference."""
    num = difference.mean.num
    if num < 2:
        return "one seed: chance cannot be told from effect"
    if difference.higher == difference.lower == 0:
        return "no difference in any pair"
    if p_adjusted < ALPHA:
        sign = 1 if difference.mean.value > 0 else -1
        return {1: "better", -1: "worse", 0: "higher" if sign > 0 else "lower"}[sign * metric.better]
    if difference.p < ALPHA:
        return f"not resolved with {num} seeds once all {num_tests} comparisons are counted"
    return f"not resolved with {num} seeds"


def p_spelled(p: float) -> str:
    if not math.isfinite(p):
        return "\N{EM DASH}"
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def final(values: Values, member: Member, metric: Metric) -> str:
    after = values.of(member, metric).after
    return number(after) if math.isfinite(after) else "\N{EM DASH}"
