"""How a judge judged: whether the order swayed it, how often both orders agree, and how often it calls a tie."""

import re
from collections.abc import Sequence

import numpy as np

from rlhf_lab.report.canvas import Curve, Panel
from rlhf_lab.report.generalisation_plots import lasts
from rlhf_lab.report.run import Run

KINDS = {
    "first_shown": ("What is shown first wins", "share of the verdicts"),
    "consistent": ("Both orders agree", "share of the pairs"),
    "tied": ("Ties, of both orders together", "share of the pairs"),
}
MEASURED = re.compile(rf"verdicts/([^/]+)/([^/]+)/({'|'.join(KINDS)})/mean")
COLOURS = ("blue", "amber", "teal", "purple", "rust", "slate")
APART = 0.12  # between the splits of one preference, where 1 is from one preference to the next


def verdicts(run: Run) -> list[Panel]:
    """A panel for each measure: a place for each preference, a marker and its interval over prompts for each split."""
    logged = run.last
    found = [match.groups() for name in logged if (match := MEASURED.fullmatch(name))]
    preferences = list(dict.fromkeys(preference for _, preference, _ in found))
    splits = list(dict.fromkeys(split for split, _, _ in found))

    def curve(kind: str, k: int) -> Curve:
        values, reach = lasts(run, [f"verdicts/{splits[k]}/{preference}/{kind}" for preference in preferences])
        return Curve(
            x=np.array([place + APART * (k - (len(splits) - 1) / 2) for place in range(len(preferences))]),
            y=values,
            ci=reach,
            label=splits[k],
            colour=COLOURS[k % len(COLOURS)],
            kind="estimates",
        )

    def panel(kind: str, curves: Sequence[Curve]) -> Panel:
        title, unit = KINDS[kind]
        ends = np.array([-0.5, len(preferences) - 0.5])
        fair = Curve(x=ends, y=np.full(2, 0.5), label="no liking for a place", colour="muted", kind="limit")
        beside = Curve(x=ends, y=np.full(2, -1.0), label="", colour="muted", kind="thread")  # unseen, it leaves room
        return Panel(
            title=title,
            x_label="preference",
            y_label=unit,
            curves=[*curves, fair if kind == "first_shown" else beside],
            ticks=[(float(place), name) for place, name in enumerate(preferences)],
            y_range=(-0.03, 1.03),
            has_legend=kind == "first_shown",  # for all three
        )

    return [panel(kind, [curve(kind, k) for k in range(len(splits))]) for kind in KINDS] if found else []
