"""The figures of a sweep's page: which are drawn for what varies in it, and how to read them."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from rlhf_lab.report.canvas import Panel, Theme, in_words
from rlhf_lab.report.comparison import mean_over_seeds
from rlhf_lab.report.sweep_canvas import (
    Forest,
    Heat,
    Parallel,
    forests_in_words,
    forests_png,
    heats_in_words,
    heats_png,
    panels_png,
    parallel_in_words,
    parallel_png,
)
from rlhf_lab.report.sweep_plots import (
    MOST_CURVES,
    MOST_PANELS,
    Groups,
    ascending,
    clip,
    combinations,
    levels,
    mean_by_seed,
    multiples,
    over_time,
    responses,
    swept_numbers,
    title_of,
    trained_metrics,
)
from rlhf_lab.report.sweep_runs import SweepRuns
from rlhf_lab.report.sweep_values import Metric, Values

MOST_ROWS = 40  # of a forest
MOST_FORESTS = 4
FEWEST_CELLS = 6  # of a heat map that says more than the table
MOST_LEVELS = 16  # of a factor of a heat map
FEWEST_LINES = 6  # of parallel coordinates
MOST_LINES = 400
MOST_AXES = 10


@dataclass(frozen=True, kw_only=True)
class SweepFigure:
    """One figure, not yet drawn.

    Fields:
        name: of its file, without `.png`.
        alt: what stands for it when it is not seen.
        draw: theme, dots per inch -> PNG.
        num_panels: side by side or below each other; the page gives it room by these.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[Theme, int], bytes]
    num_panels: int


def figures(values: Values) -> list[SweepFigure]:
    """Those that there is something to show in, the overview first."""
    found = [*finals(values), *courses(values), *training(values)]
    for factor in swept_numbers(values.sweep):
        name = values.sweep.short_names[factor]
        found += of_panels(
            f"response_{file_name(name)}",
            f"Response to {name}",
            "Mean over seeds where runs are compared, with 95% intervals; values at equal distances, smallest first.",
            responses(values, factor),
        )
    return [*found, *heat_map(values), *coordinates(values)]


def file_name(name: str) -> str:
    return re.sub(r"\W", "_", name)


def of_panels(name: str, title: str, caption: str, panels: Sequence[Panel]) -> list[SweepFigure]:
    if not panels:
        return []
    return [
        SweepFigure(
            name=name,
            title=title,
            caption=caption,
            alt=in_words(panels),
            draw=partial(panels_png, panels),
            num_panels=len(panels),
        )
    ]


def rows_of(sweep: SweepRuns) -> Groups:
    """The combinations if they fit into one figure, else the levels of each factor."""
    groups = combinations(sweep)
    if len(groups) <= MOST_ROWS:
        return groups
    by_level = {label: members for factor in sweep.factors for label, members in levels(sweep, factor).items()}
    return by_level if len(by_level) <= MOST_ROWS else {}


def finals(values: Values) -> list[SweepFigure]:
    groups = rows_of(values.sweep)
    shown = values.headline[:MOST_FORESTS]
    groups = {
        label: members
        for label, members in groups.items()
        if any(math.isfinite(values.of(member, metric).after) for member in members for metric in shown)
    }
    forests = [forest(values, groups, metric) for metric in shown]
    forests = [one for one in forests if any(mean.num for _, mean, _ in one.rows)]
    if not forests:
        return []
    merged = (
        "" if len(combinations(values.sweep)) <= MOST_ROWS else " Each level is averaged over all else that varies."
    )
    return [
        SweepFigure(
            name="final",
            title="Where the runs end",
            caption="Dots are means over seeds with 95% t intervals, strokes are single runs, the dotted line is where "
            f"they began, red dashes are the limit. Wide intervals may be cut off by the frame.{merged}",
            alt=forests_in_words(forests),
            draw=partial(forests_png, forests),
            num_panels=3,
        )
    ]


def forest(values: Values, groups: Groups, metric: Metric) -> Forest:
    starts = [values.of(member, metric).before for members in groups.values() for member in members]
    return Forest(
        title=title_of(metric),
        rows=[
            (
                clip(label),
                mean_by_seed(values, members, metric),
                [after for member in members if math.isfinite(after := values.of(member, metric).after)],
            )
            for label, members in groups.items()
        ],
        before=mean_over_seeds(starts).value,
        limit=metric.limit,
    )


