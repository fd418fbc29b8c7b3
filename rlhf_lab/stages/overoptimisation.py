"""Over-optimisation of finished runs: what gold gains, and what the proxy says, at each distance from the reference."""

import csv
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rlhf_lab.evaluation.overoptimisation import (
    MEASURES,
    Estimate,
    Trail,
    compared,
    equally_far,
    finished_runs,
    grouped,
    read_best_of_n,
    read_trail,
    typed_differently,
)
from rlhf_lab.functional.paths import first_passage
from rlhf_lab.run import Run
from rlhf_lab.types import Count, Metrics


class OverOptimisation:
    """Compare runs, by reward, at equal KL: gold and proxy on held-out prompts against sqrt(KL).

    A run is read where it was first as far as each point of a grid, between two evaluations by a straight line; gains
    are since its first evaluation, in each score's own units. Means are over seeds, where every seed of a group came
    so far, with Student-t intervals over seeds; differences to the baseline are of runs of one seed.

    Leaves `data/trails.csv`, every evaluation of every run; `data/equal_kl.csv`, the comparison; and both in
    `data/overoptimisation.json`. Metrics, one row per point of the grid: `overoptimisation/sqrt_kl`,
    `overoptimisation/<group>/{gold,proxy}/{mean,ci95}`, `overoptimisation/<group>/over_baseline/{mean,ci95}`, and
    `overoptimisation/best_of_n/<selector>/{gold,proxy}/mean`.

    Args:
        runs: finished runs, or folders of them, as a sweep's; lists of these may be entries too. In a folder, runs
            that have not finished are left out and named.
        group_by: settings, as they were typed, in which groups differ: [reward], [reward, algorithm.kl_coef]; null for
            all that were typed differently. Runs of a group differ by their seeds alone.
        split: of the held-out prompts; `gold` and `reward` are the scores that are read.
        kl: the estimate of KL; Coste et al. 2024 plot k2.
        points: of the grid, in equal steps of sqrt(KL) from 0 to the farthest run.
        baseline: group that the others are compared with; null for the first.
        best_of_n: a finished run of stage=best_of_n_curve, drawn on the same axes by its own KL; null for none.
        best_of_n_by: its selectors.

    Source: Gao et al. 2022, arXiv:2210.10760 (sqrt(KL)); Coste et al. 2024, arXiv:2310.02743, figures 4-6.
    """

    def __init__(
        self,
        *,
        runs: Sequence[str | Sequence[str]],
        group_by: Sequence[str] | None,
        split: str,
        gold: str,
        reward: str,
        kl: Estimate,
        points: Count,
        baseline: str | None,
        best_of_n: str | None,
        best_of_n_by: Sequence[str],
    ) -> None:
        self.runs = [path for entry in runs for path in ([entry] if isinstance(entry, str) else entry)]
        self.group_by, self.split, self.gold, self.reward = group_by, split, gold, reward
        self.kl: Estimate = kl
        self.points, self.baseline = points, baseline
        self.best_of_n, self.best_of_n_by = best_of_n, best_of_n_by

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is computed; `promised` paths will be there by then."""
        if self.points < 2:
            raise ValueError(f"stage.points={self.points}; a grid needs 2 or more")
        if not any(path in promised for path in self.runs):
            self._groups()
        if self.best_of_n is not None and self.best_of_n not in promised:
            read_best_of_n(Path(self.best_of_n), self.split, self.gold, self.best_of_n_by)

    def run(self, run: Run) -> Metrics:
        groups = self._groups()
        baseline = self.baseline or next(iter(groups))
        run.resume()  # there are no checkpoints: it takes seconds
        grid, found = equally_far(groups, self.points)
        rows = compared(grid, found, baseline)
        if unfinished := finished_runs(self.runs)[1]:
            names = ", ".join(folder.name for folder in unfinished)
            run.warn(0, f"{len(unfinished)} runs have not finished, and are left out: {names}")
        if lone := [name for name, seeds in groups.items() if len(seeds) < 2]:
            run.warn(0, f"{', '.join(lone)}: one seed, which has no interval over seeds")
        trails = [row for seeds in groups.values() for trail in seeds.values() for row in _told(trail)]
        chosen = {}
        if self.best_of_n is not None:
            read = read_best_of_n(Path(self.best_of_n), self.split, self.gold, self.best_of_n_by)
            chosen = {name: first_passage(distance, gains, grid) for name, (distance, gains) in read.items()}

        def fill(folder: Path) -> None:
            _write_csv(folder / "trails.csv", trails)
            _write_csv(folder / "equal_kl.csv", rows)
            told = {"baseline": baseline, "trails": trails, "equal_kl": rows}
            (folder / "overoptimisation.json").write_text(json.dumps(told, indent=1))

        run.make("data", fill)
        for g, distance in enumerate(grid.tolist()):
            metrics: Metrics = {"overoptimisation/sqrt_kl": distance}
            for row in rows:
                if row["sqrt_kl"] == distance:
                    metrics |= _named(row)
            for name, gains in chosen.items():
                for k, measure in enumerate(MEASURES):
                    if math.isfinite(gains[g, k]):
                        metrics[f"overoptimisation/best_of_n/{name}/{measure}/mean"] = float(gains[g, k])
            run.log(g, metrics)
        return run.last

    def _groups(self) -> dict[str, dict[tuple[int, int], Trail]]:
        runs, _ = finished_runs(self.runs)
        group_by = typed_differently(runs) if self.group_by is None else self.group_by
        trails = [read_trail(run, self.split, self.gold, self.reward, self.kl, group_by) for run in runs]
        groups = grouped(trails)
        if self.baseline is not None and self.baseline not in groups:
            raise ValueError(f"stage.baseline={self.baseline}, but the groups are {list(groups)}")
        return groups


def _named(row: dict[str, Any]) -> Metrics:
    place = f"overoptimisation/{row['group']}"
    metrics = {f"{place}/{row['measure']}/mean": row["gain"]}
    metrics |= {} if row["ci95"] is None else {f"{place}/{row['measure']}/ci95": row["ci95"]}
    if "over_baseline" in row:
        metrics[f"{place}/over_baseline/mean"] = row["over_baseline"]
        metrics |= {} if row["over_ci95"] is None else {f"{place}/over_baseline/ci95": row["over_ci95"]}
    return metrics


def _told(trail: Trail) -> list[dict[str, Any]]:
    """The trail as a table has it, the run by its name."""
    return [
        {
            **{
                "group": trail.group,
                "run": trail.directory.name,
                "seed": trail.seed[0],
                "artifact_seed": trail.seed[1],
            },
            **{"step": int(step), "sqrt_kl": float(distance)},
            **{f"{measure}_gain": float(value) for measure, value in zip(MEASURES, values, strict=True)},
        }
        for step, distance, values in zip(trail.step, trail.distance, trail.values, strict=True)
    ]


def _write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Every column that any row has, empty in the others."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
