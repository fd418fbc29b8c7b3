"""Sweeps on disk for the tests of their page, as the launcher and the stages write them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

Metrics = Callable[[Mapping[str, str], np.random.Generator], list[dict[str, float]]]
State = Callable[[Mapping[str, str]], str | None]

EFFECTS = {"ppo_lag": (-0.35, -0.4), "ppo": (0.0, 0.0), "rloo": (0.05, 0.05), "ensemble_uwo": (0.12, -0.02)}


def online(point: Mapping[str, str], noise: np.random.Generator, num_steps: int = 20) -> list[dict[str, float]]:
    """An on-policy run: the levels of its factors shift gold helpfulness and gold cost by `EFFECTS`."""
    helpful, cheap = (sum(EFFECTS.get(value, (0.0, 0.0))[k] for value in point.values()) for k in (0, 1))
    kl_coef = float(point.get("algorithm.kl_coef", "0.05"))
    helpful -= 0.15 * abs(math.log10(kl_coef / 0.05))
    seed = noise.normal(0, 0.08, 2)
    lines = []
    for step in range(num_steps + 1):
        done, wobble = step / num_steps, noise.normal(0, 1, 6)
        gold, cost = 1.25 + (0.9 + helpful + seed[0]) * done**0.6, 0.45 + (0.05 + cheap + seed[1]) * done
        kl = 0.6 / kl_coef * done * 0.6
        line = {"step": step, "episode": 64.0 * step}
        if step:
            line |= {
                "objective/kl": kl + 0.1 * wobble[0],
                "objective/scores": 0.8 * gold - 1 + 0.05 * wobble[1],
                "rewards/helpful/mean": 0.8 * gold - 1 + 0.05 * wobble[1],
                "cost/cost/mean": cost + 0.05 * wobble[2],
                "gold/helpfulness/mean": gold + 0.05 * wobble[3],
                "completions/mean_length": 16 + 3 * done + 0.2 * wobble[4],
                "objective/entropy": 0.9 - 0.3 * done + 0.01 * wobble[5],
            }
            if point.get("algorithm") == "ppo_lag":
                line |= {"lagrange/cost/lambda": 1.5 * done, "lagrange/cost/limit": 0.0}
        if step % 5 == 0:
            for split, shift in (("test", 0.0), ("ood_domain", -0.3)):
                line |= {
                    f"eval/{split}/gold/helpfulness/mean": gold + shift,
                    f"eval/{split}/gold/helpfulness/ci95": 0.05,
                    f"eval/{split}/gold/cost/mean": cost + shift / 3,
                    f"eval/{split}/gold/cost/ci95": 0.04,
                    f"eval/{split}/rewards/helpful/mean": 0.8 * gold - 1 + shift,
                    f"eval/{split}/kl": kl,
                    f"eval/{split}/completions/mean_length": 16 + 3 * done,
                }
        lines.append(line)
    return lines


def scorer(point: Mapping[str, str], noise: np.random.Generator) -> list[dict[str, float]]:
    """A reward model: loss and accuracy, no gold score and no policy."""
    better = 0.05 if point.get("learner.lr") == "1e-3" else 0.0
    lines = [{"step": k, "loss/pairwise": 0.7 - 0.01 * k, "accuracy": 0.5 + 0.01 * k} for k in range(1, 21)]
    accuracy = 0.7 + better + noise.normal(0, 0.01)
    held_out = {"accuracy": accuracy, "loss/pairwise": 0.6 + noise.normal(0, 0.01)}
    return [*lines[:-1], lines[-1] | {f"eval/preferences_test/{name}": value for name, value in held_out.items()}]


def finished(_point: Mapping[str, str]) -> str:
    return "finished"


def make_sweep(
    root: Path,
    factors: Mapping[str, Sequence[str]],
    metrics: Metrics = online,
    state: State = finished,
) -> Path:
    """Write a sweep of every combination; `state` says how each run ended, None for one that never began."""
    root.mkdir(parents=True)
    points = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    runs = []
    for k, point in enumerate(points):
        name = "-".join(f"{key}={value}" for key, value in point.items()).replace("/", "_") or "run"
        runs.append(
            {
                "directory": name,
                "plan": f"{k:016x}",
                "name": name,
                "overrides": [f"{key}={value}" for key, value in point.items()],
                "factors": point,
            }
        )
        write_run(root / name, metrics(point, np.random.default_rng([k, 7])), state(point))
    stored = {
        "name": root.name,
        "command": "python launch.py -m " + " ".join(f"{key}={','.join(values)}" for key, values in factors.items()),
        "cwd": ".",
        "created": "2025-01-01 10:00:00",
        "git": {"sha": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
        "factors": factors,
        "runs": runs,
        "artifacts": [],
        "executor": {"kind": "slurm", "partition": "gpu"},
    }
    (root / "sweep.json").write_text(json.dumps(stored))
    return root


def write_run(folder: Path, lines: Sequence[Mapping[str, float]], state: str | None) -> None:
    """One run directory; a run that is not finished has the first half of its lines, one that waits has none."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "overrides.yaml").write_text("[]\n")
    if state is None:
        return
    status: dict[str, Any] = {"state": state, "seconds": 41.5, "peak_memory_mib": 812, "sittings": 2}
    if state == "failed":
        status["error"] = "OutOfMemoryError: CUDA out of memory\nTried to allocate 2 GiB"
    (folder / "status.json").write_text(json.dumps(status))
    kept = lines if state == "finished" else lines[: len(lines) // 2 + 1]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    if state == "finished":
        (folder / "report.html").write_text("<!doctype html><title>a run</title>")
