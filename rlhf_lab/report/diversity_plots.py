"""How diverse each table's responses are, measure by measure, view by view."""

import re
from dataclasses import replace
from functools import partial

import numpy as np

from rlhf_lab.report.canvas import Curve, Panel
from rlhf_lab.report.generalisation_plots import lasts
from rlhf_lab.report.plots import ANY, MARKERS, panel
from rlhf_lab.report.run import Run

_MEASURES = {
    "ead_words": "EAD of words",
    "ead_tokens": "EAD of tokens",
    "distinct_words": "Distinct n-grams of words",
    "distinct_tokens": "Distinct n-grams of tokens",
    "ngram_cosine": "1 − cosine of n-grams",
    "sentence_bert": "1 − cosine of embeddings",
    "nli": "Contradiction less entailment",
    "entropy": "Entropy (nats per token)",
    "self_bleu": "Self-BLEU: less is more diverse",
}
_NAME = re.compile(r"diversity/([^/]+)/([^/]+)/([^/]+)/([^/]+)/mean")
_APART = 0.2  # between the markers of two tables; views are 1 apart


def diversity(run: Run, of: str) -> list[Panel]:
    """A panel for each measure, of the first split: views side by side, a marker with its interval for each table.

    Args:
        of: "per_input", what is said of the responses to one prompt; "across_inputs", of responses to many.
    """
    found = [match.groups() for match in map(_NAME.fullmatch, run.names) if match]
    if not found:
        return []
    split = found[0][0]
    views, tables = (
        list(dict.fromkeys(each[k] for each in found if each[0] == split and _is_of(each[1], of))) for k in (1, 2)
    )
    panels = []
    for measure, title in _MEASURES.items():
        shown = [v for v in views if any((split, v, table, measure) in found for table in tables)]
        said = [lasts(run, [f"diversity/{split}/{view}/{table}/{measure}" for view in shown]) for table in tables]
        curves = [
            Curve(
                x=np.array([place + _APART * (k - (len(tables) - 1) / 2) for place in range(len(shown))]),
                y=said[k][0],
                ci=said[k][1],
                label=table,
                colour=ANY[k % len(ANY)],
                kind="estimates",
                marker=MARKERS[k % len(MARKERS)],
            )
            for k, table in enumerate(tables)
        ]
        for drawn in panel(run, title, "", curves, x_label=f"{of.replace('_', ' ')}, on {split}"):
            ticks = [(place, _short(view)) for place, view in enumerate(shown)]
            panels.append(replace(drawn, ticks=ticks, x_range=(-0.6, len(shown) - 0.4)))
    return panels


per_input = partial(diversity, of="per_input")
across_inputs = partial(diversity, of="across_inputs")


def _is_of(view: str, of: str) -> bool:
    return view.startswith("per_input") == (of == "per_input")


def _short(view: str) -> str:
    """What a tick has room for."""
    kind = "all of each" if view.startswith("per_input") else "one of each"
    rest = view.removeprefix("per_input").removeprefix("across_inputs").strip("_").replace("_", " ")
    return rest or kind
