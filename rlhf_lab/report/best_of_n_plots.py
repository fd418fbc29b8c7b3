"""Best of n by each member and each ensemble: gold, proxy, and what an ensemble is worth beside a single model."""

from dataclasses import replace
from itertools import cycle

import numpy as np

from rlhf_lab.report.canvas import Array, Curve, Panel
from rlhf_lab.report.plots import ANY, MARKERS, panel
from rlhf_lab.report.run import Run

DISTANCE = "√KL of the best of n (√nats)"


def best_of_n_ensembles(run: Run) -> list[Panel]:
    """Of every split: each gold score by selector, gold beside the single model's, and what each proxy says.

    The colours are told once, where the lines leave room. Source: the axes of Coste et al. 2024, arXiv:2310.02743,
    figure 3.
    """
    kl = run.series("best_of_n/kl")
    panels = []
    for split in run.streams("best_of_n/<name>/single/proxy/mean") if kl.exists else ():
        place = f"best_of_n/{split}"
        names = run.streams(f"{place}/<name>/gain/proxy/mean")
        members = [name for name in names if name.startswith("member_")]
        ensembles = [name for name in names if name not in ("single", "objective", *members)]
        x = np.sqrt(kl.value)
        for k, gold in enumerate(run.streams(f"{place}/single/gain/gold/<name>/mean")):
            what = f"gain/gold/{gold}"
            curves = [_thread(run, x, f"{place}/{name}/{what}") for name in members]
            curves += _lines(run, x, place, ["single", *ensembles], what)
            level = panel(run, f"Best of n on {split}: gold {gold}", "gain over one response", curves, DISTANCE)
            over = [Curve(x=x, y=0 * x, label="a single reward model", colour="slate", kind="limit")]
            over += _lines(run, x, place, ["single", *ensembles], f"over_single/gold/{gold}")[1:]
            beside = panel(run, f"Gold {gold}: beside a single model", "difference, paired", over, DISTANCE)
            panels += _mute(level) + (_mute(beside) if k else beside)
        said = [_thread(run, x, f"{place}/{name}/gain/proxy") for name in members]
        said += _lines(run, x, place, ["single", *ensembles], "gain/proxy")
        panels += _mute(panel(run, f"Best of n on {split}: proxy", "gain over one response", said, DISTANCE))
    return panels


def _mute(panels: list[Panel]) -> list[Panel]:
    """The same without a legend."""
    return [replace(each, has_legend=False) for each in panels]


def _thread(run: Run, x: Array, metric: str) -> Curve:
    return Curve(x=x, y=run.series(f"{metric}/mean").value, label="a member", colour="slate", kind="thread")


def _lines(run: Run, x: Array, place: str, selectors: list[str], what: str) -> list[Curve]:
    """A line with its interval for each selector, the first of which is the single model."""
    looks = zip(selectors, cycle(("slate", *ANY[:-2])), cycle(MARKERS), strict=False)
    return [
        Curve(
            x=x,
            y=run.series(f"{place}/{name}/{what}/mean").value,
            ci=run.series(f"{place}/{name}/{what}/ci95").value,
            label=called(name),
            colour=colour,
            kind="band",
            marker=marker,
        )
        for name, colour, marker in looks
    ]


def called(selector: str) -> str:
    """A selector as a person says it: UWO, λ = 0.5."""
    head, _, weight = selector.partition("_")
    if head == "uwo":
        return f"UWO, λ = {weight}"
    return {"single": "single", "mean": "mean", "wco": "WCO"}.get(selector, selector.replace("_", " "))
