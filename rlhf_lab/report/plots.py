"""The figures of a run. Each is first told as panels of curves, plain data, and then drawn light or dark."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from rlhf_lab.report.run import Run, Series, same_stream

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

Array = NDArray[np.float64]
Theme = Mapping[str, str]
Kind = Literal["train", "state", "points", "held_out", "limit", "gap", "span"]

LIGHT: Theme = {
    "paper": "#ffffff",
    "ink": "#23272e",
    "muted": "#6a717c",
    "grid": "#e6e8ec",
    "blue": "#2f6db3",
    "teal": "#1f8a7d",
    "purple": "#7a57a8",
    "slate": "#6b7c93",
    "amber": "#c27c0e",
    "rust": "#a8532a",
    "olive": "#7d7a1c",
    "red": "#bf3b3b",
}
DARK: Theme = {
    "paper": "#191c21",
    "ink": "#e4e6ea",
    "muted": "#9aa2ae",
    "grid": "#2d323a",
    "blue": "#6fa8e6",
    "teal": "#53c2b2",
    "purple": "#b394e0",
    "slate": "#9fb0c7",
    "amber": "#eab04a",
    "rust": "#e08a5c",
    "olive": "#c2be55",
    "red": "#f07575",
}
PROXY = ("blue", "teal", "purple", "slate")
GOLD = ("amber", "rust", "olive")
ANY = ("blue", "amber", "teal", "red", "purple", "olive", "slate", "rust")
MARKERS = ("o", "s", "^", "D", "v", "P")

SMOOTHED_FROM = 30  # points; fewer are drawn as they are
FEWEST_FOR_A_SPREAD = 8  # responses from which a standard deviation is taken


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One thing to draw, as data.

    Args:
        x, y: (n,) the points; NaN breaks a line.
        label: in the legend and in the text that stands for the picture.
        colour: a key of a `Theme`.
        kind: "train", a line, smoothed over a thin one; "state", a line as it is; "points", unjoined;
            "held_out", joined markers with intervals; "limit", dashed; "gap", upright strokes from `y` to `to`; "span",
            shade where `y` is above 0.
        ci: (n,) half widths of 95% intervals in units of y, or none.
        to: (n,) where the strokes of a gap end.
        marker: of the points of "held_out".
    """

    x: Array
    y: Array
    label: str
    colour: str
    kind: Kind = "train"
    ci: Array | None = None
    to: Array | None = None
    marker: str = "o"


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One pair of axes and what is on them."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """One figure of the report.

    Args:
        name: of its file, without `.png`.
        title: heading on the page.
        caption: how to read it.
        panels: what it shows of a run; nothing when the run has no such series.
    """

    name: str
    title: str
    caption: str
    panels: Callable[[Run], list[Panel]]


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
    learned = [name for name in names if name.startswith("loss") or "accuracy" in name]
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
    panels = proxy_and_gold(run)[:1] or (rewards(run) or gold(run))[:1]
    panels += cost_against_limit(run)[:1] + multipliers(run)[:1] + divergence(run)[:1]
    panels += overoptimisation(run)[:1] + disagreement(run)[:1]
    return (panels or learning(run))[:6]


def metric_label(metric: str) -> str:
    """A metric's name as a person says it: gold helpfulness, proxy helpful, KL, length."""
    head, _, rest = metric.partition("/")
    if metric == "kl":
        return "KL to the reference (nats)"
    if metric == "completions/mean_length":
        return "length (tokens)"
    if metric == "completions/truncated_ratio":
        return "cut off (fraction)"
    words = {"gold": "gold", "rewards": "proxy", "cost": "proxy", "loss": "loss"}
    return f"{words[head]} {rest}" if head in words and rest else metric


OVERVIEW = FigureSpec(
    name="overview",
    title="The run at a glance",
    caption="Lines are training, markers are held-out prompts with 95% intervals where they were logged.",
    panels=overview,
)
FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec(
        name="reward",
        title="Reward",
        caption="Left, each reward model in its own units; right, what the policy is trained on.",
        panels=rewards,
    ),
    FigureSpec(
        name="gold",
        title="Gold scores",
        caption="The true scores of the world, which no model of this run was shown. More is better.",
        panels=gold,
    ),
    FigureSpec(
        name="cost",
        title="Cost against its limit",
        caption="Less is better. The limit is in the units of the cost model, the one that is priced.",
        panels=lambda run: cost_against_limit(run) + violations(run),
    ),
    FigureSpec(
        name="lambda",
        title="The price of the cost",
        caption="λ rises while the cost is above its limit and falls below; red shade means that it sat at its cap.",
        panels=lambda run: multipliers(run) + overshoot(run),
    ),
    FigureSpec(
        name="kl",
        title="Distance from the reference",
        caption="The penalised estimate, the three estimators, and the coefficient.",
        panels=lambda run: divergence(run) + divergence_estimates(run),
    ),
    FigureSpec(
        name="proxy_gold_gap",
        title="Proxy and gold against √KL",
        caption="Gain since the first evaluation. Where the proxy climbs and gold does not, the reward model is being "
        "gamed; upright strokes are the gap.",
        panels=overoptimisation,
    ),
    FigureSpec(
        name="ensemble",
        title="Reward-model ensemble",
        caption="Disagreement that grows means that the policy has left what the members were trained on.",
        panels=ensembles,
    ),
    FigureSpec(
        name="lengths",
        title="Length and truncation",
        caption="Reward that grows only with length shows here first.",
        panels=lengths,
    ),
    FigureSpec(
        name="diagnostics",
        title="Losses and diagnostics",
        caption="Ratio near 1, few clipped tokens and an entropy that does not collapse are healthy.",
        panels=diagnostics,
    ),
    FigureSpec(
        name="learning",
        title="Loss and accuracy",
        caption="Training as a line, held-out splits as markers.",
        panels=learning,
    ),
    FigureSpec(
        name="held_out",
        title="Held-out scores by split",
        caption="One line per split; splits are never averaged together.",
        panels=by_split,
    ),
)


