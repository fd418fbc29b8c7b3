"""Splits beside each other: the scores of one policy on all, and how far several methods fall out of distribution."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_lab.report.canvas import Array, Curve, Panel
from rlhf_lab.report.plots import ANY, MARKERS, metric_label
from rlhf_lab.report.run import Run
from rlhf_lab.report.value_model_plots import beside, named, reach

MOST_METRICS = 6  # that have pictures; the table has all


def side_by_side(run: Run) -> list[Panel]:
    """Every held-out score of a run that measured once, with a marker for each split."""
    panels = []
    measures = [f"gold/{name}" for name in run.gold_of_any_sign]
    for family in ("rewards", "text", "win_rate"):
        names = [name for split in run.splits for name in run.streams(f"eval/{split}/{family}/<name>/mean")]
        measures += [f"{family}/{name}" for name in dict.fromkeys(names)]
    for k, measure in enumerate([*measures, "kl", "completions/mean_length"]):
        found = {split: last(run, f"eval/{split}/{measure}") for split in run.splits}
        there = {split: each for split, each in found.items() if each is not None}
        if there:
            curve = Curve(
                x=beside(len(there), 0, 1),
                y=np.array([each["value"] for each in there.values()]),
                ci=reach(list(there.values()), "value"),
                label=measure,
                colour=ANY[k % len(ANY)],
                kind="estimates",
            )
            ticks = [(float(place), named(split)) for place, split in enumerate(there)]
            panels.append(Panel(title=titled(measure), x_label="", y_label="", curves=[curve], ticks=ticks))
    return panels


def last(run: Run, metric: str) -> dict[str, float] | None:
    """A metric's last value and interval; None if it was never logged."""
    series = run.series(f"{metric}/mean")
    series = series if series.exists else run.series(metric)
    if not series.exists:
        return None
    value = float(series.value[-1])
    half, low, high = (run.series(f"{metric}/{end}") for end in ("ci95", "low", "high"))
    if low.exists and high.exists:
        return {"value": value, "low": float(low.value[-1]), "high": float(high.value[-1])}
    around = float(half.value[-1]) if half.exists else 0.0
    return {"value": value, "low": value - around, "high": value + around}


def lasts(run: Run, metrics: Sequence[str]) -> tuple[Array, Array]:
    """(n,) last values of metrics, and (2, n) how far their intervals reach down and up; NaN of one never logged."""
    nothing = {"value": np.nan, "low": np.nan, "high": np.nan}
    found = [last(run, metric) or nothing for metric in metrics]
    return np.array([each["value"] for each in found]), reach(found, "value")


def titled(metric: str) -> str:
    """A metric, or a column of a generation table, as a title."""
    kind, _, name = metric.replace("score_", "rewards/").replace("gold_", "gold/").partition("/")
    for prefix in ("text", "win_rate", "verdict"):
        if metric.startswith(prefix):
            name = metric.removeprefix(prefix)[1:].replace("rouge_l", "ROUGE-L").replace("rouge_", "ROUGE-")
            name = name.replace("_", " ")
            return name[:1].upper() + name[1:] if prefix == "text" else f"Wins by {name}"
    if metric.startswith("kl_"):
        return f"KL to the reference, {metric[3:]} (nats)"
    label = metric_label(f"{kind}/{name}" if name else kind)
    return label[:1].upper() + label[1:]


def scores_and_gaps(run: Run) -> list[Panel]:
    """For each metric two panels: what every method scores on every split, and its fall from in distribution."""
    if not run.generalisation:
        return []
    home = run.generalisation["in_distribution"]
    panels = []
    for metric in run.generalisation["metrics"][:MOST_METRICS]:
        rows = [row for row in run.generalisation["rows"] if row["metric"] == metric]
        panels.append(compared(rows, "value", titled(metric), "mean"))
        away = [row for row in rows if row["split"] != home]
        if away:
            panels.append(compared(away, "gap", f"Gap: {titled(metric)}", f"{home} less this split"))
    return panels


def compared(rows: list[Mapping[str, Any]], key: str, title: str, y_label: str) -> Panel:
    """One marker for each method and split; of gaps, a line where there is none."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    splits = list(dict.fromkeys(row["split"] for row in rows))
    curves = []
    for k, method in enumerate(methods):
        found = [row["gap"] if key == "gap" else row for row in rows if row["method"] == method]
        places = [splits.index(row["split"]) for row in rows if row["method"] == method]
        curves.append(
            Curve(
                x=beside(len(splits), k, len(methods))[places],
                y=np.array([each["value"] for each in found]),
                ci=reach(found, "value"),
                label=method,
                colour=ANY[k % len(ANY)],
                kind="estimates",
                marker=MARKERS[k % len(MARKERS)],
            )
        )
    if key == "gap":
        ends = np.array([-0.4, len(splits) - 0.6])
        curves.append(Curve(x=ends, y=0 * ends, label="no gap", colour="muted", kind="limit"))
    ticks = [(float(place), named(split)) for place, split in enumerate(splits)]
    return Panel(title=title, x_label="", y_label=y_label, curves=curves, ticks=ticks)
