"""Fronts of several methods, what they enclose, how long they took, and how far a policy obeys."""

import re
from dataclasses import replace
from itertools import combinations

import numpy as np

from rlhf_lab.report.canvas import Curve, Panel
from rlhf_lab.report.generalisation_plots import lasts
from rlhf_lab.report.plots import ANY, MARKERS, panel
from rlhf_lab.report.run import Run

_POINT = re.compile(r"pareto/([^/]+)/([^/]+)/((?:gold|rewards)/[^/]+)/mean")
_APART = 0.2


def fronts(run: Run) -> list[Panel]:
    """Of the first split: every pair of objectives, then hypervolumes, hours, and control where a policy is told."""
    found = [match.groups() for match in map(_POINT.fullmatch, run.names) if match]
    if not found:
        return []
    split = found[0][0]
    methods, objectives = (list(dict.fromkeys(each[k] for each in found if each[0] == split)) for k in (1, 2))
    panels = []
    for first, second in combinations(objectives, 2):
        curves = [
            curve
            for k, method in enumerate(methods)
            for curve in _front(run, f"pareto/{split}/{method}", method, (first, second), k, len(objectives))
        ]
        panels += panel(run, f"Fronts on {split}", _said(second), curves, x_label=_said(first))
    volume = [f"pareto/{split}/{method}/hypervolume" for method in methods]
    panels += _by_method(run, "Hypervolume", "", methods, {"": volume})
    took = {
        what: [f"pareto/{method}/{key}" for method in methods]
        for what, key in (("these runs", "hours"), ("and all they need", "with_needs/hours"))
    }
    panels += _by_method(run, "Hours on the clock", "hours", methods, took)
    return panels + _control(run, split, methods)


def _front(run: Run, prefix: str, method: str, objectives: tuple[str, str], k: int, num_objectives: int) -> list[Curve]:
    """Markers of all points of a method; of two objectives a thin line through its front."""
    x, y = (run.series(f"{prefix}/{name}/mean").value for name in objectives)
    x_ci, y_ci = (run.series(f"{prefix}/{name}/ci95").value for name in objectives)
    colour, marker = ANY[k % len(ANY)], MARKERS[k % len(MARKERS)]
    markers = Curve(x=x, y=y, x_ci=x_ci, ci=y_ci, label=method, colour=colour, kind="estimates", marker=marker)
    best = np.flatnonzero(run.series(f"{prefix}/on_front").value == 1)
    best = best[np.argsort(x[best])]
    line = Curve(x=x[best], y=y[best], label=f"{method}, front", colour=colour, kind="thread")
    return [line, markers] if num_objectives == 2 else [markers]


def _by_method(run: Run, title: str, unit: str, methods: list[str], named: dict[str, list[str]]) -> list[Panel]:
    """A number of each method, with its interval if it has one; several kinds of it side by side."""
    curves = []
    for k, (label, names) in enumerate(named.items()):
        values, reach = lasts(run, names)
        places = [place + _APART * (k - (len(named) - 1) / 2) for place in range(len(methods))]
        curves.append(
            Curve(
                x=np.array(places),
                y=values,
                ci=reach if label == "" else None,
                label=label,
                colour=ANY[k % len(ANY)],
                kind="estimates",
                marker=MARKERS[k % len(MARKERS)],
            )
        )
    ticks = list(enumerate(methods))
    x_range = (-0.6, len(methods) - 0.4)
    return [replace(each, x_label="", ticks=ticks, x_range=x_range) for each in panel(run, title, unit, curves)]


def _control(run: Run, split: str, methods: list[str]) -> list[Panel]:
    panels = []
    for method in methods:
        told = run.streams(f"pareto/{split}/{method}/told/<name>/correlation/mean")
        whats = ("correlation", "slope", "order")
        said = [lasts(run, [f"pareto/{split}/{method}/told/{name}/{what}" for what in whats]) for name in told]
        curves = [
            Curve(
                x=np.array([place + _APART * (k - (len(told) - 1) / 2) for place in range(len(whats))]),
                y=said[k][0],
                ci=said[k][1],
                label=name,
                colour=ANY[k % len(ANY)],
                kind="estimates",
                marker=MARKERS[k % len(MARKERS)],
            )
            for k, name in enumerate(told)
        ]
        ends = np.array([-0.6, len(whats) - 0.4])
        curves.append(Curve(x=ends, y=np.ones(2), label="as asked", colour="muted", kind="limit"))
        for drawn in panel(run, f"{method}: asked and obtained", "", curves):
            panels.append(replace(drawn, x_label="", ticks=list(enumerate(whats)), x_range=(ends[0], ends[1])))
    return panels


def _said(objective: str) -> str:
    kind, _, name = objective.partition("/")
    return f"gold {name}" if kind == "gold" else f"proxy {name}"
