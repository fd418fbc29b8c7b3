"""The study's table: held-out gold scores before and after, one row per seed, and means with t intervals over seeds.

python experiments/tiny_help/table.py [split] [runs directory]
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from rlhf_lab.run import is_finished

SEEDS = range(5)
COLUMNS = {
    "gold helpfulness": "gold/helpfulness/mean",
    "gold cost": "gold/cost/mean",
    "learned cost": "rewards/cost/mean",
    "KL (nats)": "kl",
}


def ends(run: Path, split: str) -> list[float]:
    """Before and after of every column on a split."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[f"eval/{split}/{name}"] for name in COLUMNS.values() for line in (lines[0], lines[-1])]


def main(split: str, runs_dir: Path) -> None:
    runs = [runs_dir / "tiny_help" / f"ppo_lag_s{seed}" for seed in SEEDS]
    if unfinished := [str(run) for run in runs if not is_finished(run)]:
        sys.exit(f"not finished: {', '.join(unfinished)}; run experiments/tiny_help/run.sh")
    table = np.array([ends(run, split) for run in runs])
    lambdas = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["lagrange/cost/lambda"] for run in runs]
    print(f"| seed | {' | '.join(f'{name}, before → after' for name in COLUMNS)} | λ |")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for run, row, multiplier in zip(runs, table, lambdas, strict=True):
        cells = [f"{row[i]:z.2f} → {row[i + 1]:z.2f}" for i in range(0, len(row), 2)]
        print(f"| {run.name.removeprefix('ppo_lag_s')} | {' | '.join(cells)} | {multiplier:z.2f} |")
    width = stats.t.ppf(0.975, len(table) - 1) * table.std(0, ddof=1) / len(table) ** 0.5
    cells = [
        f"{m[i]:z.2f} ± {w[i]:z.2f} → {m[i + 1]:z.2f} ± {w[i + 1]:z.2f}"
        for m, w in [(table.mean(0), width)]
        for i in range(0, len(m), 2)
    ]
    print(f"| mean | {' | '.join(cells)} | {np.mean(lambdas):z.2f} |")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "test", Path(sys.argv[2] if len(sys.argv) > 2 else "runs"))
