"""A soup of policies, measured on every held-out split; and, if asked, every weighting of them on a lattice."""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.tables import read_table
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.soups import Space, check_soup, merge
from rlhf_lab.evaluation.evaluator import leave_table
from rlhf_lab.functional.simplex import Grid, preference_grid
from rlhf_lab.interfaces import Conditions
from rlhf_lab.run import Run
from rlhf_lab.stages.evaluate import Bench, Evaluate
from rlhf_lab.stages.shards import is_sound, store, write_splits
from rlhf_lab.types import Count, Metrics, NonNegative

MIXTURE = "mixture"  # a lattice point's weights, while it is measured


class Soup:
    """Mix policies, write the mixture as `policy/`, and evaluate it.

    With a grid every weighting in steps of 1 / grid is mixed and evaluated too, with the same random numbers, and
    `data/lattice.parquet` has a row for each weighting and split: weights, split, and every metric of `Evaluate` under
    its name without `eval/<split>/`. Metrics: those of `Evaluate` and `soup/weight/<i>`; step k is lattice point k,
    and the last step the mixture that was written.

    Args:
        rewards: name -> source; null leaves one out.
        conditions: what the policies are told beside each request.
        tokens_at_once: budget of one scoring forward.
        policies: folders; of whole models, or of LoRA adapters.
        weights: shares of one whole, one for each policy.
        space: what is averaged, see `engine/soups.py`.
        grid: steps from 0 to 1 on the lattice of weights, or "released", of three policies; null for none.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        rewards: Mapping[str, Any],
        evaluation_sampling: Sampling,
        hardware: Hardware,
        tokens_at_once: Count,
        conditions: Conditions,
        policies: Sequence[str],
        weights: Sequence[NonNegative],
        space: Space,
        grid: Grid | None,
    ) -> None:
        self.evaluation = Evaluate(
            model=model,
            dataset=dataset,
            rewards=rewards,
            evaluation_sampling=evaluation_sampling,
            hardware=hardware,
            tokens_at_once=tokens_at_once,
            conditions=conditions,
        )
        self.policies, self.weights = tuple(policies), tuple(weights)
        self.grid: Grid | None = grid
        self.space: Space = space

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        self.evaluation.check(promised)
        check_soup(self.policies, self.weights, self.space, promised)

    def run(self, run: Run) -> Metrics:
        run.resume()  # there are no checkpoints: the finished points of the lattice are what it continues from
        policy = run.directory / "policy"
        if not run.has("policy"):
            run.make("policy", partial(merge, self.policies, self.weights, self.space))
        bench = self.evaluation.bench(str(policy), run.seed)
        for note in self.evaluation.dataset.notes:
            run.warn(0, note)
        points = list(preference_grid(len(self.policies), self.grid)) if self.grid else []
        table: list[dict[str, Any]] = []
        for k in run.steps("lattice of weights, point", 0, len(points), {}):
            run.pause()
            metrics = self._point(run, bench, k, points[k])
            table += _by_split(points[k], metrics)
            run.log(k, metrics | _named(points[k]))
        run.drop(MIXTURE)
        if table:
            run.make("data", partial(write_splits, {"lattice": table}))
        metrics, rows = bench.measure(str(policy))
        run.write_rows(f"samples/step_{len(points):06d}.jsonl", rows)
        leave_table(run, len(points), rows, bench.scorer, bench.sampling)
        run.log(len(points), metrics | _named(self.weights))
        return run.last

    def _point(self, run: Run, bench: Bench, k: int, weights: Sequence[float]) -> Metrics:
        """Mix, measure and forget; what was measured stays in `lattice/<k>`, so that it is done once."""
        place = f"lattice/{k:05d}"
        if not is_sound(run, place):
            run.make(MIXTURE, partial(merge, self.policies, weights, self.space))
            metrics, rows = bench.measure(str(run.directory / MIXTURE))
            store(run, place, {"metrics.parquet": [metrics], "samples.jsonl": rows})
        [metrics] = read_table(run.directory / place / "metrics.parquet")
        return metrics


def _named(weights: Sequence[float]) -> Metrics:
    return {f"soup/weight/{i}": weight for i, weight in enumerate(weights)}


def _by_split(weights: Sequence[float], metrics: Metrics) -> list[dict[str, Any]]:
    """One row per split, its metrics without `eval/<split>/`."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        if found := re.fullmatch(r"eval/([^/]+)/(.+)", name):
            rows.setdefault(found[1], {"weights": list(weights), "split": found[1]})[found[2]] = value
    return list(rows.values())
