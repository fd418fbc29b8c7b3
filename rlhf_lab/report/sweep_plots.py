"""What the figures of a sweep show, as panels of curves: means over seeds with their intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import product

import numpy as np

from rlhf_lab.report.canvas import SMOOTHED_FROM, Curve, Panel, rolling_mean
from rlhf_lab.report.comparison import Mean, mean_over_seeds
from rlhf_lab.report.plots import ANY, MARKERS
from rlhf_lab.report.run import Series
from rlhf_lab.report.sweep_runs import Member, SweepRuns, as_number
from rlhf_lab.report.sweep_values import Metric, Values

MOST_CURVES = 8  # that an eye tells apart in one panel
MOST_PANELS = 6
MOST_MULTIPLES = 12
FEWEST_NUMBERS = 3  # of a factor whose response is drawn
LONGEST_LABEL = 36
MOST_THREADS = 16  # single seeds behind their means

Groups = Mapping[str, Sequence[Member]]


def clip(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


def combinations(sweep: SweepRuns) -> Groups:
    """Label -> the compared runs of a combination that has any."""
    counted = {
        sweep.label(combination): [member for member in members if member in sweep.counted]
        for combination, members in sweep.combinations.items()
    }
    return {label: members for label, members in counted.items() if members}


def levels(sweep: SweepRuns, factor: str) -> Groups:
    """Label -> the compared runs of a level that has any, whatever else varies; numbers ascending."""
    counted = {
        sweep.say(factor, level): [member for member in sweep.counted if member.factors[factor] == level]
        for level in ascending(sweep.factors[factor])
    }
    return {label: members for label, members in counted.items() if members}


def ascending(values: Sequence[str]) -> list[str]:
    """Numbers by size; anything else in the order in which it was typed."""
    numbers = {value: number for value in values if (number := as_number(value)) is not None}
    return sorted(values, key=lambda value: numbers[value]) if len(numbers) == len(values) else list(values)


def over_time(sweep: SweepRuns, groups: Groups, metric: Metric) -> list[Panel]:
    """A metric of each group as it went, the mean over seeds with 95% intervals; as a list of one panel, or of none."""
    curves: list[Curve] = []
    threads = sum(len({member.seed for member in members}) for members in groups.values()) <= MOST_THREADS
    for k, (label, members) in enumerate(groups.items()):
        curves += mean_curve(sweep, members, metric, clip(label), k, threads)
    if not any(len(curve.x) > 1 for curve in curves):
        return []
    shown = np.concatenate([curve.y for curve in curves])
    low, high = float(shown.min()), float(shown.max())
    if math.isfinite(metric.limit):
        ends = np.array([min(curve.x[0] for curve in curves), max(curve.x[-1] for curve in curves)])
        line = np.full(2, metric.limit)
        curves.append(Curve(x=ends, y=line, label="limit", colour="muted", kind="limit"))
        low, high = min(low, metric.limit), max(high, metric.limit)
    # intervals of two or three seeds are wide; they may be cut off, the means may not
    room = 0.45 * (high - low) or 0.1
    reach = [
        (float(np.nanmin(curve.y - curve.ci)), float(np.nanmax(curve.y + curve.ci)))
        for curve in curves
        if curve.ci is not None and np.isfinite(curve.ci).any()
    ]
    bottom = max(low - room, min([low, *(pair[0] for pair in reach)]) - 0.1 * room)
    top = min(high + room, max([high, *(pair[1] for pair in reach)]) + 0.1 * room)
    x_label = "episode" if sweep.counts_episodes else "step"
    title = title_of(metric)
    return [Panel(title=title, x_label=x_label, y_label="", curves=curves, y_range=(bottom, top), has_legend=False)]


def title_of(metric: Metric) -> str:
    first = metric.label[:1]
    return (first if first == "λ" else first.upper()) + metric.label[1:]


def mean_curve(
    sweep: SweepRuns, members: Sequence[Member], metric: Metric, label: str, k: int, threads: bool
) -> list[Curve]:
    """The mean of the members at the points that all of them have; within a seed they are averaged first."""
    points = [points_of(sweep, metric.series(member.run)) for member in members]
    points_by_member = [(member, found) for member, found in zip(members, points, strict=True) if found]
    if not points_by_member:
        return []
    shared = sorted(reduce(set.intersection, [set(found) for _, found in points_by_member]))
    if not shared:
        return []
    by_seed: dict[tuple[str, ...], list[list[float]]] = {}
    for member, found in points_by_member:
        by_seed.setdefault(member.seed, []).append([found[x] for x in shared])
    lines = np.array([np.mean(rows, axis=0) for rows in by_seed.values()])  # (seeds, points)
    if len(shared) >= SMOOTHED_FROM:
        lines = np.array([rolling_mean(line, len(shared) // 30) for line in lines])
    means = [mean_over_seeds(column) for column in lines.T.tolist()]
    x, colour = np.array(shared), ANY[k % len(ANY)]
    behind = [Curve(x=x, y=line, label="", colour=colour, kind="thread") for line in lines] if threads else []
    return [
        *(behind if len(lines) > 1 else []),
        Curve(
            x=x,
            y=np.array([mean.value for mean in means]),
            ci=np.array([mean.half_width for mean in means]),
            label=label,
            colour=colour,
            kind="band",
            marker=MARKERS[k % len(MARKERS)],
        ),
    ]


def points_of(sweep: SweepRuns, series: Series) -> dict[float, float]:
    x = series.x if sweep.counts_episodes else series.step
    return {float(at): float(value) for at, value in zip(x, series.value, strict=True) if math.isfinite(value)}


def trained_metrics(sweep: SweepRuns) -> list[Metric]:
    """What is logged at every step and tells how training went, of the kinds of runs that the sweep has."""
    names = dict.fromkeys(name for member in sweep.counted for name in member.run.names)

    def of(pattern: Callable[[str], bool]) -> list[str]:
        return [name for name in names if pattern(name)]

    wanted = [
        *of(lambda name: name == "objective/scores"),
        *of(lambda name: name.startswith("cost/") and name.endswith("/mean")),
        *of(lambda name: name.startswith("lagrange/") and name.endswith("/lambda")),
        *of(lambda name: name == "objective/kl"),
        *of(lambda name: name == "completions/mean_length"),
        *of(lambda name: name == "objective/entropy"),
    ] or of(lambda name: name.startswith("loss") or "accuracy" in name)
    labels = {"objective/scores": "reward", "objective/kl": "KL to the reference (nats)"}
    labels |= {"completions/mean_length": "length (tokens)", "objective/entropy": "entropy (nats per token)"}
    return [
        Metric(split="", key=name, label=labels.get(name, spoken(name)), better=0, limit=math.nan)
        for name in wanted[:MOST_PANELS]
    ]


def spoken(name: str) -> str:
    head, _, rest = name.partition("/")
    if head == "cost":
        name = rest.removesuffix("/mean")
        return "cost, as modelled" if name == "cost" else f"cost {name}, as modelled"
    return f"λ of {rest.removesuffix('/lambda')}" if head == "lagrange" else name


def multiples(sweep: SweepRuns, metric: Metric) -> list[Panel]:
    """One panel for every combination of the factors but one, whose levels are its curves; none if too many."""
    fitting = [factor for factor, values in sweep.factors.items() if len(values) <= MOST_CURVES]
    if not fitting:
        return []
    inner = max(fitting, key=lambda factor: len(sweep.factors[factor]))
    outer = {factor: ascending(values) for factor, values in sweep.factors.items() if factor != inner}
    if math.prod(map(len, outer.values())) > MOST_MULTIPLES:
        return []
    panels = []
    for values in product(*outer.values()):
        chosen = dict(zip(outer, values, strict=True))
        groups = {
            label: [member for member in members if chosen.items() <= member.factors.items()]
            for label, members in levels(sweep, inner).items()
        }
        title = " · ".join(sweep.say(*item) for item in chosen.items())
        panels += [replace(panel, title=clip(title)) for panel in over_time(sweep, groups, metric)]
    return with_one_range(panels)


def with_one_range(panels: Sequence[Panel]) -> list[Panel]:
    ranges = [panel.y_range for panel in panels if panel.y_range is not None]
    if not ranges:
        return []
    whole = min(low for low, _ in ranges), max(high for _, high in ranges)
    return [replace(panel, y_range=whole) for panel in panels]


def swept_numbers(sweep: SweepRuns) -> list[str]:
    """The factors whose levels are numbers, three or more."""
    return [
        factor
        for factor, values in sweep.factors.items()
        if len(values) >= FEWEST_NUMBERS and all(as_number(value) is not None for value in values)
    ]


def responses(values: Values, factor: str) -> list[Panel]:
    """Each headline metric by the values of a swept number, one curve per combination of the other factors.

    Levels stand at equal distances: they are seldom chosen on a linear scale.
    """
    sweep = values.sweep
    swept = ascending(sweep.factors[factor])
    others = dict.fromkeys(rest(member, factor) for member in sweep.counted)
    merged = len(others) > MOST_CURVES
    groups = {(): list(sweep.counted)} if merged else {
        other: [member for member in sweep.counted if rest(member, factor) == other] for other in others
    }  # fmt: skip
    names = [key for key in sweep.factors if key != factor]
    panels = []
    for metric in values.headline[:MOST_PANELS]:
        curves = []
        for k, (other, members) in enumerate(groups.items()):
            label = " · ".join(sweep.say(*item) for item in zip(names, other, strict=not merged)) or "mean over seeds"
            means = [
                mean_by_seed(values, [m for m in members if m.factors[factor] == level], metric) for level in swept
            ]
            if not any(mean.num for mean in means):
                continue
            curves.append(
                Curve(
                    x=np.arange(len(swept), dtype=np.float64) + 0.06 * (k - (len(groups) - 1) / 2),
                    y=np.array([mean.value for mean in means]),
                    ci=np.array([mean.half_width if mean.num > 1 else 0.0 for mean in means]),
                    label="mean over all else" if merged else clip(label),
                    colour=ANY[k % len(ANY)],
                    kind="held_out",
                    marker=MARKERS[k % len(MARKERS)],
                )
            )
        if curves:
            panels.append(
                Panel(
                    title=title_of(metric),
                    x_label=sweep.short_names[factor],
                    y_label="",
                    curves=curves,
                    ticks=[(float(k), level) for k, level in enumerate(swept)],
                    has_legend=False,
                )
            )
    return panels


def rest(member: Member, factor: str) -> tuple[str, ...]:
    return tuple(value for key, value in member.factors.items() if key != factor)


def mean_by_seed(values: Values, members: Sequence[Member], metric: Metric) -> Mean:
    by_seed: dict[tuple[str, ...], list[float]] = {}
    for member in members:
        if math.isfinite(after := values.of(member, metric).after):
            by_seed.setdefault(member.seed, []).append(after)
    return mean_over_seeds([sum(found) / len(found) for found in by_seed.values()])
