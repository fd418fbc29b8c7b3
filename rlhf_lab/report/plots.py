"""What each plot shows of a run, as panels of curves."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np

from rlhf_lab.report.run import Run, Series, same_stream

if TYPE_CHECKING:
    pass

from rlhf_lab.report.canvas import Array, Curve, Kind, Panel

PROXY = ("blue", "teal", "purple", "slate")
GOLD = ("amber", "rust", "olive")
ANY = ("blue", "amber", "teal", "red", "purple", "olive", "slate", "rust")
MARKERS = ("o", "s", "^", "D", "v", "P")

FEWEST_FOR_A_SPREAD = 8  # responses from which a standard deviation is taken


def logged(run: Run, name: str, label: str, colour: str, kind: Kind = "train") -> Curve:
    series = run.series(name)
    return Curve(x=series.x, y=series.value, label=label, colour=colour, kind=kind)


def held_out(run: Run, split: str, metric: str, label: str, colour: str, marker: str = "o") -> Curve:
    """A metric of one split with its intervals; `metric` is without `eval/<split>/` and without `/mean`."""
    series = evaluated(run, split, metric)
    half_widths = run.series(f"eval/{split}/{metric}/ci95")
    ci = np.array([half_widths.at(int(step)) for step in series.step]) if half_widths.exists else None
    return Curve(x=series.x, y=series.value, label=label, colour=colour, kind="held_out", ci=ci, marker=marker)


def evaluated(run: Run, split: str, metric: str) -> Series:
    """A held-out metric by its name without `/mean`, as `gold/helpfulness` or `kl`."""
    series = run.series(f"eval/{split}/{metric}/mean")
    return series if series.exists else run.series(f"eval/{split}/{metric}")


def panel(run: Run, title: str, y_label: str, curves: Sequence[Curve], x_label: str = "") -> list[Panel]:
    """The panel as a list of one, or of none if there is nothing to draw."""
    drawn = [curve for curve in curves if np.isfinite(curve.y).any()]
    if not any(curve.kind not in ("limit", "gap", "span") for curve in drawn):
        return []
    time = "episode" if run.counts_episodes else "step"
    return [Panel(title=title, x_label=x_label or time, y_label=y_label, curves=drawn)]


def proxy_and_gold(run: Run) -> list[Panel]:
    """One panel per reward that has a gold score of its own."""
    panels = []
    for reward, gold in run.pairs:
        curves = [
            logged(run, f"rewards/{reward}/mean", f"proxy {reward}, training", "blue"),
            logged(run, f"gold/{gold}/mean", "gold, training", "amber"),
        ]
        for split in run.splits[:1]:
            curves += [
                held_out(run, split, f"rewards/{reward}", f"proxy, {split}", "blue", "s"),
                held_out(run, split, f"gold/{gold}", f"gold, {split}", "amber"),
            ]
        panels += panel(run, f"{gold.capitalize()}: proxy and gold", "score (own units)", curves)
    return panels


def rewards(run: Run) -> list[Panel]:
    curves = [
        logged(run, f"rewards/{name}/mean", f"{name}", PROXY[k % len(PROXY)]) for k, name in enumerate(run.rewards)
    ]
    for split in run.splits[:1]:
        curves += [
            held_out(run, split, f"rewards/{name}", f"{name}, {split}", PROXY[k % len(PROXY)])
            for k, name in enumerate(run.rewards)
        ]
    optimised = [
        logged(run, "objective/scores", "scores, weighed", "teal"),
        logged(run, "objective/rlhf_reward", "after the KL penalty", "purple"),
    ]
    return panel(run, "Reward models", "mean score", curves) + panel(run, "What is maximised", "reward", optimised)


def gold(run: Run) -> list[Panel]:
    panels = []
    for k, name in enumerate(run.gold):
        colour = GOLD[k % len(GOLD)]
        curves = [logged(run, f"gold/{name}/mean", "training", colour)]
        for split in run.splits[:1]:
            curves.append(held_out(run, split, f"gold/{name}", f"{split}, 95% interval", colour))
        panels += panel(run, f"Gold {name}", "mean score", curves)
    return panels


def cost_against_limit(run: Run) -> list[Panel]:
    panels = []
    for name in run.costs or run.gold_costs:
        curves = [logged(run, f"cost/{name}/mean", "proxy, training", "blue")]
        for gold_name in [gold for gold in run.gold_costs if same_stream(gold, name) or len(run.costs) <= 1]:
            curves.append(logged(run, f"gold/{gold_name}/mean", "gold, training", "amber"))
            for split in run.splits[:1]:
                curves.append(held_out(run, split, f"gold/{gold_name}", f"gold, {split}", "amber"))
        curves.append(logged(run, f"lagrange/{name}/limit", "limit", "red", "limit"))
        panels += panel(run, "Cost and its limit" if name == "cost" else f"Cost {name} and its limit", "cost", curves)
    return panels


def violations(run: Run) -> list[Panel]:
    curves = [logged(run, f"cost/{name}/frac_violating", name, ANY[k % len(ANY)]) for k, name in enumerate(run.costs)]
    return panel(run, "Responses over the limit", "fraction", curves)


def multipliers(run: Run) -> list[Panel]:
    curves = []
    for k, name in enumerate(run.streams("lagrange/<name>/lambda")):
        at_cap = logged(run, f"lagrange/{name}/at_cap", f"λ of {name} at its cap", "red", "span")
        curves.append(logged(run, f"lagrange/{name}/lambda", f"λ of {name}", ANY[(2 + k) % len(ANY)], "state"))
        curves += [at_cap] if (at_cap.y > 0).any() else []
    return panel(run, "Multiplier λ", "λ", curves)


def overshoot(run: Run) -> list[Panel]:
    names = run.streams("lagrange/<name>/violation")
    curves = [logged(run, f"lagrange/{name}/violation", name, ANY[(2 + k) % len(ANY)]) for k, name in enumerate(names)]
    if curves:
        curves.append(Curve(x=curves[0].x, y=0 * curves[0].x, label="limit", colour="red", kind="limit"))
    return panel(run, "Violation, what λ reacts to", "cost above limit", curves)


def divergence(run: Run) -> list[Panel]:
    curves = [logged(run, "objective/kl", "penalised", "purple")]
    for split in run.splits[:1]:
        curves.append(held_out(run, split, "kl", split, "purple"))
    return panel(run, "KL to the reference", "KL (nats)", curves)


def divergence_estimates(run: Run) -> list[Panel]:
    estimates = [logged(run, f"kl/k{k}", f"k{k}", colour) for k, colour in ((1, "blue"), (2, "teal"), (3, "amber"))]
    coefficient = [logged(run, "objective/kl_coef", "coefficient", "slate", "state")]
    return panel(run, "Estimators of the KL", "KL (nats)", estimates) + panel(
        run, "KL coefficient", "coefficient", coefficient
    )


def initial_spread(run: Run, kind: Literal["scores", "gold"], name: str) -> float:
    """Standard deviation of a score over the first evaluation's responses, of the first split; NaN if too few."""
    if not run.samples:
        return math.nan
    rows = run.samples[min(run.samples)]
    split = next((split for split in run.splits if any(row.split == split for row in rows)), None)
    values = np.array([getattr(row, kind).get(name, math.nan) for row in rows if row.split == split])
    values = values[np.isfinite(values)]
    spread = float(values.std(ddof=1)) if len(values) >= FEWEST_FOR_A_SPREAD else math.nan
    return spread if spread > 0 else math.nan


