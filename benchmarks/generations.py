"""A million responses through the generation table: seconds and memory of each operation, each in its own process.

    python -m benchmarks.generations --prompts 1000 --samples 1000
    python -m benchmarks.generations --prompts 80 --samples 12500

Seconds are of the processor, one thread, and on the wall. Memory is the most that the process held, less what it held
when everything was imported. The first line is what it takes to make rows up, which is in the second too. The curves
are those of `stage=best_of_n_curve`: five members, mean, WCO and three of UWO, two gold scores, 2000 resamplings.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_lab.data.generations import Generations, write
from rlhf_lab.evaluation.best_of_n import choosers, estimates, grid_to, rules_of, tidy, with_single

SPLIT, REWARD, MEMBERS = "test", "helpful", 5
WORDS = np.array(["bake", "the", "bread", "then", "add", "a", "little", "salt", "and", "enjoy", "it", "."])
PROMPTS_AT_ONCE = 32


def responses(prompts: int, samples: int) -> Iterator[dict[str, Any]]:
    """Rows like those of a run: gold, and members that see it through noise of their own; 15 words each."""
    draw = np.random.default_rng(0)
    for p in range(prompts):
        gold = draw.normal(size=samples)
        members = gold[:, None] + draw.normal(size=(samples, MEMBERS))
        words = WORDS[draw.integers(len(WORDS), size=(samples, 15))]
        for s in range(samples):
            yield {
                **{"run": "benchmark", "step": 0, "split": SPLIT, "condition": "", "prompt_id": f"{p:016x}"},
                **{"prompt": f"how do i bake bread number {p} ?", "sample": s, "response": " ".join(words[s])},
                **{"finished": True, "finish_reason": "stop", "tokens": 16, "logprob": -20.0},
                **{"kl_k1": 0.1, "kl_k2": 0.2, "kl_k3": 0.15, "score_helpful": float(members[s].mean())},
                **{"members_helpful": members[s].tolist(), "gold_helpfulness": float(gold[s]), "gold_cost": -gold[s]},
            }


def imagine(file: Path, prompts: int, samples: int) -> str:
    return f"{sum(1 for _ in responses(prompts, samples)):,} rows"


def make(file: Path, prompts: int, samples: int) -> str:
    write(file, responses(prompts, samples), {})
    return f"{file.stat().st_size / 2**20:.0f} MiB on disk"


def read_column(file: Path, prompts: int, samples: int) -> str:
    return f"mean {Generations.open(file).matrix('score_helpful', SPLIT).mean():.3f}"


def read_members(file: Path, prompts: int, samples: int) -> str:
    return f"shape {Generations.open(file).members(REWARD, SPLIT).shape}"


def read_texts(file: Path, prompts: int, samples: int) -> str:
    groups = [len(texts) for _, texts in Generations.open(file).texts(SPLIT)]
    return f"{len(groups)} prompts of {groups[0]}"


def curve(file: Path, prompts: int, samples: int) -> str:
    table, grid = Generations.open(file), grid_to(samples)
    chosen_by = choosers(REWARD, MEMBERS, rules_of([0.1, 0.5, 2.0], 0))
    gold = {f"gold/{name}": f"gold_{name}" for name in table.gold}
    found = with_single(estimates(table, SPLIT, chosen_by, gold, grid, {}, PROMPTS_AT_ONCE))
    rows = tidy(SPLIT, found, grid, 2000, 0)
    best = next(
        row for row in rows if (row["chosen_by"], row["measure"], row["n"]) == ("mean", "gold/helpfulness", grid[-1])
    )
    return f"{len(rows)} rows; gold of the mean at n = {grid[-1]}: {best['mean']:.2f}"


OPERATIONS: dict[str, Callable[[Path, int, int], str]] = {
    "make up the rows": imagine,
    "write": make,
    "read one column": read_column,
    "read the members": read_members,
    "read texts by prompt": read_texts,
    "best-of-n curves": curve,
}


def measured(name: str, file: Path, prompts: int, samples: int) -> tuple[float, float, float, str]:
    """Run one operation in this process: its seconds of both kinds, its MiB and what came out."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, worked = time.perf_counter(), time.process_time()
    said = OPERATIONS[name](file, prompts, samples)
    worked, seconds = time.process_time() - worked, time.perf_counter() - begun
    return worked, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000)
    given = parser.parse_args()
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "generations.parquet"
        print(f"{given.prompts} prompts x {given.samples} samples = {given.prompts * given.samples:,} rows")
        for name in OPERATIONS:
            with fresh.Pool(1) as process:
                found = process.apply(measured, (name, file, given.prompts, given.samples))
            worked, seconds, mebibytes, said = found
            figures = f"{worked:5.1f} s of processor, {seconds:5.1f} s  {mebibytes:6.0f} MiB"
            print(f"  {name:20} {figures}  {said}", flush=True)


if __name__ == "__main__":
    main()
