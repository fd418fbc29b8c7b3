"""Figures of standard benchmarks: of a run of `stage=benchmarks`."""

import re

import numpy as np

from rlhf_lab.report.canvas import Curve, Panel
from rlhf_lab.report.generalisation_plots import last
from rlhf_lab.report.run import Run
from rlhf_lab.report.value_model_plots import named, reach


def benchmarks(run: Run) -> list[Panel]:
    """A panel for each metric, with a marker for each task."""
    logged = (re.fullmatch(r"benchmark/(.+)/([^/]+)/mean", name) for name in run.names)
    found = [(match[2], match[1]) for match in logged if match]
    panels = []
    for metric in dict.fromkeys(metric for metric, _ in found):
        tasks = [task for each, task in found if each == metric]
        values = [each for task in tasks if (each := last(run, f"benchmark/{task}/{metric}")) is not None]
        curve = Curve(
            x=np.arange(len(tasks), dtype=np.float64),
            y=np.array([each["value"] for each in values]),
            ci=reach(values, "value"),
            label=metric,
            colour="blue",
            kind="estimates",
        )
        ticks = [(float(k), named(task)) for k, task in enumerate(tasks)]
        panels.append(Panel(title=metric, x_label="", y_label="", curves=[curve], ticks=ticks))
    return panels