def overoptimisation(run: Run) -> list[Panel]:
    """Gain of each proxy and of its gold score against sqrt(KL), the axis on which over-optimisation shows.

    Source: Gao, Schulman, Hilton 2022, arXiv:2210.10760, d = sqrt(KL).
    """
    panels = []
    for reward, gold_name in run.pairs:
        spreads = initial_spread(run, "scores", reward), initial_spread(run, "gold", gold_name)
        comparable = all(map(math.isfinite, spreads))
        scales = spreads if comparable else (1.0, 1.0)
        curves: list[Curve] = []
        paths = [("training", run.series("objective/kl"), f"rewards/{reward}/mean", f"gold/{gold_name}/mean")]
        for split in run.splits[:1]:
            prefix = f"eval/{split}"
            kl = run.series(f"{prefix}/kl")
            paths.append((split, kl, f"{prefix}/rewards/{reward}/mean", f"{prefix}/gold/{gold_name}/mean"))
        for where, kl, *metrics in paths:
            proxy_line, gold_line = (
                gain_path(kl, run.series(metric), scale) for metric, scale in zip(metrics, scales, strict=True)
            )
            if where == "training":
                curves.append(
                    Curve(x=proxy_line[0], y=proxy_line[1], label="proxy, training", colour="blue", kind="points")
                )
                curves.append(
                    Curve(x=gold_line[0], y=gold_line[1], label="gold, training", colour="amber", kind="points")
                )
                continue
            for (x, y), label, colour, marker in (
                (proxy_line, "proxy", "blue", "s"),
                (gold_line, "gold", "amber", "o"),
            ):
                curves.append(Curve(x=x, y=y, label=f"{label}, {where}", colour=colour, kind="held_out", marker=marker))
            if np.array_equal(proxy_line[0], gold_line[0]):
                x, y = gold_line
                curves.append(Curve(x=x, y=y, to=proxy_line[1], label="gap", colour="muted", kind="gap"))
        unit = "gain (SD at the start)" if comparable else "gain (own units)"
        panels += panel(
            run, f"{gold_name.capitalize()}: proxy and gold by √KL", unit, curves, x_label="√KL to the reference"
        )
    return panels


