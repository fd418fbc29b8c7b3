"""Fronts of methods that trade several objectives against each other, from finished runs."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import csv, parquet
from torch import Tensor

from rlhf_lab.data.tables import Rows, write_table
from rlhf_lab.evaluation.metrics import half_width
from rlhf_lab.evaluation.run_time import hours, with_needs
from rlhf_lab.evaluation.trade_offs import Point, points, run_folder
from rlhf_lab.functional.control import FOLLOWED, followed
from rlhf_lab.functional.estimates import Estimate
from rlhf_lab.functional.pareto import dominated, front, hypervolume, spacing, spread
from rlhf_lab.functional.resampling import cluster_bootstrap
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.types import Count, Metrics

MEASURES = ("hypervolume", "spread", "spacing")


class Pareto:
    """Compare soups, Rewards-in-Context, sweeps over weights: any runs that measured policies in several objectives.

    A point of a front is one preference of one method, its mean over the method's seeds; all methods are measured on
    the same prompts, joined by id. A point is on its method's front if none of that method's is at least as good in
    every objective and better in one. Intervals come from drawing prompts with replacement, the same for all methods,
    and, of a method with several seeds, seeds too. Noise makes a front look a little better than it is, since its
    points are chosen by it: `bias`, the mean over the draws less the value, says about how much.

    Leaves `data/points.parquet` and `.csv`: method, run, seed, split, label, weights, whether on the front, each
    objective's mean and its Student-t half width over prompts, hours. Metrics, step k a method's k-th point:
    `pareto/<split>/<method>/<objective>/{mean,ci95}`, `…/on_front`; and with the last step
    `pareto/<split>/<method>/{hypervolume,spread,spacing}/{mean,low,high,ci95}`, `…/hypervolume/bias`, of the second
    and further methods `…/hypervolume/gain/…`, the difference from the first; `pareto/<method>/{hours,gpu_hours}` and
    `…/with_needs/…`, all that was made for it; and what Rewards-in-Context was asked for and obtained:
    `pareto/<split>/<method>/told/<reward>/{correlation,slope,order,mean_abs_error}/…`: over preferences, 1 is perfect
    control, `order` being Somers' D: of the pairs of preferences that ask for different rewards, the share that obtains
    them in this order less the share in the other; the error is in standard deviations.

    Args:
        runs: finished ones.
        methods: the method of each run; equal ones share a front, and the first is compared with.
        objectives: `gold/<name>` or `rewards/<name>`, two or more.
        costs: those of them for which less is better; their signs are turned.
        reference: objective -> its value, in its own units, above which a point counts; declared, not fitted.
        splits: null for all that every method has.
        bootstrap_draws: of prompts.
    """

    def __init__(
        self,
        *,
        runs: Sequence[str],
        methods: Sequence[str],
        objectives: Sequence[str],
        costs: Sequence[str],
        reference: Mapping[str, float],
        splits: Sequence[str] | None,
        bootstrap_draws: Count,
    ) -> None:
        self.runs, self.methods, self.objectives = tuple(runs), tuple(methods), tuple(objectives)
        self.costs, self.reference, self.splits = tuple(costs), dict(reference), splits
        self.draws = bootstrap_draws

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot be compared, before anything is read; `promised` paths will be there by then."""
        if not self.runs or len(self.runs) != len(self.methods):
            raise ValueError(
                f"stage.runs has {len(self.runs)} runs, stage.methods {len(self.methods)} names; name each run's method"
            )
        if len(set(self.objectives)) < max(2, len(self.objectives)):
            raise ValueError(f"stage.objectives={list(self.objectives)}; a front needs two or more, each once")
        if self.reference.keys() != set(self.objectives):
            raise ValueError(
                f"stage.reference is of {sorted(self.reference)}, stage.objectives are {sorted(self.objectives)}; "
                "declare a value for each, the worst that still counts"
            )
        if unknown := [name for name in self.costs if name not in self.objectives]:
            raise ValueError(f"stage.costs names {unknown[0]}, but stage.objectives are {list(self.objectives)}")
        for path in self.runs:
            if path not in promised:
                run_folder(path)

    def run(self, run: Run) -> Metrics:
        run.resume()
        found = [
            point
            for path, method in zip(self.runs, self.methods, strict=True)
            for point in points(path, method, self.objectives)
        ]
        metrics = self._times()
        rows: Rows = []
        steps: list[Metrics] = [{} for _ in found]
        for split in self._shared_splits(found):
            mine = [point for point in found if point.split == split]
            prompts = sorted(set.intersection(*(set(point.values) for point in mine)))
            everyone = set.union(*(set(point.values) for point in mine))
            if not prompts:
                raise ValueError(f"no prompt of {split} was answered by every run; compare runs on the same prompts")
            if len(everyone) > len(prompts):
                run.warn(0, f"{split}: {len(everyone) - len(prompts)} of {len(everyone)} prompts are not in every run")
            metrics |= {f"pareto/{split}/prompts": float(len(prompts))}
            metrics |= {f"pareto/{split}/excluded": float(len(everyone) - len(prompts))}
            grids = {method: self._grid(mine, method, prompts) for method in dict.fromkeys(self.methods)}
            metrics |= self._fronts(run, split, grids)
            metrics |= self._control(split, mine, prompts, derive(run.seed, "pareto"))
            for method, (labels, values) in grids.items():
                by_prompt = values.mean(0)  # over seeds: (L, P, K)
                is_behind = dominated(by_prompt.mean(1))
                for k, label in enumerate(labels):
                    prefix = f"pareto/{split}/{method}"
                    steps[k] |= {f"{prefix}/on_front": float(not is_behind[k])}
                    steps[k] |= self._means(prefix, by_prompt[k])
                    rows += [
                        self._row(point, prompts, not is_behind[k])
                        for point in mine
                        if (point.method, point.label) == (method, label)
                    ]
        for k, each in enumerate(step for step in steps if step):
            run.log(k, each)

        def write(folder: Path) -> None:
            write_table(rows, folder / "points.parquet")
            csv.write_csv(parquet.read_table(folder / "points.parquet"), folder / "points.csv")

        run.make("data", write)
        run.log(sum(map(bool, steps)), metrics)
        return metrics

    def _shared_splits(self, found: Sequence[Point]) -> list[str]:
        by_method = [{point.split for point in found if point.method == method} for method in self.methods]
        shared = [split for split in dict.fromkeys(p.split for p in found) if all(split in each for each in by_method)]
        wanted = shared if self.splits is None else list(self.splits)
        if not wanted or not set(wanted) <= set(shared):
            raise ValueError(
                f"stage.splits={self.splits}, but the splits that every method was measured on are {shared}; "
                "choose of these, or evaluate the others too"
            )
        return wanted

    def _signs(self) -> NDArray[np.float64]:
        return np.array([-1.0 if name in self.costs else 1.0 for name in self.objectives])

    def _grid(
        self, mine: Sequence[Point], method: str, prompts: Sequence[str]
    ) -> tuple[list[str], NDArray[np.float64]]:
        """Labels, and (S, L, P, K) values of every seed, label and prompt; more is better.

        Raises:
            ValueError: a seed lacks a label that another has, or has it twice.
        """
        of_method = [point for point in mine if point.method == method]
        labels, seeds = (list(dict.fromkeys(getattr(p, name) for p in of_method)) for name in ("label", "seed"))
        by_place: dict[tuple[int, str], Point] = {}
        for point in of_method:
            if (other := by_place.setdefault((point.seed, point.label), point)) is not point:
                raise ValueError(
                    f"{method}: {other.folder} and {point.folder} both have {point.label!r} with seed {point.seed}; "
                    "give them different names in stage.methods, or leave one out"
                )
        for seed in seeds:
            if absent := [label for label in labels if (seed, label) not in by_place]:
                raise ValueError(f"{method}: seed {seed} has no {absent[0]!r}; every seed needs the same preferences")
        values = [[[by_place[s, label].values[p] for p in prompts] for label in labels] for s in seeds]
        return labels, np.array(values) * self._signs()

    def _fronts(self, run: Run, split: str, grids: Mapping[str, tuple[list[str], NDArray[np.float64]]]) -> Metrics:
        """Each method's front as numbers, with intervals over prompts and seeds."""
        reference = np.array([self.reference[name] for name in self.objectives]) * self._signs()
        methods = list(grids)
        found = np.array([_described(grids[method][1].mean((0, 2)), reference) for method in methods])
        for method in methods:
            if below := int((grids[method][1].mean((0, 2)) <= reference).any(1).sum()):
                run.warn(0, f"{split}: {below} points of {method} are not above stage.reference, and add no volume")
        seeds = np.random.default_rng(derive(run.seed, "seeds", split))
        by_prompt = torch.cat([_by_prompt(values) for _, values in grids.values()], dim=1)
        shapes = [values.shape for _, values in grids.values()]
        seen: list[NDArray[np.float64]] = []

        def statistic(drawn: Tensor) -> Tensor:
            means, start, described = drawn.mean(0).numpy(), 0, []
            for num_seeds, num_labels, _, num_objectives in shapes:
                size = num_seeds * num_labels
                mine = means[start : start + size].reshape(num_seeds, num_labels, num_objectives)
                start += size
                described.append(_described(mine[seeds.integers(num_seeds, size=num_seeds)].mean(0), reference))
            seen.append(np.array(described))
            gains = seen[-1][:, 0] - seen[-1][0, 0]
            return torch.from_numpy(np.concatenate([seen[-1].ravel(), gains]))

        ends = cluster_bootstrap(by_prompt, statistic, self.draws, derive(run.seed, "pareto", split))
        low, high = (end[: found.size].reshape(found.shape) for end in ends)
        bias = np.mean(seen, axis=0) - found
        metrics: Metrics = {}
        for m, method in enumerate(methods):
            prefix = f"pareto/{split}/{method}"
            for k, name in enumerate(MEASURES):
                estimate = Estimate(value=float(found[m, k]), low=low[m, k].item(), high=high[m, k].item())
                metrics |= estimate.named(f"{prefix}/{name}")
            metrics[f"{prefix}/hypervolume/bias"] = float(bias[m, 0])
            metrics[f"{prefix}/points"] = float(len(grids[method][0]))
            metrics[f"{prefix}/seeds"] = float(len(grids[method][1]))
            if m:
                gain = Estimate(
                    value=float(found[m, 0] - found[0, 0]),
                    low=ends[0][found.size + m].item(),
                    high=ends[1][found.size + m].item(),
                )
                metrics |= gain.named(f"{prefix}/hypervolume/gain")
        return metrics

    def _control(self, split: str, mine: Sequence[Point], prompts: Sequence[str], seed: int) -> Metrics:
        """How far the rewards that were asked for were obtained, over the preferences of each method that is told."""
        metrics: Metrics = {}
        for method in dict.fromkeys(self.methods):
            told = [point for point in mine if point.method == method and point.asked]
            for k, name in enumerate(told[0].asked if told else ()):
                asked = np.array([point.asked[name] for point in told])
                if len(set(asked.tolist())) < 2:  # one reward alone has nothing to be traded for
                    continue
                obtained = torch.tensor([[point.obtained[p][k] for point in told] for p in prompts])
                described = partial(followed, asked)
                value = described(obtained)
                low, high = cluster_bootstrap(obtained, described, self.draws, seed)
                for i, what in enumerate(FOLLOWED):
                    estimate = Estimate(value=value[i].item(), low=low[i].item(), high=high[i].item())
                    metrics |= estimate.named(f"pareto/{split}/{method}/told/{name}/{what}")
        return metrics

    def _times(self) -> Metrics:
        metrics: Metrics = {}
        for method in dict.fromkeys(self.methods):
            mine = [run_folder(path) for path, of in zip(self.runs, self.methods, strict=True) if of == method]
            for kind, runs in (("", mine), ("with_needs/", with_needs(mine))):
                took = hours(runs)
                metrics[f"pareto/{method}/{kind}hours"] = took.wall
                metrics[f"pareto/{method}/{kind}gpu_hours"] = took.gpu
                metrics[f"pareto/{method}/{kind}runs_without_record"] = float(took.missing)
        return metrics

    def _means(self, prefix: str, by_prompt: NDArray[np.float64]) -> Metrics:
        """Of (P, K) values, in their own signs."""
        metrics: Metrics = {}
        for name, sign, values in zip(self.objectives, self._signs(), by_prompt.T, strict=True):
            metrics[f"{prefix}/{name}/mean"] = float(sign * values.mean())
            metrics[f"{prefix}/{name}/ci95"] = half_width(torch.from_numpy(values))
        return metrics

    def _row(self, point: Point, prompts: Sequence[str], is_on_front: bool) -> dict[str, Any]:
        values = np.array([point.values[p] for p in prompts])
        row: dict[str, Any] = {
            **{name: getattr(point, name) for name in ("method", "seed", "split", "label")},
            "run": point.folder.name,
            "on_front": bool(is_on_front),
            "prompts": len(prompts),
            "hours": hours([point.folder]).wall,
            **{f"weight_{name}": weight for name, weight in point.weights.items()},
        }
        for k, name in enumerate(self.objectives):
            row[name] = float(values[:, k].mean())
            row[f"{name}/ci95"] = half_width(torch.from_numpy(values[:, k]))
        return row


def _by_prompt(values: NDArray[np.float64]) -> Tensor:
    """(S, L, P, K) -> (P, S * L, K)."""
    num_seeds, num_labels, num_prompts, num_objectives = values.shape
    flat = values.reshape(num_seeds * num_labels, num_prompts, num_objectives)
    return torch.from_numpy(np.ascontiguousarray(flat.transpose(1, 0, 2)))


def _described(means: NDArray[np.float64], reference: NDArray[np.float64]) -> list[float]:
    """`MEASURES` of (L, K) points."""
    edge = front(means)
    return [hypervolume(means, reference), spread(edge), spacing(edge)]
