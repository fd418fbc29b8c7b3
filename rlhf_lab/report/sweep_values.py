"""Which quantities a sweep is compared by, and what each run has of them, before and after."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_lab.report.plots import evaluated, metric_label
from rlhf_lab.report.run import Run, Series, same_stream
from rlhf_lab.report.sweep_runs import Member, SweepRuns

MOST_METRICS = 8  # in a table; the others are in metrics.csv
TRAINED = {
    "objective/scores": "reward in training",
    "objective/rlhf_reward": "reward after the KL penalty",
    "objective/kl": "KL in training (nats)",
    "completions/mean_length": "length (tokens)",
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A quantity that runs are compared by.

    Fields:
        split: of the held-out prompts; "" for one of training.
        key: without `eval/<split>/` and without `/mean`.
        better: 1 if more is better, -1 if less, 0 if neither by itself.
        limit: what the mean of a cost may not exceed, on which all runs that have one agree; else NaN.
    """

    split: str
    key: str
    label: str
    better: int
    limit: float

    def series(self, run: Run) -> Series:
        return evaluated(run, self.split, self.key) if self.split else run.series(self.key)

    def at(self, run: Run, step: int) -> float:
        """What the run logged at this iteration; NaN if nothing, or nothing finite."""
        line = run.metrics[step]
        name = f"eval/{self.split}/{self.key}" if self.split else self.key
        value = line.get(f"{name}/mean", line.get(name, math.nan))
        return value if math.isfinite(value) else math.nan


