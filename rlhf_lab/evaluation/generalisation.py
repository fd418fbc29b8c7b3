"""What several methods score in and out of distribution, from their generation tables: a matrix, and the gaps.

Source: generalisation gap, in distribution less out of it, Kirk et al. 2024, arXiv:2310.06452, section 5.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import scipy
import torch
from torch import Tensor

from rlhf_lab.data.generations import Generations
from rlhf_lab.evaluation.policies import SHARES
from rlhf_lab.functional.estimates import Estimate, difference, difference_of_shares, mean, rate

MEASURES = ("gold_", "verdict_", "score_", "text_", "kl_")  # what the columns begin with, the truth first

Over = Literal["prompts", "runs"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one method scores by one metric on one split.

    Fields:
        gap: in distribution less here; None in distribution.
        over: what the intervals are over: the prompts of a method's only run, or its runs.
        gap_is_paired: whether the gap's interval is of differences within a prompt (both splits ask the same), or
            within a run.
        prompts, runs: how many there are.
        excluded: responses without a value.
    """

    method: str
    metric: str
    split: str
    estimate: Estimate
    gap: Estimate | None
    over: Over
    gap_is_paired: bool
    prompts: int
    runs: int
    excluded: int

    @property
    def row(self) -> dict[str, Any]:
        """As JSON holds it."""
        named = {name: getattr(self, name) for name in ("method", "metric", "split", "over", "prompts", "runs")}
        gap = None if self.gap is None else asdict(self.gap) | {"is_paired": self.gap_is_paired}
        return named | {"excluded": self.excluded} | asdict(self.estimate) | {"gap": gap}


@dataclass(frozen=True, eq=False)
class PromptMeans:
    """The mean of a metric over the responses to each prompt, prompts by (id, condition); and what had no value.

    Fields:
        values: (N,) of the responses that have one, 0 to 1 if it is a share.
        prompt: (N,) which prompt each answers.
    """

    by_prompt: Mapping[tuple[str, str], float]
    values: Tensor
    prompt: Tensor
    is_share: bool
    excluded: int

    @property
    def estimate(self) -> Estimate:
        """Their mean with its interval over prompts: Wilson's of a share, else Student's."""
        return rate(self.values, self.prompt) if self.is_share else mean(self.values, self.prompt)


def prompt_means(table: Generations, metric: str, split: str) -> PromptMeans:
    """Read a column of one split.

    Raises:
        ValueError: no response has a value.
    """
    values, starts = table.column(metric, split).astype(np.float64), table.starts(split)
    known = np.isfinite(values)
    if not known.any():
        raise ValueError(
            f"{table.path}: {metric} has no value in {split}; leave it out of stage.metrics, or that split out of "
            "stage.splits"
        )
    sums = np.add.reduceat(np.where(known, values, 0.0), starts[:-1])
    counts = np.add.reduceat(known.astype(np.int64), starts[:-1])
    keys = table.keys(split)
    return PromptMeans(
        by_prompt={key: float(sums[i] / counts[i]) for i, key in enumerate(keys) if counts[i]},
        values=torch.from_numpy(values[known]),
        prompt=torch.from_numpy(np.repeat(np.arange(len(keys)), np.diff(starts))[known]),
        is_share=metric.startswith("verdict_") or metric.removeprefix("text_") in SHARES,
        excluded=int((~known).sum()),
    )


def gap(home: PromptMeans, away: PromptMeans) -> tuple[Estimate, bool]:
    """In distribution less out of it, and whether that is within prompts: where both splits ask the same requests."""
    ids = {key[0] for key in home.by_prompt}
    same = ids == {key[0] for key in away.by_prompt} and len(ids) == len(home.by_prompt) == len(away.by_prompt)
    if not same:
        return difference(home.estimate, away.estimate), False
    there = {key[0]: value for key, value in away.by_prompt.items()}
    pairs = [(value, there[key[0]]) for key, value in home.by_prompt.items()]
    here, elsewhere = torch.tensor(pairs, dtype=torch.float64).T
    prompts = torch.arange(len(pairs))
    if home.is_share:
        return difference_of_shares(here, elsewhere, prompts), True
    return mean(here - elsewhere, prompts), True


def over_runs(values: Sequence[float]) -> Estimate:
    """The mean of several runs with the Student-t interval over them."""
    each = np.array(values)
    if len(each) < 2:
        return Estimate(value=float(each.mean()), low=-math.inf, high=math.inf)
    reach = float(scipy.stats.t.ppf(0.975, len(each) - 1)) * float(each.std(ddof=1)) / len(each) ** 0.5
    return Estimate(value=float(each.mean()), low=float(each.mean()) - reach, high=float(each.mean()) + reach)


def matrix(
    tables: Mapping[str, Sequence[Generations]], metrics: Sequence[str], splits: Sequence[str], in_distribution: str
) -> list[Cell]:
    """A cell for each metric, method and split, in this order.

    Args:
        tables: method -> the tables of its runs.
    """
    cells: list[Cell] = []
    for metric in metrics:
        for method, runs in tables.items():
            means = {split: [prompt_means(table, metric, split) for table in runs] for split in splits}
            home = means[in_distribution]
            for split, each in means.items():
                gaps = None if split == in_distribution else [gap(a, b) for a, b in zip(home, each, strict=True)]
                if len(runs) == 1:
                    estimate = each[0].estimate
                    fall, is_paired = (None, False) if gaps is None else gaps[0]
                else:
                    estimate = over_runs([one.estimate.value for one in each])
                    fall = None if gaps is None else over_runs([one.value for one, _ in gaps])
                    is_paired = gaps is not None
                cells.append(
                    Cell(
                        method=method,
                        metric=metric,
                        split=split,
                        estimate=estimate,
                        gap=fall,
                        over="prompts" if len(runs) == 1 else "runs",
                        gap_is_paired=is_paired,
                        prompts=sum(len(one.by_prompt) for one in each) // len(runs),
                        runs=len(runs),
                        excluded=sum(one.excluded for one in each),
                    )
                )
    return cells
