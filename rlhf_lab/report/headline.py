"""The first line of a run's page: what came of it, whatever kind of run it was."""

import math
import re
from collections.abc import Callable

import numpy as np

from rlhf_lab.report.plots import metric_label
from rlhf_lab.report.run import Run, same_stream
from rlhf_lab.report.summary import Estimate, estimate, judged, number, short, signed, table

NOTHING = "No evaluation on held-out prompts was recorded"


def verdict(run: Run) -> str:
    """One line that says what came of the run: its own finding if it is a comparison, else held-out scores."""
    findings: list[Callable[[Run], str]] = [
        safety_finding, rating_finding, arena_finding, front_finding, best_of_n_finding, overoptimisation_finding,
        value_model_finding, training_finding,
    ]  # fmt: skip
    said = next(filter(None, (finding(run) for finding in findings)), "")
    return said[:1].upper() + said[1:] if said else NOTHING


def last_of(run: Run, pattern: str) -> dict[tuple[str, ...], Estimate]:
    """What stands for each `<…>` of a pattern -> the mean as last logged, and half its interval."""
    parts = (re.escape(part) for part in re.split(r"<\w+>", pattern))
    regex = re.compile("([^/]+)".join(parts) + "/mean")
    found: dict[tuple[str, ...], Estimate] = {}
    for name, value in run.last.items():
        if (match := regex.fullmatch(name)) and math.isfinite(value):
            found[match.groups()] = Estimate(
                mean=value, ci=run.last.get(f"{name.removesuffix('/mean')}/ci95", math.nan)
            )
    return found


def safety_finding(run: Run) -> str:
    """The verdict of a safety test, as it is printed: HC-RLHF calls a failed one no solution found."""
    if not run.series("safety/passed").exists:
        return ""
    passed, bound, limit = (float(run.series(f"safety/{name}").value[-1]) for name in ("passed", "bound", "limit"))
    said = "PASS" if passed else "NO SOLUTION FOUND"
    return f"{said}: upper bound {number(bound)}, limit {short(limit)}"


def rating_finding(run: Run) -> str:
    """Who is rated highest: by each criterion on one split, or on each of several by the last one that it has."""
    ratings = last_of(run, "rating/<split>/<criterion>/<name>")
    best: dict[tuple[str, str], tuple[str, Estimate]] = {}
    for (split, criterion, name), rating in ratings.items():
        place = best.setdefault((split, criterion), (name, rating))
        if rating.mean > place[1].mean:
            best[split, criterion] = (name, rating)
    splits = dict.fromkeys(split for split, _ in best)
    shown = list(best) if len(splits) == 1 else [[key for key in best if key[0] == split][-1] for split in splits]
    of_one = f" on {shown[0][0]}" if len(splits) == 1 else ""
    said = []
    for split, criterion in shown:
        name, rating = best[split, criterion]
        where = criterion if of_one else f"{criterion} on {split}"
        said.append(f"{name} by {where} ({rating.written('{:,.0f}'.format)})")
    return f"rated highest{of_one}: {', '.join(said)}" if said else ""


def arena_finding(run: Run) -> str:
    """Who wins against whom, and how often each is safe."""
    for (split,), wins in last_of(run, "arena/<split>/win_rate").items():
        safe = {name: share for (name,), share in last_of(run, f"arena/{split}/safe/<name>").items()}
        if len(safe) == 2:
            (baseline, before), (challenger, after) = safe.items()
            return (
                f"on {split} {challenger} wins {percent(wins)} against {baseline}, and is safe in {percent(after)} "
                f"against {percent(before)}"
            )
        return f"on {split} the second wins {percent(wins)}"
    return ""


def front_finding(run: Run) -> str:
    """The volumes under the fronts of the first split, largest first."""
    volumes = last_of(run, "pareto/<split>/<method>/hypervolume")
    splits = list(dict.fromkeys(split for split, _ in volumes))
    of_split = [(method, volume) for (split, method), volume in volumes.items() if split in splits[:1]]
    ranked = sorted(of_split, key=lambda one: one[1].mean, reverse=True)
    said = ", ".join(f"{method} {volume}" for method, volume in ranked)
    return f"hypervolume on {splits[0]}: {said}" if said else ""


