"""How the figures of a sweep are drawn, light or dark, or told in words."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_lab.report.canvas import Array, Panel, Theme, draw, encode, style
from rlhf_lab.report.comparison import Mean
from rlhf_lab.report.plots import ANY
from rlhf_lab.report.summary import number, short

ROW = 0.3  # inches of a row of a forest or a heat map
CHARACTER = 0.072  # inches of a character of a label
PANEL_WIDTH, PANEL_HEIGHT = 4.3, 2.85
MOST_COLUMNS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Forest:
    """One metric, row by row: the mean with its interval, each seed, and where it began.

    Fields:
        rows: label, mean, value of each seed.
        before: mean of all rows at their first evaluation, NaN if there was none.
        limit: NaN if there is none.
    """

    title: str
    rows: Sequence[tuple[str, Mean, Sequence[float]]]
    before: float
    limit: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Heat:
    """One metric over two factors.

    Fields:
        values: (rows, columns), NaN where there is no run.
    """

    title: str
    row_factor: str
    column_factor: str
    row_names: Sequence[str]
    column_names: Sequence[str]
    values: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Parallel:
    """Axes side by side, one line across them for each combination.

    Fields:
        axes: name -> names of its positions, in order; none for an axis of numbers.
        lines: (combinations, axes): the position, or the number.
        coloured_by: the axis whose value colours the lines.
    """

    axes: Mapping[str, Sequence[str]]
    lines: Array
    coloured_by: int


def panels_png(panels: Sequence[Panel], theme: Theme, dpi: int) -> bytes:
    """Panels side by side under one legend, which stands for all of them."""
    columns = min(len(panels), 2 if len(panels) in (2, 4) else MOST_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    panel_width = 6.4 if columns == 1 else PANEL_WIDTH
    width = panel_width * columns
    labels = dict.fromkeys(curve.label for panel in panels for curve in panel.curves if curve.label)
    per_row = max(1, int((width - 0.6) / (CHARACTER * max(map(len, labels), default=1) + 0.6)))
    strip = 0.22 * math.ceil(len(labels) / per_row) + 0.16
    height = PANEL_HEIGHT * rows + strip
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(width, height), dpi=dpi)
        handles = {}
        for k, panel in enumerate(panels):
            row, column = divmod(k, columns)
            left, bottom = column * panel_width + 0.62, height - strip - (row + 1) * PANEL_HEIGHT + 0.52
            box = (left / width, bottom / height, (panel_width - 0.77) / width, (PANEL_HEIGHT - 0.85) / height)
            axes = figure.add_axes(box)
            draw(axes, panel, theme)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(), handles.keys(), loc="upper left", ncols=per_row, borderaxespad=0.1, columnspacing=1.4,
            bbox_to_anchor=(0.3 / width, 1 - 0.04 / height), borderpad=0.2, labelspacing=0.3,
        )  # fmt: skip
        return encode(figure)


def forests_png(forests: Sequence[Forest], theme: Theme, dpi: int) -> bytes:
    """Forests side by side, whose rows are the same."""
    names = [label for label, _, _ in forests[0].rows]
    margin = 0.25 + CHARACTER * max(map(len, names))
    each = 2.7 if len(forests) > 2 else 3.4
    width, height = margin + each * len(forests) + 0.1, ROW * len(names) + 0.85
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(width, height), dpi=dpi)
        for k, forest in enumerate(forests):
            box = ((margin + k * each) / width, 0.4 / height, (each - 0.3) / width, ROW * len(names) / height)
            axes = figure.add_axes(box)
            draw_forest(axes, forest, theme)
            axes.set_yticks(range(len(names)), names if k == 0 else [""] * len(names))
            axes.set_ylim(len(names) - 0.5, -0.5)
        return encode(figure)


def draw_forest(axes: Axes, forest: Forest, theme: Theme) -> None:
    for place, (_, mean, seeds) in enumerate(forest.rows):
        colour = theme[ANY[place % len(ANY)]]
        axes.plot(
            seeds,
            np.full(len(seeds), place),
            linestyle="none",
            marker="|",
            markersize=9,
            color=colour,
            alpha=0.6 if len(seeds) <= 12 else 0.3,
        )
        width = mean.half_width if math.isfinite(mean.half_width) else 0.0
        axes.errorbar(mean.value, place, xerr=width, color=colour, marker="o", markersize=5, elinewidth=1.6, capsize=3)
    if math.isfinite(forest.before):
        axes.axvline(forest.before, color=theme["muted"], linewidth=1, linestyle=":")
    if math.isfinite(forest.limit):
        axes.axvline(forest.limit, color=theme["red"], linewidth=1.2, linestyle=(0, (5, 3)))
    centre = [value for _, mean, seeds in forest.rows for value in (mean.value, *seeds) if math.isfinite(value)]
    marks = [value for value in (forest.before, forest.limit) if math.isfinite(value)]
    low, high = min([*centre, *marks]), max([*centre, *marks])
    room = 0.5 * (high - low) or 0.1
    reach = [(mean.low, mean.high) for _, mean, _ in forest.rows if math.isfinite(mean.half_width)]
    left = max(low - room, min([low, *(pair[0] for pair in reach)]) - 0.06 * room)
    right = min(high + room, max([high, *(pair[1] for pair in reach)]) + 0.06 * room)
    axes.set_xlim(left - 0.04 * (right - left), right + 0.04 * (right - left))
    axes.set_title(forest.title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(axis="y", length=0)


def forests_in_words(forests: Sequence[Forest]) -> str:
    said = []
    for forest in forests:
        rows = "; ".join(f"{label} {number(mean.value)}" for label, mean, _ in forest.rows if mean.num)
        limit = f"; limit {short(forest.limit)}" if math.isfinite(forest.limit) else ""
        said.append(f"{forest.title}: {rows}{limit}.")
    return " ".join(said)


def colours(theme: Theme) -> Colormap:
    """From low to high, of equal steps to the eye on either paper."""
    return LinearSegmentedColormap.from_list("report", [theme["purple"], theme["blue"], theme["teal"], theme["amber"]])


def heats_png(heats: Sequence[Heat], theme: Theme, dpi: int) -> bytes:
    columns = min(len(heats), MOST_COLUMNS)
    rows = math.ceil(len(heats) / columns)
    margin = 0.55 + CHARACTER * max(map(len, heats[0].row_names))
    cell = max(0.62, 0.1 + CHARACTER * max(map(len, heats[0].column_names)))
    each_width = margin + cell * len(heats[0].column_names) + 0.2
    each_height = ROW * len(heats[0].row_names) + 0.95
    width, height = max(each_width * columns, 3.6), each_height * rows
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(width, height), dpi=dpi)
        for k, heat in enumerate(heats):
            row, column = divmod(k, columns)
            left, bottom = column * each_width + margin, height - (row + 1) * each_height + 0.55
            size = (cell * len(heat.column_names) / width, ROW * len(heat.row_names) / height)
            draw_heat(figure.add_axes((left / width, bottom / height, *size)), heat, theme)
        return encode(figure)


def draw_heat(axes: Axes, heat: Heat, theme: Theme) -> None:
    axes.grid(visible=False)
    finite = heat.values[np.isfinite(heat.values)]
    scale = Normalize(float(finite.min()), float(finite.max()) if finite.max() > finite.min() else finite.min() + 1)
    shades = colours(theme)
    axes.imshow(heat.values, cmap=shades, norm=scale, aspect="auto", alpha=0.55)
    for (row, column), value in np.ndenumerate(heat.values):
        text = number(float(value)) if math.isfinite(value) else "\N{EM DASH}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=theme["ink"])
    axes.set_xticks(range(len(heat.column_names)), heat.column_names)
    axes.set_yticks(range(len(heat.row_names)), heat.row_names)
    axes.set_title(heat.title)
    axes.set_xlabel(heat.column_factor)
    axes.set_ylabel(heat.row_factor)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def heats_in_words(heats: Sequence[Heat]) -> str:
    said = []
    for heat in heats:
        cells = {
            (row, column): float(heat.values[i, j])
            for i, row in enumerate(heat.row_names)
            for j, column in enumerate(heat.column_names)
            if math.isfinite(heat.values[i, j])
        }
        ends = [
            f"{word} {number(cells[at])} at {heat.row_factor} {at[0]}, {heat.column_factor} {at[1]}"
            for word, at in (
                ("highest", max(cells, key=cells.__getitem__)),
                ("lowest", min(cells, key=cells.__getitem__)),
            )
        ]
        said.append(f"{heat.title} by {heat.row_factor} and {heat.column_factor}: {'; '.join(ends)}.")
    return " ".join(said)


def parallel_png(chart: Parallel, theme: Theme, dpi: int) -> bytes:
    names = list(chart.axes)
    width, height = max(6.4, 1.75 * len(names)), 4.1
    lows, highs = np.nanmin(chart.lines, axis=0), np.nanmax(chart.lines, axis=0)
    spans = np.where(highs > lows, highs - lows, 1.0)
    heights = np.where(highs > lows, (chart.lines - lows) / spans, 0.5)
    shades = colours(theme)
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(width, height), dpi=dpi)
        axes = figure.add_axes((0.8 / width, 0.3 / height, 1 - 1.8 / width, 1 - 1.05 / height))
        axes.set_axis_off()
        axes.set_xlim(0, len(names) - 1)
        axes.set_ylim(-0.04, 1.04)
        shift = np.linspace(-0.02, 0.02, len(heights)) if len(heights) > 1 else np.zeros(1)
        named = np.array([bool(positions) for positions in chart.axes.values()])
        for line, nudge in zip(heights, shift, strict=True):
            colour = shades(line[chart.coloured_by]) if math.isfinite(line[chart.coloured_by]) else theme["muted"]
            # lines that share a level are set apart a little
            axes.plot(range(len(names)), line + np.where(named, nudge, 0.0), color=colour, linewidth=1.3, alpha=0.75)
        for k, (name, positions) in enumerate(chart.axes.items()):
            axes.axvline(k, color=theme["muted"], linewidth=1)
            axes.text(
                k,
                1.08,
                textwrap.fill(name, 18),
                ha="center",
                va="bottom",
                fontsize=9,
                fontweight="bold",
                color=theme["ink"],
            )
            marks = dict(enumerate(positions)) or {lows[k]: number(lows[k]), highs[k]: number(highs[k])}
            for value, text in marks.items():
                at = (value - lows[k]) / spans[k] if highs[k] > lows[k] else 0.5
                axes.text(
                    k, at, f" {text}", fontsize=8, color=theme["ink"], va="center", clip_on=False,
                    bbox={"facecolor": theme["paper"], "edgecolor": "none", "alpha": 0.7, "pad": 0.6},
                )  # fmt: skip
        return encode(figure)


def parallel_in_words(chart: Parallel) -> str:
    name = list(chart.axes)[chart.coloured_by]
    best = chart.lines[int(np.nanargmax(chart.lines[:, chart.coloured_by]))]
    settings = ", ".join(
        f"{axis} {positions[int(best[k])]}" for k, (axis, positions) in enumerate(chart.axes.items()) if positions
    )
    return f"{len(chart.lines)} combinations across {', '.join(chart.axes)}. The highest {name} is at {settings}."