def gain_path(kl: Series, score: Series, scale: float) -> tuple[Array, Array]:
    """(sqrt(KL), gain since the first) at the iterations that have both; an estimate of KL below 0 counts as 0."""
    common = [
        int(step) for step in score.step if math.isfinite(kl.at(int(step))) and math.isfinite(score.at(int(step)))
    ]
    y = np.array([score.at(step) for step in common])
    x = np.array([math.sqrt(max(kl.at(step), 0.0)) for step in common])
    return x, (y - y[:1]) / scale


def ensembles(run: Run) -> list[Panel]:
    panels = []
    for name in run.streams("ensemble/<name>/mean"):
        curves = [
            logged(run, f"ensemble/{name}/mean", "mean of the members", "blue"),
            logged(run, f"ensemble/{name}/min", "least member", "slate"),
            logged(run, f"rewards/{name}/mean", "as aggregated", "teal"),
        ]
        panels += panel(run, f"Ensemble {name}", "mean score", curves)
    return panels + disagreement(run)


def disagreement(run: Run) -> list[Panel]:
    panels = []
    names = run.streams("ensemble/<name>/disagreement") or run.streams("ensemble/<name>/std")
    for name in names:
        curves = [
            logged(run, f"ensemble/{name}/disagreement", "disagreement", "rust"),
            logged(run, f"ensemble/{name}/std", "SD of the members", "slate"),
            logged(run, f"ensemble/{name}/penalty", "penalty", "purple"),
        ]
        panels += panel(run, f"Disagreement of ensemble {name}", "score units", curves)
    return panels


def lengths(run: Run) -> list[Panel]:
    length = [logged(run, "completions/mean_length", "training", "blue")]
    cut_off = [logged(run, "completions/truncated_ratio", "training", "rust")]
    for split in run.splits[:1]:
        length.append(held_out(run, split, "completions/mean_length", split, "blue"))
        cut_off.append(held_out(run, split, "completions/truncated_ratio", split, "rust"))
    return panel(run, "Response length", "tokens", length) + panel(run, "Cut off at the limit", "fraction", cut_off)


def diagnostics(run: Run) -> list[Panel]:
    shown = (
        ("loss/policy_avg", "Policy loss", "loss", "blue"),
        ("loss/value_avg", "Value loss", "loss", "teal"),
        ("val/ratio", "Ratio new / old", "ratio", "purple"),
        ("policy/approxkl_avg", "KL of one update", "nats", "rust"),
        ("policy/clipfrac_avg", "Clipped tokens", "fraction", "olive"),
        ("policy/entropy_avg", "Entropy, in training", "nats", "amber"),
        ("objective/entropy", "Entropy, in rollouts", "nats", "amber"),
        ("val/num_eos_tokens", "Ends of sequence", "count", "slate"),
        ("lr", "Learning rate", "", "slate"),
    )
    return [
        drawn
        for name, title, unit, colour in shown
        for drawn in panel(run, title, unit, [logged(run, name, name, colour, "state" if name == "lr" else "train")])
    ]