def best_of_n_finding(run: Run) -> str:
    """What the best rule gains in gold at the largest n, beside a single model."""
    gains = last_of(run, "best_of_n/<split>/<rule>/gain/gold/<gold>")
    for split, _, gold in gains:  # the first of each is that of the headline
        rules = {rule: gain for (of, rule, what), gain in gains.items() if (of, what) == (split, gold)}
        joint = [rule for rule in rules if not rule.startswith("member_")] or list(rules)
        best = max(joint, key=lambda rule: rules[rule].mean)
        shown = [best, *(rule for rule in rules if rule == "single" != best)]
        said = [f"{'+' if rules[rule].mean > 0 else ''}{rules[rule]} by {rule}" for rule in shown]
        return f"best of {max(run.metrics)} on {split} gains gold {gold}: {', '.join(said)}"
    return ""


def overoptimisation_finding(run: Run) -> str:
    """How much gold each reward gained at its best, and as far from the start as it came."""
    said = []
    for reward in run.streams("overoptimisation/<name>/gold/mean"):
        gold = run.series(f"overoptimisation/{reward}/gold/mean").value
        gold = gold[np.isfinite(gold)]
        said.append(f"{reward} {signed(float(gold.max()))}, farthest from the start {signed(float(gold[-1]))}")
    return f"gold gained at its best: {'; '.join(said)}" if said else ""


def value_model_finding(run: Run) -> str:
    """How many held-out pairs each value model ranks right."""
    for split in run.splits[:1]:
        ranked = last_of(run, f"eval/{split}/value_model/<name>/accuracy")
        if ranked:
            return f"pairs ranked right on {split}: {', '.join(f'{name} {share}' for (name,), share in ranked.items())}"
    return ""


def training_finding(run: Run) -> str:
    """Held-out scores before and after, with the costs' limits."""
    return "; ".join([*gold_verdict(run), *cost_verdicts(run)] or learning_verdict(run))


def percent(share: Estimate) -> str:
    return share.written(lambda part: f"{100 * part:.0f}") + " %"


def with_gold(run: Run, name: str) -> list[str]:
    """The splits that a gold score was measured on."""
    return [split for split in run.splits if run.series(f"eval/{split}/gold/{name}/mean").exists]


def gold_verdict(run: Run) -> list[str]:
    if run.headline_gold is None:
        return []
    for split in with_gold(run, run.headline_gold)[:1]:
        return [movement(run, split, f"gold/{run.headline_gold}", f"gold {run.headline_gold} on held-out prompts")]
    return []


def cost_verdicts(run: Run) -> list[str]:
    said = []
    for name in run.gold_costs:
        for split in with_gold(run, name)[:1]:
            line = movement(run, split, f"gold/{name}", f"gold {name}")
            limits = [(cost, run.limit(cost)) for cost in run.costs if same_stream(cost, name) or len(run.costs) == 1]
            last = table(run, split).steps[-1]
            for _, limit in limits[:1]:
                if math.isfinite(limit):
                    line += f", limit {short(limit)}: {judged(estimate(run, split, f'gold/{name}', last), limit)}"
            said.append(line)
    return said


def learning_verdict(run: Run) -> list[str]:
    """For runs without gold scores: held-out accuracy and loss, or how well a policy obtains what it is asked for."""
    for split in run.splits[:1]:
        held = [name.removeprefix(f"eval/{split}/") for name in run.names if name.startswith(f"eval/{split}/")]
        metrics = dict.fromkeys(name.removesuffix("/mean") for name in held if not name.endswith("/ci95"))
        telling = sorted(
            (
                name
                for name in metrics
                if "accuracy" in name or name.startswith("loss") or name.endswith("/correlation")
            ),
            key=lambda name: "accuracy" not in name,
        )
        return [movement(run, split, name, f"{metric_label(name)} on held-out {split}") for name in telling[:2]]
    return []


def movement(run: Run, split: str, metric: str, label: str) -> str:
    steps = table(run, split).steps
    return f"{label} " + " → ".join(str(estimate(run, split, metric, step)) for step in steps)
