"""Gold and proxy of training runs against their distance from the reference, compared where they are equally far."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from rlhf_lab.functional.paths import first_passage
from rlhf_lab.functional.resampling import mean_interval
from rlhf_lab.report.run import read_metrics, read_overrides
from rlhf_lab.run import is_finished

Array = NDArray[np.float64]
Estimate = Literal["k1", "k2", "k3"]
MEASURES = ("gold", "proxy")
NO_GROUP = ("seed", "artifact_seed", "name")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trail:
    """What one run measured on held-out prompts, evaluation by evaluation.

    Fields:
        group: what it has in common with the runs that differ from it by the seed alone.
        seed: (seed, artifact_seed), by which runs of several groups are paired.
        step: (T,) of the evaluations.
        distance: (T,) sqrt(KL), in sqrt(nats); an estimate of KL below 0 counts as 0.
        values: (T, 2) mean gold and mean proxy, less those of the first evaluation.
    """

    directory: Path
    group: str
    seed: tuple[int, int]
    step: Array
    distance: Array
    values: Array


def finished_runs(paths: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The finished runs at these paths: of a run, of what it left, or of a folder of runs such as a sweep's.

    Returns:
        Each once, whichever way it is named; and those there that have not finished.

    Raises:
        ValueError: there is none at one of them.
    """
    found: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    for path in paths:
        place = Path(path).expanduser().resolve()
        above = [folder for folder in (place, place.parent) if (folder / "metrics.jsonl").is_file()]
        below = sorted(file.parent for file in place.rglob("metrics.jsonl")) if place.is_dir() else []
        there = above[:1] or below
        finished = [folder for folder in there if is_finished(folder)]
        if not finished:
            said = "none of its runs has finished" if there else "there is no run"
            raise ValueError(f"stage.runs names {path}, but {said}; name finished runs, or a folder that holds some")
        found |= dict.fromkeys(finished)
        unfinished |= dict.fromkeys(folder for folder in there if folder not in found)
    return list(found), list(unfinished)


def read_trail(run: Path, split: str, gold: str, reward: str, kl: Estimate, group_by: Sequence[str]) -> Trail:
    """What a run logged; its group is what the settings of these names are.

    Raises:
        ValueError: it did not measure this, or says nothing of a key that runs are grouped by.
    """
    distance = f"eval/{split}/kl" if kl == "k1" else f"eval/{split}/kl_{kl}"
    names = (distance, f"eval/{split}/gold/{gold}/mean", f"eval/{split}/rewards/{reward}/mean")
    lines = read_metrics(run / "metrics.jsonl")
    steps = [step for step, line in lines.items() if all(name in line for name in names)]
    if not steps:
        measured = sorted({name for line in lines.values() for name in line if name.startswith("eval/")})
        lacking = [name for name in names if name not in measured]
        raise ValueError(
            f"{run} never measured {lacking or list(names)} in one evaluation; it has {measured}; change stage.split, "
            "gold, reward or kl, or leave it out"
        )
    told = np.array([[lines[step][name] for name in names] for step in steps])
    if not np.isfinite(told).all():
        raise ValueError(
            f"{run} measured a value that is not finite at step {steps[int(np.argwhere(~np.isfinite(told))[0][0])]}"
        )
    config = yaml.safe_load((run / "config.yaml").read_text())
    typed = _typed(run)
    return Trail(
        directory=run,
        group=", ".join(str(_setting(key, typed, config, run)) for key in group_by).replace("/", "_") or "runs",
        seed=(config["seed"], config.get("artifact_seed", 0)),
        step=np.array(steps, dtype=np.float64),
        distance=np.sqrt(np.maximum(told[:, 0], 0)),
        values=told[:, 1:] - told[0, 1:],
    )


def _typed(run: Path) -> dict[str, str]:
    """Setting -> value of what was typed for a run."""
    return dict(text.lstrip("+").split("=", 1) for text in read_overrides(run / "overrides.yaml") if "=" in text)


def typed_differently(runs: Sequence[Path]) -> list[str]:
    """The settings that were typed for every run, and not alike for all; seeds and names are none."""
    typed = [_typed(run) for run in runs]
    shared = [key for key in typed[0] if all(key in other for other in typed)]
    return [key for key in shared if key not in NO_GROUP and len({other[key] for other in typed}) > 1]