def courses(values: Values) -> list[SweepFigure]:
    """Held-out metrics over time: combinations while they are few, else small multiples and the levels of factors."""
    sweep = values.sweep
    if not values.headline or not values.headline[0].split:
        return []
    how = "Held-out means over seeds with 95% t intervals as shade, at the evaluations that all seeds have."
    groups = combinations(sweep)
    if len(groups) <= MOST_CURVES:
        panels = [panel for metric in values.headline for panel in over_time(sweep, groups, metric)]
        return of_panels("held_out", "Held-out scores over time", how, panels[:MOST_PANELS])
    found = []
    for metric in values.headline[:2]:
        name = f"held_out_{file_name(metric.key)}"
        caption = f"{how} One panel per combination of the other factors, all of one scale."
        found += of_panels(name, f"{title_of(metric)} over time", caption, multiples(sweep, metric))
    for factor, levels_of in sweep.factors.items():
        if 1 < len(levels_of) <= MOST_CURVES:
            panels = [p for m in values.headline for p in over_time(sweep, levels(sweep, factor), m)]
            found += of_panels(
                f"held_out_by_{file_name(sweep.short_names[factor])}",
                f"Held-out scores over time, by {sweep.short_names[factor]}",
                f"{how} Each level is averaged over all else that varies, within a seed first.",
                panels[:MOST_PANELS],
            )
    return found


def training(values: Values) -> list[SweepFigure]:
    sweep, groups = values.sweep, combinations(values.sweep)
    how = "Means over seeds with 95% t intervals as shade, smoothed where points are many."
    metrics = trained_metrics(sweep)
    if len(groups) <= MOST_CURVES:
        panels = [panel for metric in metrics for panel in over_time(sweep, groups, metric)]
        return of_panels("training", "Training", how, panels)
    found = []
    for factor, levels_of in sweep.factors.items():
        if 1 < len(levels_of) <= MOST_CURVES:
            panels = [panel for metric in metrics for panel in over_time(sweep, levels(sweep, factor), metric)]
            name = sweep.short_names[factor]
            caption = f"{how} Each level is averaged over all else that varies."
            found += of_panels(f"training_by_{file_name(name)}", f"Training, by {name}", caption, panels)
    return found


def heat_map(values: Values) -> list[SweepFigure]:
    """The two factors with the most levels, whatever else varies averaged over."""
    sweep = values.sweep
    fitting = [factor for factor, found in sweep.factors.items() if 1 < len(found) <= MOST_LEVELS]
    ranked = sorted(fitting, key=lambda factor: -len(sweep.factors[factor]))[:2]
    if len(ranked) < 2 or math.prod(len(sweep.factors[factor]) for factor in ranked) < FEWEST_CELLS:
        return []
    column, row = ranked
    rows, columns = ascending(sweep.factors[row]), ascending(sweep.factors[column])
    heats = []
    for metric in values.headline[:MOST_PANELS]:
        cells = [
            [
                mean_by_seed(
                    values, [m for m in sweep.counted if (m.factors[row], m.factors[column]) == (down, across)], metric
                ).value
                for across in columns
            ]
            for down in rows
        ]
        if np.isfinite(cells).any():
            heats.append(
                Heat(
                    title=title_of(metric),
                    row_factor=sweep.short_names[row],
                    column_factor=sweep.short_names[column],
                    row_names=[clip(name) for name in rows],
                    column_names=[clip(name) for name in columns],
                    values=np.array(cells),
                )
            )
    if not heats:
        return []
    others = [sweep.short_names[factor] for factor in sweep.factors if factor not in ranked]
    return [
        SweepFigure(
            name="heat",
            title=f"By {sweep.short_names[row]} and {sweep.short_names[column]}",
            caption="Means over seeds" + (f" and over {', '.join(others)}" if others else "") + "; shades are of each "
            "panel's own range and do not say what is resolved.",
            alt=heats_in_words(heats),
            draw=partial(heats_png, heats),
            num_panels=len(heats),
        )
    ]


def coordinates(values: Values) -> list[SweepFigure]:
    sweep, groups = values.sweep, combinations(values.sweep)
    factors = [factor for factor, found in sweep.factors.items() if len(found) > 1]
    metrics = values.headline[:MOST_FORESTS]
    if len(factors) < 2 or not FEWEST_LINES <= len(groups) <= MOST_LINES or len(factors) + len(metrics) > MOST_AXES:
        return []
    positions = {factor: ascending(sweep.factors[factor]) for factor in factors}
    lines = np.array(
        [
            [positions[factor].index(members[0].factors[factor]) for factor in factors]
            + [mean_by_seed(values, members, metric).value for metric in metrics]
            for members in groups.values()
        ],
        dtype=np.float64,
    )
    shown = [k for k in range(lines.shape[1]) if np.isfinite(lines[:, k]).any()]
    if len(shown) <= len(factors):
        return []
    names = [sweep.short_names[factor] for factor in factors] + [title_of(metric) for metric in metrics]
    places = [[clip(value) for value in positions[factor]] for factor in factors] + [[] for _ in metrics]
    chart = Parallel(axes={names[k]: places[k] for k in shown}, lines=lines[:, shown], coloured_by=len(factors))
    return [
        SweepFigure(
            name="coordinates",
            title="Every combination across what varies and what came of it",
            caption=f"One line per combination, a mean over seeds, coloured by {names[len(factors)].lower()}.",
            alt=parallel_in_words(chart),
            draw=partial(parallel_png, chart),
            num_panels=3,
        )
    ]
