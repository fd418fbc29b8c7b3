"""The study's tables: what each method is meant to improve, before and after, with t intervals over seeds.

python experiments/methods/table.py [runs directory] [seeds ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from rlhf_lab.data.tables import read_table
from rlhf_lab.run import is_finished

GOLD = ("helpfulness", "cost", "humour")
POLICIES = {  # method -> (split, what it is meant to move)
    "ppo": ("test", "helpfulness"),
    "ppo_shaped": ("test", "helpfulness, cost"),
    "ppo_lag": ("test", "helpfulness, cost"),
    "reinforce": ("test", "helpfulness"),
    "rloo": ("test", "helpfulness"),
    "grpo": ("test", "helpfulness"),
    "ci_lag": ("test", "helpfulness, cost"),
    "morlhf": ("test", "helpfulness, humour"),
    "pmorl, told helpful": ("test:helpful", "helpfulness"),
    "pmorl, told humour": ("test:humour", "humour"),
    "prompting, told helpful": ("test:helpful", "helpfulness"),
    "prompting, told humour": ("test:humour", "humour"),
    "multitask_sft, told helpful": ("test:helpful", "helpfulness"),
    "multitask_sft, told humour": ("test:humour", "humour"),
    "dpo": ("test", "helpfulness"),
    "dpo_margin": ("test", "helpfulness"),
    "simpo": ("test", "helpfulness"),
    "dpo_pop": ("test", "helpfulness"),
    "dpo_pop_dual": ("test", "helpfulness"),
    "simpo_pop": ("test", "helpfulness"),
    "modpo": ("test", "helpfulness, humour"),
    "rejection_sft": ("test", "helpfulness"),
    "best_of_n": ("test", "helpfulness"),
}
TRADE_OFFS = ("ric", "ric_online", "soup")
WEIGHTS = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))  # of helpful, humour
SCORERS = {  # method -> its held-out figures
    "reward_model": ("eval/preferences_test/accuracy",),
    "ranking_model": ("eval/preferences_test/accuracy",),
    "probit_reward_model": ("eval/preferences_test/accuracy",),
    "conditioned_reward_model": (
        "eval/preferences_test_helpful/accuracy",
        "eval/preferences_test_humour/accuracy",
    ),
    "cost_model": ("eval/preferences_test/accuracy", "eval/preferences_test/accuracy_sign"),
    "cost_model_bt": ("eval/preferences_test/accuracy", "eval/preferences_test/accuracy_sign"),
}


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def spread(values: list[float]) -> str:
    """Mean over seeds and half the width of its 95 % t interval."""
    x = np.array(values)
    if len(x) < 2:
        return f"{x.mean():z.2f}"
    return f"{x.mean():z.2f} ± {stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5:z.2f}"


def policies(runs: Path, seeds: list[int]) -> None:
    print(f"| method | meant to move | {' | '.join(f'gold {name}' for name in GOLD)} | KL |")
    print("| --- " * (len(GOLD) + 3) + "|")
    for method, (split, meant) in POLICIES.items():
        found = [runs / f"{method.split(',')[0]}_s{seed}" for seed in seeds]
        if not all(map(is_finished, found)):
            continue
        ends = [(rows[0], rows[-1]) for rows in map(rows_of, found)]
        cells = []
        distance = "best_of_n/kl" if method == "best_of_n" else f"eval/{split}/kl"
        for key in (*(f"eval/{split}/gold/{name}/mean" for name in GOLD), distance):
            after = [last[key] for _, last in ends]
            if key.endswith("kl") or any(key not in first or first is last for first, last in ends):
                cells.append(spread(after))
            else:
                cells.append(f"{np.mean([first[key] for first, _ in ends]):z.2f} → {spread(after)}")
        print(f"| {method} | {meant} | {' | '.join(cells)} |")


def points(run: Path) -> dict[tuple[float, ...], tuple[float, float]]:
    """weights -> gold helpfulness and humour of a policy that is asked for them, or mixed by them."""
    if run.name.startswith("soup"):
        rows = [row for row in read_table(run / "data/lattice.parquet") if row["split"] == "test"]
        return {tuple(r["weights"]): (r["gold/helpfulness/mean"], r["gold/humour/mean"]) for r in rows}
    rows = [row for row in read_table(run / "data/preference_grid.parquet") if row["split"] == "test"]
    return {  # later phases come later
        (r["weight_helpful"], r["weight_humour"]): (r["gold_helpfulness_mean"], r["gold_humour_mean"]) for r in rows
    }


def trade_offs(runs: Path, seeds: list[int]) -> None:
    wanted = " | ".join(f"{helpful:g} helpful, {humour:g} humour" for helpful, humour in WEIGHTS)
    print(f"| method | {wanted} | desired with obtained: helpful | humour |")
    print("| --- " * (len(WEIGHTS) + 3) + "|")
    for method in TRADE_OFFS:
        found = [runs / f"{method}_s{seed}" for seed in seeds]
        if not all(map(is_finished, found)):
            continue
        grids, last = [points(run) for run in found], [rows_of(run)[-1] for run in found]
        cells = [" / ".join(spread([grid[weights][i] for grid in grids]) for i in (0, 1)) for weights in WEIGHTS]
        for name in ("helpful", "humour"):
            key = f"eval/test/ric/{name}/correlation"
            cells.append(spread([row[key] for row in last]) if key in last[0] else "")
        print(f"| {method} | {' | '.join(cells)} |")


def scorers(runs: Path, seeds: list[int]) -> None:
    print("| method | held-out |")
    print("| --- | --- |")
    for method, keys in SCORERS.items():
        found = [runs / f"{method}_s{seed}" for seed in seeds]
        if all(map(is_finished, found)):
            said = [f"{key.removeprefix('eval/')} {spread([rows_of(run)[-1][key] for run in found])}" for key in keys]
            print(f"| {method} | {', '.join(said)} |")


def main(runs_dir: Path, seeds: list[int]) -> None:
    runs = runs_dir / "methods"
    policies(runs, seeds)
    print()
    trade_offs(runs, seeds)
    print()
    scorers(runs, seeds)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