def learning(run: Run) -> list[Panel]:
    """Losses and accuracies of runs that only train: SFT, reward and cost models, offline methods."""
    names = [name.split("/", 2)[2] if name.startswith("eval/") else name for name in run.names]
    of_the_policy = ("loss/policy_avg", "loss/value_avg")
    learned = [
        n for n in names if n.startswith("loss") or ("accuracy" in n and not n.startswith(("value_model/", "gap/")))
    ]
    wanted = dict.fromkeys(
        name.removesuffix("/mean") for name in learned if not name.endswith("/ci95") and name not in of_the_policy
    )
    panels = []
    for name in wanted:
        curves = [logged(run, name, "training", "blue")]
        curves += [
            held_out(run, split, name, split, ("amber", *ANY[2:])[k % 6], MARKERS[k % len(MARKERS)])
            for k, split in enumerate(run.splits)
        ]
        panels += panel(run, name, name.split("/")[0], curves)
    return panels


def best_of_n(run: Run) -> list[Panel]:
    """What the best of n gains over one sample: the objective and the gold scores by KL and by n, gold costs apart.

    Source: the axes of Coste et al. 2024, arXiv:2310.02743, figure 1.
    """
    kl = run.series("best_of_n/kl")
    if not kl.exists or not run.splits:  # of a curve from a table, see best_of_n_plots.py
        return []
    split = run.splits[0]
    prefix = f"best_of_n/{split}/gain"
    names = run.streams(f"{prefix}/gold/<name>/mean")

    labels = {"objective": "proxy, the objective", **{f"gold/{name}": f"gold {name}" for name in names}}

    def gains(x: Array, metrics: Sequence[str]) -> list[Curve]:
        looks = zip(metrics, ("blue", *GOLD, *PROXY), ("s", *MARKERS), strict=False)
        return [
            Curve(
                x=x,
                y=run.series(f"{prefix}/{metric}/mean").value,
                ci=run.series(f"{prefix}/{metric}/ci95").value,
                label=labels[metric],
                colour=colour,
                kind="held_out",
                marker=marker,
            )
            for metric, colour, marker in looks
        ]

    better = ["objective", *(f"gold/{name}" for name in names if not run.is_gold_cost(name))]
    worse = [f"gold/{name}" for name in names if run.is_gold_cost(name)]
    title, by_kl, unit = f"Best of n on {split}: gain", "KL of the best of n (nats)", "over one sample (own units)"
    return [
        *panel(run, title, unit, gains(kl.value, better), x_label=by_kl),
        *panel(run, title, unit, gains(np.log2(kl.step), better), x_label="log₂ n"),
        *panel(run, "Best of n: gold costs", unit, gains(kl.value, worse), x_label=by_kl),
    ]


def soups(run: Run) -> list[Panel]:
    """Every pair of gold scores across the weights of a soup, and what a mixture of the responses would give.

    Below the dashed line a soup is worse than taking each response from one or the other policy.
    """
    if not run.streams("soup/weight/<name>"):
        return []
    panels = []
    weights = [run.series(f"soup/weight/{name}").value for name in run.streams("soup/weight/<name>")]
    pure = [int(np.flatnonzero(weight == 1)[0]) for weight in weights if (weight == 1).any()]
    for split in run.splits[:1]:
        for first, second in combinations(run.gold, 2):
            x = evaluated(run, split, f"gold/{first}").value
            path = held_out(run, split, f"gold/{second}", f"weights on a lattice, {split}", "amber")
            lattice, written = slice(0, len(x) - 1), slice(len(x) - 1, None)
            kind = "held_out" if len(weights) == 2 else "points"  # of more policies the lattice is no path
            ci = None if path.ci is None else path.ci[lattice]
            curves = [replace(path, x=x[lattice], y=path.y[lattice], ci=ci, kind=kind)] if len(x) > 1 else []
            if len(pure) == len(weights) == 2:
                ends = np.array(pure)
                curves.append(Curve(x=x[ends], y=path.y[ends], label="responses mixed", colour="muted", kind="limit"))
            ci = None if path.ci is None else path.ci[written]
            made = replace(path, x=x[written], y=path.y[written], ci=ci, label="the one written", colour="blue")
            curves.append(replace(made, marker="s"))
            panels += panel(run, f"Soups on {split}", f"gold {second}", curves, x_label=f"gold {first}")
    return panels


