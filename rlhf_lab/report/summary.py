"""What a run amounts to, in numbers and words: before and after, prompts to look at, where time went."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_lab.report.plots import evaluated, metric_label
from rlhf_lab.report.run import Run, Sample


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and the half width of its 95% interval, NaN where it has none."""

    mean: float
    ci: float

    def __str__(self) -> str:
        return self.written(number)

    def written(self, write: Callable[[float], str]) -> str:
        """The mean and, where it has one, half its interval, both as `write` has them."""
        half = f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{write(self.ci)}" if math.isfinite(self.ci) else ""
        return write(self.mean) + half


@dataclass(frozen=True, kw_only=True)
class Row:
    """One held-out metric at the first and the last evaluation. `after` is None when there was only one."""

    label: str
    before: Estimate
    after: Estimate | None

    @property
    def change(self) -> Estimate | None:
        """After minus before; its interval takes the two as independent, though the prompts are the same."""
        if self.after is None:
            return None
        return Estimate(mean=self.after.mean - self.before.mean, ci=math.hypot(self.after.ci, self.before.ci))


@dataclass(frozen=True, kw_only=True)
class Table:
    """One split, before and after, with the iterations at which it was evaluated."""

    split: str
    steps: tuple[int, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The responses to one prompt at the first and the last evaluation, and why they are shown."""

    why: str
    before: Sample
    after: Sample | None


@dataclass(frozen=True, kw_only=True)
class Share:
    """Part of the run's time; `share` is of the whole, between 0 and 1.

    Args:
        rate: tokens a second, the median over the steps; NaN where it has none.
        memory_mib: the most main memory in any step, of the process that held most; NaN where nobody looked.
        device_mib: the same of its device.
    """

    name: str
    seconds: float
    share: float
    rate: float
    memory_mib: float
    device_mib: float


def number(value: float) -> str:
    """Two decimals, fewer when large, an exponent when tiny or huge; rounding noise is 0; a true minus sign."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) < 1e-6:
        return "0.00"
    if value != 0 and not 0.005 <= abs(value) < 1e5:
        text = f"{value:.2e}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def tables(run: Run) -> tuple[Table, ...]:
    """Each split at its first and its last evaluation; gold first, then proxies, KL, length, and the rest."""
    return tuple(table(run, split) for split in run.splits)


def table(run: Run, split: str) -> Table:
    prefix = f"eval/{split}/"
    logged = [name.removeprefix(prefix) for name in run.names if name.startswith(prefix)]
    metrics = dict.fromkeys(name.removesuffix("/mean") for name in logged if not name.endswith("/ci95"))
    steps = [step for step, line in run.metrics.items() if any(prefix + name in line for name in logged)]
    ends = tuple(dict.fromkeys((steps[0], steps[-1])))
    rows = []
    for metric in sorted(metrics, key=order):
        at_ends = [estimate(run, split, metric, step) for step in ends]
        rows.append(Row(label=metric_label(metric), before=at_ends[0], after=at_ends[1] if len(ends) > 1 else None))
    return Table(split=split, steps=ends, rows=tuple(rows))


def order(metric: str) -> int:
    first = ("gold", "rewards", "cost", "kl", "kl_k2", "kl_k3", "completions")
    head = metric.split("/")[0]
    return first.index(head) if head in first else len(first)


def estimate(run: Run, split: str, metric: str, step: int) -> Estimate:
    return Estimate(mean=evaluated(run, split, metric).at(step), ci=run.series(f"eval/{split}/{metric}/ci95").at(step))


def judged(cost: Estimate, limit: float) -> str:
    """Whether a cost keeps its limit, and whether its interval agrees."""
    if not math.isfinite(cost.mean):
        return "unknown"
    side = "met" if cost.mean <= limit else "exceeded"
    return f"{side}, within the error" if abs(cost.mean - limit) < cost.ci else side


def short(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def comparisons(run: Run) -> Mapping[str, tuple[Comparison, ...]]:
    """Per split, the prompts worth reading: typical ones, and those at the ends of what changed.

    The change is that of the headline gold score, or of the first reward where there is no gold. Splits are in the
    order of the tables.
    """
    if not run.samples:
        return {}
    steps = sorted(run.samples)
    before, after = (first_per_prompt(run.samples[step]) for step in (steps[0], steps[-1]))
    if len(steps) == 1:
        after = {}
    shown: dict[str, tuple[Comparison, ...]] = {}
    splits = dict.fromkeys([*run.splits, *(split for split, _ in before)])
    for split in splits:
        keys = [key for key in before if key[0] == split and (key in after or len(steps) == 1)]
        picked = choose(run, [(before[key], after.get(key)) for key in keys])
        if picked:
            shown[split] = picked
    return shown


def first_per_prompt(samples: Sequence[Sample]) -> dict[tuple[str, str], Sample]:
    found: dict[tuple[str, str], Sample] = {}
    for sample in samples:
        found.setdefault((sample.split, sample.id), sample)
    return found


def choose(run: Run, pairs: Sequence[tuple[Sample, Sample | None]]) -> tuple[Comparison, ...]:
    changes = [
        (judge(run, after) - judge(run, before), before, after)
        for before, after in pairs
        if after is not None and math.isfinite(judge(run, after) - judge(run, before))
    ]
    if not changes:
        return tuple(Comparison(why="among the first", before=before, after=after) for before, after in pairs[:3])
    ranked = sorted(changes, key=lambda change: change[0])
    middle = len(ranked) // 2
    picks = [("typical", ranked[middle]), ("best improved", ranked[-1]), ("worst", ranked[0])]
    picks.append(("also typical", ranked[max(middle - 1, 0)]))
    costly = [change for change in changes if math.isfinite(cost_of(run, change[2]))]
    if costly:
        picks.append(("most costly after", max(costly, key=lambda change: cost_of(run, change[2]))))
    chosen: dict[str, tuple[list[str], Sample, Sample | None]] = {}
    for why, (change, before, after) in picks:
        reasons, _, _ = chosen.setdefault(before.id, ([], before, after))
        reasons.append(f"{why} ({signed(change)})" if why in ("typical", "best improved", "worst") else why)
    return tuple(
        Comparison(why=", ".join(reasons), before=before, after=after) for reasons, before, after in chosen.values()
    )


def judge(run: Run, sample: Sample) -> float:
    """The score by which prompts are ranked: the headline gold score, else the first reward."""
    if run.headline_gold is not None:
        return sample.gold.get(run.headline_gold, math.nan)
    return next(iter(sample.scores.values()), math.nan)


def judge_name(run: Run) -> str:
    return f"gold {run.headline_gold}" if run.headline_gold is not None else "the first reward's score"


def cost_of(run: Run, sample: Sample | None) -> float:
    return next((sample.gold[name] for name in run.gold_costs if name in sample.gold), math.nan) if sample else math.nan


def timings(run: Run) -> tuple[Share, ...]:
    """Where the wall clock went, from `time/*`; what no part of the loop accounts for is `everything else`."""
    names = [name for name in run.streams("time/<name>") if name != "tokens_per_second"]  # as older runs have it
    parts = {name: float(np.nansum(run.series(f"time/{name}").value)) for name in names}
    wall, spent = float(run.status["seconds"] or 0.0), sum(parts.values())
    if parts and wall > spent:
        parts["everything else"] = wall - spent
    whole = max(wall, spent)
    ranked = sorted(parts.items(), key=lambda part: -part[1])
    return tuple(
        Share(
            name=name,
            seconds=seconds,
            share=seconds / whole,
            rate=of_steps(run, f"throughput/{name}", np.median),
            memory_mib=of_steps(run, f"memory/{name}", np.max),
            device_mib=of_steps(run, f"memory/device/{name}", np.max),
        )
        for name, seconds in ranked
        if whole > 0
    )


def of_steps(run: Run, metric: str, summary: Callable[..., np.floating]) -> float:
    """What the finite values of a metric amount to; NaN if it has none."""
    value = run.series(metric).value
    finite = value[np.isfinite(value)]
    return float(summary(finite)) if len(finite) else math.nan


def memory(mib: float) -> str:
    """MiB as a person says them; nothing where it is not known."""
    if not math.isfinite(mib):
        return ""
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def not_finite(run: Run) -> tuple[str, ...]:
    """Which metrics were NaN or infinite, how often, and from when."""
    found: dict[str, list[int]] = {}
    for step, line in run.metrics.items():
        for name, value in line.items():
            if not math.isfinite(value):
                found.setdefault(name, []).append(step)
    return tuple(
        f"{name} was not finite at {len(steps)} of {len(run.metrics)} logged steps, first at step {steps[0]}"
        for name, steps in found.items()
    )
