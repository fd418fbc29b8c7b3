"""Panels of curves, plain data, and how they are drawn, light or dark, or told in words."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

Array = NDArray[np.float64]
Theme = Mapping[str, str]
Kind = Literal["train", "state", "points", "held_out", "estimates", "limit", "gap", "span", "band", "thread", "cells"]

LIGHT: Theme = {
    "paper": "#ffffff",
    "ink": "#23272e",
    "muted": "#6a717c",
    "grid": "#e6e8ec",
    "blue": "#2f6db3",
    "teal": "#1f8a7d",
    "purple": "#7a57a8",
    "slate": "#6b7c93",
    "amber": "#c27c0e",
    "rust": "#a8532a",
    "olive": "#7d7a1c",
    "red": "#bf3b3b",
}
DARK: Theme = {
    "paper": "#191c21",
    "ink": "#e4e6ea",
    "muted": "#9aa2ae",
    "grid": "#2d323a",
    "blue": "#6fa8e6",
    "teal": "#53c2b2",
    "purple": "#b394e0",
    "slate": "#9fb0c7",
    "amber": "#eab04a",
    "rust": "#e08a5c",
    "olive": "#c2be55",
    "red": "#f07575",
}

SMOOTHED_FROM = 30  # points; fewer are drawn as they are


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One thing to draw, as data.

    Args:
        x, y: (n,) the points; NaN breaks a line.
        label: in the legend and in the text that stands for the picture.
        colour: a key of a `Theme`.
        kind: "train", a line, smoothed over a thin one; "state", a line as it is; "points", unjoined;
            "held_out", joined markers with intervals; "estimates", unjoined ones; "limit", dashed; "gap", upright
            strokes from `y` to `to`; "span", shade where `y` is above 0; "band", a line in the shade of its intervals;
            "thread", a thin line without a name, which stands behind such a line; "cells", squares of side 1.
        ci: (n,) half widths of 95% intervals in units of y, or none; of markers also (2, n), downwards and upwards.
        to: (n,) where the strokes of a gap end.
        marker: of the points of "held_out".
        shade: (n,) from 0 to 1, how full the colour of cells is.
        texts: what is written on cells, and in the text that stands for the picture.
    """

    x: Array
    y: Array
    label: str
    colour: str
    kind: Kind = "train"
    ci: Array | None = None
    x_ci: Array | None = None
    to: Array | None = None
    marker: str = "o"
    shade: Array | None = None
    texts: Sequence[str] = ()


LEGEND_BELOW = 0.42  # inches


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One pair of axes and what is on them.

    Args:
        ticks, y_ticks: positions on x, on y, and what they are called; none for a scale of numbers.
        x_range, y_range: lowest and highest value shown; None shows all of every curve.
        has_legend: False where one legend stands for several panels.
        legend_below: under the axes, where curves leave no room for it.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    ticks: Sequence[tuple[float, str]] = ()
    y_ticks: Sequence[tuple[float, str]] = ()
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    has_legend: bool = True
    legend_below: bool = False


def png(panels: Sequence[Panel], theme: Theme, dpi: int) -> bytes:
    """Draw the panels side by side, at most three in a row, as a PNG image.

    Args:
        panels: at least one.
        theme: colour names -> hex.
        dpi: pixels per inch; a panel is 4.3 by 3 inches, a lone one 5.6 wide.
    """
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    width, height = (5.6 if columns == 1 else 4.3) * columns, 3.0 * rows
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(width, height), dpi=dpi)
        # margins in inches, set by hand: constrained layout measures every text and doubles the time to draw
        for k, content in enumerate(panels):
            row, column = divmod(k, columns)
            left, bottom = column * width / columns + 0.72, height - (row + 1) * 3.0 + 0.55
            axes_width, axes_height = width / columns - 0.87, 2.05
            if content.legend_below:
                bottom, axes_height = bottom + LEGEND_BELOW, axes_height - LEGEND_BELOW
            box = (left / width, bottom / height, axes_width / width, axes_height / height)
            draw(figure.add_axes(box), content, theme)
        return encode(figure)