def trade_offs(run: Run) -> list[Panel]:
    """What each preference asked for and obtained, reward by reward, and the front that this makes of every pair.

    Of the first split; after the offline part, and after the last iteration if there was one.
    """
    rows = [row for row in run.trade_offs if row["split"] == run.trade_offs[0]["split"]]
    if not rows:
        return []
    names = [key.removeprefix("desired_") for key in rows[0] if key.startswith("desired_")]
    phases = {phase: [row for row in rows if row["phase"] == phase] for phase in (0, max(row["phase"] for row in rows))}
    labels = {phase: f"after iteration {phase}" if phase else "after the offline part" for phase in phases}
    looks = {phase: (ANY[k], MARKERS[k]) for k, phase in enumerate(phases)}

    def curve(phase: int, x: str, y: str) -> Curve:
        # a path where preferences lie on a line; of three rewards or more they do not
        kind = "held_out" if len(names) == 2 else "points"
        colour, marker = looks[phase]
        points = [np.array([row[key] for row in phases[phase]]) for key in (x, y)]
        return Curve(x=points[0], y=points[1], label=labels[phase], colour=colour, kind=kind, marker=marker)

    panels = []
    for name in names:
        ends = np.array([f(row[f"desired_{name}"] for row in rows) for f in (min, max)])
        curves = [curve(phase, f"desired_{name}", f"obtained_{name}") for phase in phases]
        curves.append(Curve(x=ends, y=ends, label="as asked", colour="muted", kind="limit"))
        title = f"{name.capitalize()}: asked and obtained"
        panels += panel(run, title, "obtained (sd)", curves, x_label="asked for (sd)")
    for first, second in combinations(names, 2):
        curves = [curve(phase, f"obtained_{first}", f"obtained_{second}") for phase in phases]
        panels += panel(run, "Front", f"{second} (sd)", curves, x_label=f"{first} (sd)")
    return panels


def by_split(run: Run) -> list[Panel]:
    """Every held-out score with one line per split; never their average."""
    scores = [f"gold/{name}" for name in run.gold_of_any_sign]
    scores += [f"rewards/{name}" for name in run.rewards]
    scores += [f"cost/{name}" for name in run.costs]
    panels = []
    for score in [*scores, "kl", "completions/mean_length"]:
        curves = [
            held_out(run, split, score, split, ANY[k % len(ANY)], MARKERS[k % len(MARKERS)])
            for k, split in enumerate(run.splits)
        ]
        label = metric_label(score)
        panels += panel(run, label[:1].upper() + label[1:], "", curves)
    return panels


def overview(run: Run) -> list[Panel]:
    """What a person asks first, on one picture: six panels at most."""
    panels = best_of_n(run) or soups(run)[:1] or proxy_and_gold(run)[:1] or (rewards(run) or gold(run))[:1]
    panels += cost_against_limit(run)[:1] + multipliers(run)[:1] + divergence(run)[:1]
    panels += overoptimisation(run)[:1] + disagreement(run)[:1]
    return (panels or learning(run))[:6]


def metric_label(metric: str) -> str:
    """A metric's name as a person says it: gold helpfulness, proxy helpful, KL, length."""
    head, _, rest = metric.partition("/")
    if metric == "kl":
        return "KL to the reference (nats)"
    if metric in ("kl_k2", "kl_k3"):
        return f"its estimate {metric.removeprefix('kl_')} (nats)"
    if metric == "completions/mean_length":
        return "length (tokens)"
    if metric == "completions/truncated_ratio":
        return "cut off (fraction)"
    if head == "ric":
        name, _, what = rest.partition("/")
        means = ", over means" if what.endswith("means") else ""
        return f"correlation of {name} asked for and obtained{means}"
    words = {"gold": "gold", "rewards": "proxy", "cost": "proxy", "loss": "loss"}
    return f"{words[head]} {rest}" if head in words and rest else metric