def png(panels: Sequence[Panel], theme: Theme, dpi: int) -> bytes:
    """Draw the panels side by side, at most three in a row, as a PNG image.

    Args:
        panels: at least one.
        theme: colour names -> hex.
        dpi: pixels per inch; a panel is 4.3 by 3 inches, a lone one 5.6 wide.
    """
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    width, height = (5.6 if columns == 1 else 4.3) * columns, 3.0 * rows
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(width, height), dpi=dpi)
        # margins in inches, set by hand: constrained layout measures every text and doubles the time to draw
        for k, content in enumerate(panels):
            row, column = divmod(k, columns)
            left, bottom = column * width / columns + 0.72, height - (row + 1) * 3.0 + 0.55
            axes_width, axes_height = width / columns - 0.87, 2.05
            box = (left / width, bottom / height, axes_width / width, axes_height / height)
            draw(figure.add_axes(box), content, theme)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    # a palette: a third of the bytes, twice per figure in every page
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE)
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def style(theme: Theme) -> "dict[RcKeyType, Any]":
    return {
        "figure.facecolor": theme["paper"],
        "axes.facecolor": theme["paper"],
        "savefig.facecolor": theme["paper"],
        "axes.edgecolor": theme["muted"],
        "axes.labelcolor": theme["muted"],
        "axes.titlecolor": theme["ink"],
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": theme["grid"],
        "grid.linewidth": 0.8,
        "text.color": theme["ink"],
        "xtick.color": theme["muted"],
        "ytick.color": theme["muted"],
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "legend.frameon": True,
        "legend.framealpha": 0.75,
        "legend.edgecolor": "none",
        "legend.facecolor": theme["paper"],
        "lines.solid_capstyle": "round",
        "text.parse_math": False,  # names are not formulas: a $ in one must not be parsed
    }


def draw(axes: Axes, content: Panel, theme: Theme) -> None:
    for curve in content.curves:
        draw_curve(axes, curve, theme[curve.colour])
    axes.set_title(content.title)
    axes.set_xlabel(content.x_label)
    axes.set_ylabel(content.y_label)
    axes.margins(x=0.02, y=0.12 if len(content.curves) < 4 else 0.25)  # room for the legend
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        # plain labels: an exponent in the corner would sit on the title
        axis.set_major_formatter(tick_label)
    if len(content.curves) > 1:
        axes.legend()


def tick_label(value: float, _position: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    x, y, label = curve.x, curve.y, curve.label
    match curve.kind:
        case "train" if len(y) >= SMOOTHED_FROM:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(x, rolling_mean(y, len(y) // 30), color=colour, linewidth=1.8, label=label)
        case "train" | "state":
            axes.plot(x, y, color=colour, linewidth=1.8, label=label, marker="." if len(y) < 8 else None)
        case "points":
            axes.plot(x, y, color=colour, linestyle="none", marker=".", markersize=4, alpha=0.4, label=label)
        case "held_out":
            axes.errorbar(
                x, y, yerr=curve.ci, color=colour, label=label, marker=curve.marker, markersize=5, markeredgewidth=0.8,
                markeredgecolor=axes.get_facecolor(), linestyle=(0, (4, 2)), linewidth=1.1, elinewidth=1.4, capsize=2.5,
            )  # fmt: skip
        case "limit":
            axes.plot(x, y, color=colour, linewidth=1.4, linestyle=(0, (5, 3)), label=label)
        case "gap":
            axes.vlines(x, y, y if curve.to is None else curve.to, color=colour, linewidth=1.0, alpha=0.7, label=label)
        case "span":
            axes.fill_between(
                x, 0, 1, where=(y > 0).tolist(), transform=axes.get_xaxis_transform(), color=colour, alpha=0.15,
                linewidth=0, label=label,
            )  # fmt: skip


def rolling_mean(values: Array, radius: int) -> Array:
    """Mean of the finite neighbours up to `radius` points away; NaN stays where it was.

    The radius shrinks towards the ends, so that a trend is not bent there and the ends are the values themselves.
    """
    reach = np.minimum(radius, np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]))
    windows = (values[max(k - r, 0) : k + r + 1] for k, r in enumerate(reach))
    return np.array(
        [
            window[np.isfinite(window)].mean() if math.isfinite(value) else math.nan
            for value, window in zip(values, windows, strict=True)
        ]
    )


def in_words(panels: Sequence[Panel]) -> str:
    """What stands for the picture when it is not seen: each curve's first and last value."""
    return " ".join(f"{content.title}: {'; '.join(map(curve_in_words, content.curves))}." for content in panels)


def curve_in_words(curve: Curve) -> str:
    finite = curve.y[np.isfinite(curve.y)]
    if curve.kind == "span":
        return f"{curve.label} at {int((finite > 0).sum())} of {len(finite)} points"
    if curve.kind == "gap" and curve.to is not None:
        return f"{curve.label} {(curve.to - curve.y)[-1]:.3g} at the end"
    return f"{curve.label} from {finite[0]:.3g} to {finite[-1]:.3g}"
