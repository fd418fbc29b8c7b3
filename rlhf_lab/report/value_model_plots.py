"""How right value models are, how sure, and what they score: of a run of `stage=evaluate_scorers`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_lab.report.canvas import Array, Curve, Panel
from rlhf_lab.report.plots import ANY, MARKERS, panel
from rlhf_lab.report.run import Run

APART = 0.14  # between markers of one tick, in ticks


def value_models(run: Run) -> list[Panel]:
    """Accuracy of every source on every split; then of each source calibration, accuracy by margin, and its scores."""
    if not run.value_models:
        return []
    panels = accuracies(run)
    for name, by_split in run.value_models.items():
        panels += calibration(run, name, by_split) + by_margin(run, name, by_split) + scores(run, name, by_split)
    return panels


def beside(places: int, k: int, of: int) -> Array:
    """(places,) positions around whole numbers, so that the k-th of several series does not hide the others."""
    return np.arange(places, dtype=np.float64) + (k - (of - 1) / 2) * APART


def named(split: str) -> str:
    """A split on an axis: its words under each other."""
    return split.replace("_", "\n")


def accuracies(run: Run) -> list[Panel]:
    """Pairwise accuracy, a marker for each split and source; half is a coin."""
    if not run.value_models:
        return []
    splits = ordered(run, next(iter(run.value_models.values())))
    curves = []
    for k, name in enumerate(run.value_models):
        found = [
            {end: value(run, split, name, f"accuracy/{end}") for end in ("mean", "low", "high")} for split in splits
        ]
        curves.append(
            Curve(
                x=beside(len(splits), k, len(run.value_models)),
                y=np.array([each["mean"] for each in found]),
                ci=reach(found, "mean"),
                label=name,
                colour=ANY[k % len(ANY)],
                kind="estimates",
                marker=MARKERS[k % len(MARKERS)],
            )
        )
    ends = np.array([-0.4, len(splits) - 0.6])
    curves.append(Curve(x=ends, y=0 * ends + 0.5, label="a coin", colour="muted", kind="limit"))
    ticks = [(float(k), named(split)) for k, split in enumerate(splits)]
    return [Panel(title="Pairs ranked right", x_label="", y_label="share", curves=curves, ticks=ticks)]


def calibration(run: Run, name: str, by_split: Mapping[str, Any]) -> list[Panel]:
    """Observed against predicted frequencies: of the likelier response winning, and of responses being unsafe."""
    shown = (
        ("reliability", "P(preferred)", "how sure it is", "how often it is right", 0.5),
        ("unsafe_reliability", "P(unsafe)", "predicted share unsafe", "observed share", 0.0),
    )
    panels = []
    for key, of_what, x_label, y_label, start in shown:
        curves = [
            joined(k, split, by_split[split][key], "predicted", "observed")
            for k, split in enumerate(ordered(run, by_split))
            if by_split[split].get(key)
        ]
        if curves:
            ends = np.array([start, 1.0])
            curves.append(Curve(x=ends, y=ends, label="calibrated", colour="muted", kind="limit"))
            drawn = panel(run, f"{name.capitalize()}: {of_what}", y_label, curves, x_label=x_label)
            panels += [replace(each, y_range=(_floor(curves, start), 1.03), legend_below=True) for each in drawn]
    return panels


def by_margin(run: Run, name: str, by_split: Mapping[str, Any]) -> list[Panel]:
    """Accuracy on pairs of about as large a margin."""
    curves = [
        joined(k, split, by_split[split]["accuracy_by_margin"], "margin", "value")
        for k, split in enumerate(ordered(run, by_split))
        if by_split[split]["accuracy_by_margin"]
    ]
    drawn = panel(run, f"{name.capitalize()}: by margin", "pairs ranked right", curves, x_label="margin of the pair")
    return [replace(each, y_range=(_floor(curves, 0.4), 1.03), legend_below=True) for each in drawn]


def _floor(curves: Sequence[Curve], usual: float) -> float:
    """Where the axis of a share begins: where it usually does, or below the lowest interval."""
    lows = (curve.y if curve.ci is None else curve.y - curve.ci[0] for curve in curves)
    return min(usual, *(float(low.min()) - 0.03 for low in lows))


def scores(run: Run, name: str, by_split: Mapping[str, Any]) -> list[Panel]:
    """The scores of the first split, by what the data say of the responses."""
    split = ordered(run, by_split)[0]
    drawn = by_split[split]["histogram"]
    x = np.repeat(np.array(drawn["edges"]), 2)[1:-1]
    colours = {"safe": "teal", "unsafe": "red", "preferred": "teal", "other": "slate"}
    curves = [
        Curve(
            x=x,
            y=np.repeat(np.array(counts) / max(sum(counts), 1), 2),
            label=label,
            colour=colours[label],
            kind="state",
        )
        for label, counts in drawn["counts"].items()
    ]
    return panel(run, f"{name.capitalize()}: scores, {split}", "share of responses", curves, x_label="score")


def joined(k: int, split: str, points: Sequence[Mapping[str, float]], x: str, y: str) -> Curve:
    """The k-th split's points, in their order, with their intervals."""
    return Curve(
        x=np.array([point[x] for point in points]),
        y=np.array([point[y] for point in points]),
        ci=reach(points, y),
        label=split,
        colour=ANY[k % len(ANY)],
        kind="held_out",
        marker=MARKERS[k % len(MARKERS)],
    )


def reach(points: Sequence[Mapping[str, float]], y: str) -> Array:
    """(2, n): how far each interval goes below and above its point."""
    return np.array([[max(p[y] - p["low"], 0.0), max(p["high"] - p[y], 0.0)] for p in points]).T


def ordered(run: Run, by_split: Mapping[str, Any]) -> list[str]:
    return [split for split in run.splits if split in by_split]


def value(run: Run, split: str, name: str, metric: str) -> float:
    found = run.series(f"eval/{split}/value_model/{name}/{metric}").value
    return float(found[-1]) if len(found) else float("nan")