def _setting(key: str, typed: Mapping[str, str], config: Mapping[str, Any], run: Path) -> Any:
    """What was typed for a key, such as a group's choice, or else what the frozen configuration has under it."""
    if key in typed:
        return typed[key]
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise ValueError(
                f"{run}: {key} was not typed for this run and is not in its config.yaml; "
                f"typed were {sorted(typed)}; change stage.group_by"
            )
        node = node[part]
    return node


def grouped(trails: Sequence[Trail]) -> dict[str, dict[tuple[int, int], Trail]]:
    """group -> seed -> trail.

    Raises:
        ValueError: two runs of a group have one seed, so they differ by something else.
    """
    groups: dict[str, dict[tuple[int, int], Trail]] = {}
    for trail in trails:
        seeds = groups.setdefault(trail.group, {})
        if other := seeds.get(trail.seed):
            raise ValueError(
                f"{other.directory} and {trail.directory} are both {trail.group!r} with seed {trail.seed[0]}; add what "
                "they differ in to stage.group_by, or name one of them"
            )
        seeds[trail.seed] = trail
    return groups


def equally_far(
    groups: Mapping[str, Mapping[tuple[int, int], Trail]], points: int
) -> tuple[Array, dict[str, dict[tuple[int, int], Array]]]:
    """A grid of sqrt(KL), equal steps from 0 to the farthest run, and group -> seed -> (G, 2) values at its points."""
    farthest = max(trail.distance.max() for seeds in groups.values() for trail in seeds.values())
    grid = np.linspace(0, farthest, points)
    return grid, {
        name: {seed: first_passage(t.distance, t.values, grid) for seed, t in seeds.items()}
        for name, seeds in groups.items()
    }


def compared(grid: Array, found: Mapping[str, Mapping[tuple[int, int], Array]], baseline: str) -> list[dict[str, Any]]:
    """One row per group, point of the grid and measure, where every seed of the group came so far.

    Means over seeds with the half width of their Student-t interval, null for one seed; and, where the baseline came so
    far with the same seeds, the difference to it, seed by seed.
    """
    rows = []
    for name, seeds in found.items():
        shared = [seed for seed in seeds if seed in found[baseline]]
        for g, distance in enumerate(grid):
            for k, measure in enumerate(MEASURES):
                values = np.array([seeds[seed][g, k] for seed in seeds])
                if np.isnan(values).any():
                    continue
                mean, half = mean_interval(torch.from_numpy(values))
                row = {"group": name, "sqrt_kl": float(distance), "measure": measure, "seeds": len(values)}
                row |= {"gain": mean, "ci95": half if np.isfinite(half) else None}
                pairs = np.array([seeds[seed][g, k] - found[baseline][seed][g, k] for seed in shared])
                if name != baseline and measure == "gold" and len(pairs) and np.isfinite(pairs).all():
                    mean, half = mean_interval(torch.from_numpy(pairs))
                    row |= {"over_baseline": mean, "over_ci95": half if np.isfinite(half) else None}
                    row |= {"paired_seeds": len(pairs)}
                rows.append(row)
    return rows


def read_best_of_n(run: Path, split: str, gold: str, chosen_by: Sequence[str]) -> dict[str, tuple[Array, Array]]:
    """selector -> (N,) sqrt(KL) of the best of n, and (N, 2) gains of gold and of proxy, from stage=best_of_n_curve.

    Raises:
        ValueError: the run left no such curve.
    """
    places = [folder / "best_of_n.json" for folder in (run, run / "data")]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"stage.best_of_n={run} holds no best_of_n.json; name a finished run of stage=best_of_n_curve")
    rows = [row for row in json.loads(file.read_text()) if row["split"] == split]
    found = {}
    for name in chosen_by:
        gains = {
            measure: {row["n"]: row for row in rows if (row["chosen_by"], row["measure"]) == (name, column)}
            for measure, column in zip(MEASURES, (f"gold/{gold}", "proxy"), strict=True)
        }
        if not gains["gold"]:
            there = sorted({(row["chosen_by"], row["measure"]) for row in rows})
            raise ValueError(f"{file} has no gold/{gold} of {name!r} on {split!r}; it has {there}")
        ns = sorted(gains["gold"])
        distance = np.sqrt([gains["gold"][n]["kl"] for n in ns])
        found[name] = distance, np.array([[gains[measure][n]["gain"] for measure in MEASURES] for n in ns])
    return found