@dataclass(frozen=True, kw_only=True)
class Value:
    """What one run has of a metric: at its first evaluation, and where it is compared; NaN where it has none."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """What every run has of every metric.

    Fields:
        metrics: by split, in order of importance; the first split is the one that the page judges by.
        at_step: the evaluation at which runs are compared, or None where each is taken at its own last one.
        scale: metric -> the largest size that it has in a compared run; 0 where it has none.
        ends: the last iteration of which a value was taken -> for how many of the compared runs.
    """

    sweep: SweepRuns
    metrics: Mapping[str, tuple[Metric, ...]]
    at_step: int | None
    scale: Mapping[Metric, float]
    ends: Mapping[int, int]
    taken: Mapping[tuple[str, Metric], Value]

    @property
    def headline(self) -> tuple[Metric, ...]:
        return next(iter(self.metrics.values()), ())

    def of(self, member: Member, metric: Metric) -> Value:
        return self.taken[member.place, metric]


def read_values(sweep: SweepRuns) -> Values:
    """Decide what the runs are compared by, and where.

    Finished runs are compared at their last evaluation. While none is finished, runs are compared at the last
    evaluation that all of them have.
    """
    metrics = find_metrics([member.run for member in sweep.counted])
    first = next(iter(metrics), "")
    common = last_common_step(sweep.counted, first) if sweep.is_provisional else None
    ends: dict[int, int] = {}
    for member in sweep.counted:
        if steps := up_to(looked_at(member, first), common):
            ends[steps[-1]] = ends.get(steps[-1], 0) + 1
    every = [metric for of_split in metrics.values() for metric in of_split]
    taken = {(member.place, metric): value_of(member, metric, common) for member in sweep.members for metric in every}
    sizes = {metric: [abs(taken[member.place, metric].after) for member in sweep.counted] for metric in every}
    return Values(
        sweep=sweep,
        metrics=metrics,
        at_step=common,
        scale={metric: max(filter(math.isfinite, found), default=0.0) for metric, found in sizes.items()},
        ends=dict(sorted(ends.items())),
        taken=taken,
    )


def looked_at(member: Member, split: str) -> Sequence[int]:
    """The iterations at which the split was evaluated; with "" for a split, all that were logged."""
    return member.evaluations.get(split, ()) if split else tuple(member.run.metrics)


def up_to(steps: Sequence[int], last: int | None) -> Sequence[int]:
    return [step for step in steps if last is None or step <= last]


def last_common_step(members: Sequence[Member], split: str) -> int | None:
    """The last iteration that all of the runs have; None if they have none in common."""
    steps = [set(looked_at(member, split)) for member in members]
    return max(set.intersection(*steps), default=None) if steps else None


def value_of(member: Member, metric: Metric, last: int | None) -> Value:
    """A held-out value of the last evaluation, NaN if that was not finite; of training, the last that is finite."""
    values = [metric.at(member.run, step) for step in up_to(looked_at(member, metric.split), last)]
    if not metric.split:
        values = [value for value in values if math.isfinite(value)]
    return Value(
        before=values[0] if len(values) > 1 else math.nan,
        after=values[-1] if values else math.nan,
    )


def find_metrics(runs: Sequence[Run]) -> Mapping[str, tuple[Metric, ...]]:
    """split -> its metrics, gold first; those of training under "" where no run was evaluated.

    Runs of unequal methods have unequal metrics: what some have is compared among these.
    """
    splits = dict.fromkeys(split for run in runs for split in run.splits)
    found: dict[str, tuple[Metric, ...]] = {}
    for split in sorted(splits, key=lambda split: (split != "test", split.startswith("ood"))):
        prefix = f"eval/{split}/"
        held = [name.removeprefix(prefix) for run in runs for name in run.names if name.startswith(prefix)]
        keys = dict.fromkeys(name.removesuffix("/mean") for name in held if not name.endswith("/ci95"))
        found[split] = describe(runs, split, sorted(keys, key=lambda key: importance(runs, key)))
    if not found:
        names = dict.fromkeys(name for run in runs for name in run.names)
        learned = [name for name in names if name.startswith("loss") or "accuracy" in name]
        found[""] = describe(runs, "", [*(name for name in TRAINED if name in names), *learned])
    return {split: metrics for split, metrics in found.items() if metrics}


def importance(runs: Sequence[Run], key: str) -> int:
    """Accuracy, gold scores that a run is trained towards, KL, length, what the models said, and the rest."""
    head, _, name = key.partition("/")
    if head == "gold":
        aimed_at = any(run.is_gold_cost(name) or name in {gold for _, gold in run.pairs} for run in runs)
        return 1 if aimed_at else 5
    ranks = {"accuracy": 0, "kl": 2, "completions/mean_length": 3, "rewards": 4, "cost": 4, "completions": 7}
    return ranks.get(key, ranks.get(head, 6))


def describe(runs: Sequence[Run], split: str, keys: Sequence[str]) -> tuple[Metric, ...]:
    costs = dict.fromkeys(cost for run in runs for cost in run.costs)
    limits = {cost: limit for cost in costs if math.isfinite(limit := agreed([run.limit(cost) for run in runs]))}
    metrics = []
    for key in keys[:MOST_METRICS]:
        head, _, name = key.partition("/")
        is_cost = head in ("gold", "rewards", "cost") and (
            head == "cost" or name in costs or any(run.is_gold_cost(name) for run in runs)
        )
        limit = next((limits[cost] for cost in limits if same_stream(cost, name) or len(costs) == 1), math.nan)
        metrics.append(
            Metric(
                split=split,
                key=key,
                label=TRAINED.get(key, metric_label(key)) if not split else metric_label(key),
                better=-1 if is_cost else direction(key),
                limit=limit if is_cost else math.nan,
            )
        )
    return tuple(metrics)


def direction(key: str) -> int:
    """1 if more of this is better, -1 if less is, 0 if it depends."""
    if key.startswith(("gold/", "rewards/", "objective/scores", "objective/rlhf_reward")) or "accuracy" in key:
        return 1
    return -1 if key.startswith("loss") else 0


def agreed(values: Sequence[float]) -> float:
    """The one finite value of all who have one, NaN if they have none or differ."""
    finite = {value for value in values if math.isfinite(value)}
    return finite.pop() if len(finite) == 1 else math.nan
