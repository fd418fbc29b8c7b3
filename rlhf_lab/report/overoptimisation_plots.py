"""Gold and proxy of many runs against their distance from the reference: a panel per reward, and one of all."""

import math
from dataclasses import replace

import numpy as np

from rlhf_lab.report.best_of_n_plots import called
from rlhf_lab.report.canvas import Array, Curve, Kind, Panel
from rlhf_lab.report.plots import ANY, MARKERS, panel
from rlhf_lab.report.run import Run

PLACE = "overoptimisation"
DISTANCE = "√KL to the reference (√nats)"


def at_equal_kl(run: Run) -> list[Panel]:
    """Gold and proxy of each group; gold of all, with best of n; differences to the baseline.

    Source: the axes of Gao et al. 2022, arXiv:2210.10760; one figure per reward as in Coste et al. 2024,
    arXiv:2310.02743.
    """
    groups = run.streams(f"{PLACE}/<name>/gold/mean")
    chosen = run.streams(f"{PLACE}/best_of_n/<name>/gold/mean")
    panels = []
    for group in groups:
        curves = [
            _line(run, f"{group}/gold", "gold", "amber", "band", "o"),
            _line(run, f"{group}/proxy", "proxy", "blue", "band", "s"),
        ]
        panels += _framed(panel(run, group, "gain since the start", curves, DISTANCE))
    every = [
        _line(run, f"{group}/gold", group, ANY[k % len(ANY)], "band", MARKERS[k % len(MARKERS)])
        for k, group in enumerate(groups)
    ]
    every += [
        _line(run, f"best_of_n/{name}/gold", f"best of n, {called(name)}", colour, "limit")
        for name, colour in zip(chosen, ("slate", "rust", "olive", "purple"), strict=False)
    ]
    panels += _framed(panel(run, "Gold of every reward", "gain since the start", every, DISTANCE))
    over = [
        _line(run, f"{group}/over_baseline", group, look, "band", marker)
        for group, look, marker in zip(groups, ANY * len(groups), MARKERS * len(groups), strict=False)
        if run.series(f"{PLACE}/{group}/over_baseline/mean").exists
    ]
    if over:
        x = over[0].x
        over.append(Curve(x=x, y=0 * x, label="the baseline", colour="slate", kind="limit"))
    return panels + _framed(panel(run, "Gold beside the baseline", "difference at equal KL", over, DISTANCE))


def _framed(panels: list[Panel]) -> list[Panel]:
    """The same, as high as the lines and half as much again: intervals over few seeds are many times as wide."""
    framed = []
    for content in panels:
        values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in content.curves])
        room = 0.5 * max(float(np.ptp(values)), 0.2)
        framed.append(replace(content, y_range=(float(values.min()) - room, float(values.max()) + room)))
    return framed


def _line(run: Run, name: str, label: str, colour: str, kind: Kind, marker: str = "o") -> Curve:
    """A metric against sqrt(KL); one that was never logged has no points."""
    series, farness = run.series(f"{PLACE}/{name}/mean"), run.series(f"{PLACE}/sqrt_kl")
    half_widths = run.series(f"{PLACE}/{name}/ci95")
    ci = [half_widths.at(int(step)) if half_widths.exists else math.nan for step in series.step]
    x: Array = np.array([farness.at(int(step)) for step in series.step])
    return Curve(x=x, y=series.value, ci=np.array(ci), label=label, colour=colour, kind=kind, marker=marker)
