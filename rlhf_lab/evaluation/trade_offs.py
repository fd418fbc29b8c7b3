"""What finished runs obtained in several objectives, policy by policy and prompt by prompt."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from rlhf_lab.data.tables import Rows, read_table
from rlhf_lab.status import read_status

KINDS = {"gold": "gold", "rewards": "scores"}  # of objectives -> of a sample's columns


@dataclass(frozen=True, kw_only=True)
class Point:
    """One policy under one preference.

    Fields:
        folder: of its run.
        label: the preference, in words: equal ones of several seeds are the same point of a front.
        weights: what it weighs, by name; none where the run does not say.
        values: prompt id -> (K,) its responses' mean in each objective, in their own units and signs.
        asked: reward -> what it was told to obtain, in standard deviations; none but for Rewards-in-Context.
        obtained: prompt id -> the same rewards as obtained, likewise.
    """

    method: str
    folder: Path
    seed: int
    split: str
    label: str
    weights: Mapping[str, float]
    values: Mapping[str, NDArray[np.float64]]
    asked: Mapping[str, float]
    obtained: Mapping[str, NDArray[np.float64]]


def run_folder(path: str) -> Path:
    """The finished run that a path names: its folder, or the output in it.

    Raises:
        ValueError: there is none, or it has not finished.
    """
    place = Path(path).expanduser()
    found = next((folder for folder in (place, place.parent) if (folder / "status.json").is_file()), None)
    if found is None:
        raise ValueError(f"stage.runs names {path}, but there is no run; name the folder of a finished run")
    if (state := read_status(found).get("state")) != "finished":
        raise ValueError(f"stage.runs names {found}, which is {state}, not finished; start it again, it goes on")
    return found


def points(path: str, method: str, objectives: Sequence[str]) -> list[Point]:
    """Every policy that a run measured on held-out prompts, one for each of its splits and preferences.

    A soup's are those of its lattice, and the one that it wrote if that is another; those of Rewards-in-Context its
    preferences after the last iteration; of any other run the policy of its last evaluation, under each condition.

    Args:
        objectives: `gold/<name>` or `rewards/<name>`.

    Raises:
        ValueError: the run kept no samples, or they lack an objective.
    """
    folder = run_folder(path)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    found = [
        Point(
            method=method,
            folder=folder,
            seed=int(config["seed"]),
            values=_by_prompt(rows, lambda row: _measured(row, objectives, folder)),
            **each,
        )
        for each, rows in _measurements(folder, config["stage"])
    ]
    if not found:
        raise ValueError(f"{folder} kept no samples of held-out prompts; name a run that evaluates a policy")
    return found


def _measurements(folder: Path, stage: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Rows]]:
    """What is known of each policy under each preference, and its samples."""
    by_step = sorted((folder / "samples").glob("step_*.jsonl"))
    last = _by_split(by_step[-1]) if by_step else {}
    untold: dict[str, Any] = {"asked": {}, "obtained": {}}
    if (folder / "data/preference_grid.parquet").is_file():
        yield from _told(folder, stage, last)
        return
    if (folder / "data/lattice.parquet").is_file():
        seen = set()
        weightings = list(dict.fromkeys(tuple(row["weights"]) for row in read_table(folder / "data/lattice.parquet")))
        for k, weights in enumerate(weightings):
            named = {f"policy {i}": weight for i, weight in enumerate(weights)}
            seen.add(_label(named))
            for split, rows in _by_split(folder / f"lattice/{k:05d}/samples.jsonl").items():
                yield {"split": split, "label": _label(named), "weights": named, **untold}, rows
        written = {f"policy {i}": weight for i, weight in enumerate(stage["weights"])}
        if _label(written) in seen:
            return
        for split, rows in last.items():
            yield {"split": split, "label": _label(written), "weights": written, **untold}, rows
        return
    objective = stage.get("objective") or (stage.get("algorithm") or {}).get("objective") or {}
    weights = {name: float(value) for name, value in (objective.get("weights") or {}).items()}
    for place, rows in last.items():
        split, _, condition = place.partition(":")
        label = ", ".join(filter(None, (_label(weights), condition))) or folder.name
        yield {"split": split, "label": label, "weights": weights, **untold}, rows


def _told(folder: Path, stage: Mapping[str, Any], last: Mapping[str, Rows]) -> Iterator[tuple[dict[str, Any], Rows]]:
    """The preferences of a run of Rewards-in-Context, after its last iteration."""
    grid = read_table(folder / "data/preference_grid.parquet")
    phase = max(row["phase"] for row in grid)
    context = json.loads((folder / "policy/rewards_in_context.json").read_text())
    names: list[str] = context["names"]
    signs = np.array([-1.0 if name in stage["costs"] else 1.0 for name in names])
    mean, sd = np.array(context["mean"]), np.array(context["sd"])

    def obtained(row: Mapping[str, Any]) -> NDArray[np.float64]:
        return (np.array([row["scores"][name] for name in names]) * signs - mean) / sd

    for row in grid:
        if row["phase"] != phase:
            continue
        weights = {name: row[f"weight_{name}"] for name in names}
        rows = last[f"{row['split']}:{_label(weights)}"]
        yield (
            {
                "split": row["split"],
                "label": _label(weights),
                "weights": weights,
                "asked": {name: row[f"desired_{name}"] for name in names},
                "obtained": _by_prompt(rows, obtained),
            },
            rows,
        )


def _label(weights: Mapping[str, float]) -> str:
    return ",".join(f"{name}={weight:.4g}" for name, weight in weights.items())


def _by_split(file: Path) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in read_table(file):
        found.setdefault(row["split"], []).append(row)
    return found


def _measured(row: Mapping[str, Any], objectives: Sequence[str], folder: Path) -> NDArray[np.float64]:
    values = []
    for objective in objectives:
        kind, _, name = objective.partition("/")
        held = row.get(KINDS.get(kind, ""), {})
        if name not in held:
            there = [f"{k}/{n}" for k, column in KINDS.items() for n in row.get(column, {})]
            raise ValueError(f"stage.objectives names {objective}, but the samples of {folder} have {there}")
        values.append(held[name])
    return np.array(values, dtype=np.float64)


def _by_prompt(rows: Rows, value: Callable[[Mapping[str, Any]], NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """prompt id -> mean over its responses."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    for row in rows:
        found.setdefault(row["id"], []).append(value(row))
    return {name: np.mean(each, axis=0) for name, each in found.items()}
