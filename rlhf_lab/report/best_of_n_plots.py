"""Best of n by each member and each ensemble: gold, proxy, and what an ensemble is worth beside a single model."""

from itertools import cycle

import numpy as np

from rlhf_lab.report.canvas import Array, Curve, Panel
from rlhf_lab.report.plots import ANY, MARKERS, panel
from rlhf_lab.report.run import Run

DISTANCE = "√KL of the best of n (√nats)"


def best_of_n_ensembles(run: Run) -> list[Panel]:
    """Of every split: each gold score by selector, what each proxy says, and gold beside the single model's.

    Source: the axes of Coste et al. 2024, arXiv:2310.02743, figure 3.
    """
    kl = run.series("best_of_n/kl")
    panels = []
    for split in run.streams("best_of_n/<name>/single/proxy/mean") if kl.exists else ():
        place = f"best_of_n/{split}"
        names = run.streams(f"{place}/<name>/gain/proxy/mean")
        members = [name for name in names if name.startswith("member_")]
        selectors = [name for name in names if name not in members]
        x = np.sqrt(kl.value)
        for gold in run.streams(f"{place}/single/gain/gold/<name>/mean"):
            what = f"gain/gold/{gold}"
            curves = [_thread(run, x, f"{place}/{name}/{what}") for name in members]
            curves += _lines(run, x, place, selectors, what)
            panels += panel(run, f"Best of n on {split}: gold {gold}", "gain over one response", curves, DISTANCE)
            others = [name for name in selectors if name not in ("single", "objective")]
            over = _lines(run, x, place, others, f"over_single/gold/{gold}", skipped=1)
            if over:
                over.append(Curve(x=x, y=0 * x, label="a single reward model", colour="slate", kind="limit"))
                panels += panel(run, f"Gold {gold}: beside a single model", "difference, paired", over, DISTANCE)
        said = [_thread(run, x, f"{place}/{name}/gain/proxy") for name in members]
        said += _lines(run, x, place, selectors, "gain/proxy")
        panels += panel(run, f"Best of n on {split}: proxy", "gain over one response", said, DISTANCE)
    return panels


def _thread(run: Run, x: Array, metric: str) -> Curve:
    return Curve(x=x, y=run.series(f"{metric}/mean").value, label="a member", colour="slate", kind="thread")


def _lines(run: Run, x: Array, place: str, selectors: list[str], what: str, skipped: int = 0) -> list[Curve]:
    """A line with its interval for each selector, in one colour wherever it is drawn; "single" comes first."""
    looks = list(zip(cycle(("slate", *ANY[:-2])), cycle(MARKERS), range(len(selectors) + skipped)))[skipped:]
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
        for name, (colour, marker, _) in zip(selectors, looks, strict=True)
    ]


def called(selector: str) -> str:
    """A selector as a person says it: UWO, λ = 0.5."""
    head, _, weight = selector.partition("_")
    if head == "uwo":
        return f"UWO, λ = {weight}"
    return {"single": "single", "mean": "mean", "wco": "WCO"}.get(selector, selector.replace("_", " "))
