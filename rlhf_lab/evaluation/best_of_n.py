"""Best of n from a generation table: what choosing by a member, an ensemble or an objective gives, for every n."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_lab.data.generations import Generations
from rlhf_lab.functional import aggregate
from rlhf_lab.functional.best_of_n import curves, kl_of_best_of_n
from rlhf_lab.functional.resampling import bootstrap_means
from rlhf_lab.interfaces import Aggregate

PROXY = "proxy"  # what the best is chosen by, in the units of whoever chooses
SINGLE = "single"


def grid_to(largest: int) -> list[int]:
    """Every n of which the best is estimated: powers of two, and the largest."""
    return list(dict.fromkeys([*(2**k for k in range(largest.bit_length())), largest]))


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Who chooses the best: a function of one column of the table.

    Fields:
        column: what is read, (p, N), or (p, N, M) of members.
        rule: of that, a score for each response, (p, N).
    """

    column: str
    rule: Callable[[Tensor], Tensor]


def by_column(column: str) -> Selector:
    """The best by a number of the table, as `objective`."""
    return Selector(column=column, rule=lambda values: values)


def by_member(reward: str, k: int) -> Selector:
    """The best by one member alone."""
    return Selector(column=f"members_{reward}", rule=lambda members: members[..., k])


def by_ensemble(reward: str, rule: Aggregate) -> Selector:
    """The best by an aggregate of the members, sorted anew by it: the same function as in training."""
    return Selector(column=f"members_{reward}", rule=partial(_aggregated, rule))


def _aggregated(rule: Aggregate, members: Tensor) -> Tensor:
    return rule(members.flatten(0, 1)).view(members.shape[:2])


def choosers(reward: str, num_members: int, rules: Mapping[str, Aggregate]) -> dict[str, Selector]:
    """Every member alone, and every aggregate of them."""
    alone = {f"member_{k}": by_member(reward, k) for k in range(num_members)}
    return alone | {name: by_ensemble(reward, rule) for name, rule in rules.items()}


def rules_of(uwo_weights: Sequence[float], ddof: int) -> dict[str, Aggregate]:
    """Mean, worst case, and uncertainty-weighted once for each weight; a weight of 0 is one, and is the mean."""
    uncertainty = {
        f"uwo_{weight:g}": partial(aggregate.uncertainty_weighted, weight=weight, ddof=ddof) for weight in uwo_weights
    }
    return {"mean": aggregate.mean, "wco": aggregate.worst_case, **uncertainty}


@dataclass(frozen=True, kw_only=True)
class Units:
    """Where a column's zero is, and what is one: of each member its own."""

    zero: NDArray[np.float64]
    one: NDArray[np.float64]

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return (values - self.zero) / self.one


def units_of(table: Generations, split: str, columns: Sequence[str], prompts: int) -> dict[str, Units]:
    """column -> mean and standard deviation (of the population) over all responses of a split, of each member its own.

    In these units what the policy says without choosing scores 0, as in the figures of Coste et al. 2024.

    Raises:
        ValueError: a column does not vary.
    """
    count, shifts, sums, squares = 0, {}, {}, {}
    for block in table.blocks(split, columns, prompts):
        count += _responses(block)
        for name, values in block.items():
            flat = values.reshape(-1, *values.shape[2:])
            shift = shifts.setdefault(name, flat.mean(0))  # near the mean, so that squares lose no digits
            sums[name] = sums.get(name, 0.0) + (flat - shift).sum(0)
            squares[name] = squares.get(name, 0.0) + ((flat - shift) ** 2).sum(0)
    found = {}
    for name in columns:
        offset = sums[name] / count
        sd = np.sqrt(np.maximum(squares[name] / count - offset**2, 0))
        if (sd == 0).any():
            raise ValueError(f"{table.path}: {name} is the same for every response of {split}; leave it as it is saved")
        found[name] = Units(zero=shifts[name] + offset, one=sd)
    return found


def _responses(block: Mapping[str, NDArray[np.float64]]) -> int:
    first = next(iter(block.values()))
    return first.shape[0] * first.shape[1]


def estimates(
    table: Generations,
    split: str,
    selectors: Mapping[str, Selector],
    measured: Mapping[str, str],
    grid: Sequence[int],
    units: Mapping[str, Units],
    prompts: int,
) -> dict[str, dict[str, Tensor]]:
    """Unbiased estimates for each prompt, of so many prompts at a time.

    Args:
        measured: name -> column of what the chosen response is measured by.
        units: of columns that are not to be read as they are saved.

    Returns:
        selector -> `proxy` and every measured name -> (P, G) float64.
    """
    columns = list(dict.fromkeys([*(each.column for each in selectors.values()), *measured.values()]))
    parts: dict[str, list[Tensor]] = {name: [] for name in selectors}
    for block in table.blocks(split, columns, prompts):
        told = {name: torch.from_numpy(units[name](v) if name in units else v) for name, v in block.items()}
        values = [told[column] for column in measured.values()]
        for name, selector in selectors.items():
            score = selector.rule(told[selector.column])
            parts[name].append(curves(score, [score, *values], grid))
    joined = {name: torch.cat(each) for name, each in parts.items()}
    return {name: {what: each[..., k] for k, what in enumerate([PROXY, *measured])} for name, each in joined.items()}


def with_single(found: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The same with what one member gives on average, each choosing by itself, as `single`."""
    alone = [values for name, values in found.items() if name.startswith("member_")]
    average = {what: torch.stack([each[what] for each in alone]).mean(0) for what in alone[0]}
    return {SINGLE: average, **found}


def tidy(
    split: str, found: Mapping[str, dict[str, Tensor]], grid: Sequence[int], draws: int, seed: int
) -> list[dict[str, Any]]:
    """One row for each selector, n and measure: means over prompts with 95 % intervals by resampling prompts.

    The same prompts are drawn for all, so a gain over one response (`gain`) and, where there is a single reward model,
    the difference to it (`over_single`) are compared prompt by prompt.
    """
    keys = [(name, what) for name, values in found.items() for what in values]
    levels = torch.stack([found[name][what] for name, what in keys], dim=2)  # (P, G, C)
    gains = levels - levels[:, grid.index(1), None]
    pieces = {"": levels, "gain": gains}
    if SINGLE in found:
        single = torch.stack([found[SINGLE][what] for _, what in keys], dim=2)
        pieces["over_single"] = levels - single
    ends = {kind: bootstrap_means(values, draws, seed) for kind, values in pieces.items()}
    rows = []
    for c, (name, what) in enumerate(keys):
        for g, n in enumerate(grid):
            row: dict[str, Any] = {
                **{"split": split, "chosen_by": name, "n": n, "kl": kl_of_best_of_n(n), "measure": what},
                "prompts": len(levels),
            }
            for kind, values in pieces.items():
                if kind == "over_single" and what == PROXY:  # each in units of its own
                    row |= dict.fromkeys(("over_single", "over_single_low", "over_single_high"))
                    continue
                low, high = ends[kind]
                prefix = f"{kind}_" if kind else ""
                row[kind or "mean"] = values[:, g, c].mean().item()
                row |= {f"{prefix}low": low[g, c].item(), f"{prefix}high": high[g, c].item()}
            rows.append(row)
    return rows