def encode(figure: Figure) -> bytes:
    """Draw a figure as a PNG image; within the `rc_context` of its theme."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # a palette: a third of the bytes, twice per figure in every page
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE)
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def style(theme: Theme) -> "dict[RcKeyType, Any]":
    return {
        "figure.facecolor": theme["paper"],
        "axes.facecolor": theme["paper"],
        "savefig.facecolor": theme["paper"],
        "axes.edgecolor": theme["muted"],
        "axes.labelcolor": theme["muted"],
        "axes.titlecolor": theme["ink"],
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": theme["grid"],
        "grid.linewidth": 0.8,
        "text.color": theme["ink"],
        "xtick.color": theme["muted"],
        "ytick.color": theme["muted"],
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "legend.frameon": True,
        "legend.framealpha": 0.75,
        "legend.edgecolor": "none",
        "legend.facecolor": theme["paper"],
        "lines.solid_capstyle": "round",
        "text.parse_math": False,  # names are not formulas: a $ in one must not be parsed
    }


def draw(axes: Axes, content: Panel, theme: Theme) -> None:
    for curve in content.curves:
        draw_curve(axes, curve, theme[curve.colour])
    axes.set_title(content.title)
    axes.set_xlabel(content.x_label)
    axes.set_ylabel(content.y_label)
    # room for the legend, and for the names at either end
    axes.margins(x=0.12 if content.ticks else 0.02, y=0.12 if len(content.curves) < 4 else 0.25)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        # plain labels: an exponent in the corner would sit on the title
        axis.set_major_formatter(tick_label)
    if content.ticks:
        places, names = zip(*content.ticks, strict=True)
        axes.set_xticks(places, names)
    if content.y_ticks:
        places, names = zip(*content.y_ticks, strict=True)
        if len(names) < 4:
            axes.set_yticks(places, names, rotation=90, va="center")  # along the cells: the margin is narrow
        else:
            axes.set_yticks(places, names, fontsize=6.5)  # cells too low for that
    if content.x_range is not None:
        axes.set_xlim(*content.x_range)
    if content.y_range is not None:
        axes.set_ylim(*content.y_range)
    if cells := [curve for curve in content.curves if curve.kind == "cells"]:
        for limits, each in ((axes.set_xlim, [curve.x for curve in cells]), (axes.set_ylim, [c.y for c in cells])):
            limits(np.concatenate(each).min() - 0.5, np.concatenate(each).max() + 0.5)
    if content.has_legend and len(content.curves) > 1:
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.48, -0.27), "ncols": 3, "fontsize": 8}
        below |= {"columnspacing": 0.8, "handlelength": 1.3, "handletextpad": 0.5}
        axes.legend(**(below if content.legend_below else {}))


def tick_label(value: float, _position: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    x, y, label = curve.x, curve.y, curve.label
    match curve.kind:
        case "train" if len(y) >= SMOOTHED_FROM:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(x, rolling_mean(y, len(y) // 30), color=colour, linewidth=1.8, label=label)
        case "train" | "state":
            axes.plot(x, y, color=colour, linewidth=1.8, label=label, marker="." if len(y) < 8 else None)
        case "points":
            axes.plot(x, y, color=colour, linestyle="none", marker=".", markersize=4, alpha=0.4, label=label)
        case "held_out" | "estimates":
            axes.errorbar(
                x, y, yerr=curve.ci, xerr=curve.x_ci, color=colour, label=label, marker=curve.marker, markersize=5,
                markeredgewidth=0.8, markeredgecolor=axes.get_facecolor(),
                linestyle=(0, (4, 2)) if curve.kind == "held_out" else "none",
                linewidth=1.1, elinewidth=1.4, capsize=2.5,
            )  # fmt: skip
        case "band":
            half_widths = np.zeros_like(y) if curve.ci is None else np.nan_to_num(curve.ci)
            axes.fill_between(x, y - half_widths, y + half_widths, color=colour, alpha=0.1, linewidth=0)
            axes.plot(x, y, color=colour, linewidth=1.8, label=label, marker=curve.marker if len(y) < 12 else None,
                markersize=4)  # fmt: skip
        case "thread":
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.4)
        case "limit":
            axes.plot(x, y, color=colour, linewidth=1.4, linestyle=(0, (5, 3)), label=label)
        case "gap":
            axes.vlines(x, y, y if curve.to is None else curve.to, color=colour, linewidth=1.0, alpha=0.7, label=label)
        case "cells":
            shades = np.zeros_like(y) if curve.shade is None else curve.shade
            for left, bottom, shade, text in zip(x - 0.5, y - 0.5, shades, curve.texts, strict=True):
                axes.add_patch(Rectangle((left, bottom), 1, 1, facecolor=colour, alpha=shade, linewidth=0))
                axes.text(left + 0.5, bottom + 0.5, text, ha="center", va="center", fontsize=8.5)
            axes.grid(visible=False)
        case "span":
            axes.fill_between(
                x, 0, 1, where=(y > 0).tolist(), transform=axes.get_xaxis_transform(), color=colour, alpha=0.15,
                linewidth=0, label=label,
            )  # fmt: skip


def rolling_mean(values: Array, radius: int) -> Array:
    """Mean of the finite neighbours up to `radius` points away; NaN stays where it was.

    The radius shrinks towards the ends, so that a trend is not bent there and the ends are the values themselves.
    """
    reach = np.minimum(radius, np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]))
    windows = (values[max(k - r, 0) : k + r + 1] for k, r in enumerate(reach))
    return np.array(
        [
            window[np.isfinite(window)].mean() if math.isfinite(value) else math.nan
            for value, window in zip(values, windows, strict=True)
        ]
    )


def in_words(panels: Sequence[Panel]) -> str:
    """What stands for the picture when it is not seen: each curve's first and last value."""
    return " ".join(
        f"{content.title}: {'; '.join(curve_in_words(curve) for curve in content.curves if curve.kind != 'thread')}."
        for content in panels
    )


def curve_in_words(curve: Curve) -> str:
    if curve.kind == "cells":
        return f"{curve.label} {', '.join(text.replace(chr(10), ' ') for text in curve.texts)}"
    finite = curve.y[np.isfinite(curve.y)]
    if curve.kind == "span":
        return f"{curve.label} at {int((finite > 0).sum())} of {len(finite)} points"
    if curve.kind == "gap" and curve.to is not None:
        return f"{curve.label} {(curve.to - curve.y)[-1]:.3g} at the end"
    return f"{curve.label} from {finite[0]:.3g} to {finite[-1]:.3g}"
