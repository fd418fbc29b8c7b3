"""Batches x losses -> optimiser steps. The only code that averages a loss, and so the only one that knows counts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rlhf_lab.engine import out_of_memory, ranks
from rlhf_lab.engine.score import own_microbatches
from rlhf_lab.seeds import generator
from rlhf_lab.types import Count, Fraction, Metrics, NonNegative, NonNegativeCount, Positive, Term


class Trainable(Protocol):
    """A batch that can be learnt from."""

    def __len__(self) -> int: ...
    def select(self, index: Tensor) -> Any: ...
    def to(self, device: torch.device) -> Any: ...
    @property
    def lengths(self) -> Tensor: ...


@dataclass(frozen=True)
class Part:
    """One loss over one batch. Several parts are summed, each with averages of its own (RL and ptx, say).

    `microbatches` are the rows that this rank computes together, given the batch and a budget of tokens.
    """

    batch: Trainable
    forward: Callable[[Any], Any]
    loss: Callable[[Any, Any], Sequence[Term]]
    weight: float = 1.0
    microbatches: Callable[[Any, int], list[Tensor]] = own_microbatches


def minibatch_count(rows: int, minibatch_size: int) -> int:
    """How many optimiser steps one pass over `rows` rows takes; a minibatch size of 0 is the whole batch.

    Raises:
        ValueError: the rows do not divide into minibatches.
    """
    size = minibatch_size or rows
    if rows % size:
        raise ValueError(
            f"batch of {rows} rows does not divide into minibatches of {size}; change learner.minibatch_size"
        )
    return rows // size


class Learner:
    """AdamW over named modules: epochs x minibatches x microbatches.

    A minibatch takes one optimiser step, on averages over the whole minibatch: tokens of a per-token term all weigh
    the same, rows of a per-row term too, however the minibatch is cut into microbatches.

    Args:
        modules: what learns, by name.
        total_updates: optimiser steps of the whole run, for the schedule.
        lr: module -> peak learning rate.
        epochs: passes over each batch.
        minibatch_size: rows of an optimiser step; 0 takes the whole batch.
        tokens_at_once: budget of a microbatch, rows times its longest row; prompts and responses are padded apart, so
            it may hold up to twice that. Changes memory and speed only.
        schedule, warmup: of the rate; warmup in optimiser steps.
        max_grad_norm: of each module on its own; `inf` for none.

    Raises:
        ValueError: rates and modules do not name the same things.
    """

    def __init__(
        self,
        *,
        modules: Mapping[str, nn.Module],
        total_updates: int,
        lr: Mapping[str, Positive],
        epochs: Count,
        minibatch_size: NonNegativeCount,
        tokens_at_once: Count,
        schedule: Literal["constant", "linear", "cosine"],
        warmup: NonNegativeCount,
        weight_decay: NonNegative,
        betas: tuple[Fraction, Fraction],
        max_grad_norm: Positive,
    ) -> None:
        if missing := sorted(modules.keys() - lr.keys()):
            raise ValueError(f"learner.lr has {sorted(lr)}, but {missing} learn too; add learner.lr.{missing[0]}")
        self.modules, self.lr = dict(modules), {name: lr[name] for name in modules}
        self.epochs, self.minibatch_size, self.tokens_at_once = epochs, minibatch_size, tokens_at_once
        self.schedule, self.warmup, self.total_updates = schedule, warmup, total_updates
        self.max_grad_norm = max_grad_norm
        self.updates = 0
        groups = [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": lr[name]}
            for name, module in modules.items()
        ]
        self.optimiser = torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay)

    def rate_factor(self) -> float:
        """What the peak rates are multiplied by at the next optimiser step."""
        if self.updates < self.warmup:
            return (self.updates + 1) / self.warmup
        done = (self.updates - self.warmup) / max(1, self.total_updates - self.warmup)
        if self.schedule == "linear":
            return max(0.0, 1 - done)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return 1.0

    def update(self, parts: Sequence[Part], seed: int) -> Metrics:
        """Learn from the parts, each cut into the same number of minibatches.

        Args:
            seed: of the shuffling into minibatches.

        Returns:
            Each term's mean (averaged over optimiser steps), `grad_norm/<module>` before clipping, and `lr`.

        Raises:
            ValueError: the rows of the first part do not divide into minibatches, or another part has too few.
            FloatingPointError: a loss or a gradient is not finite; the weights are as before this optimiser step.
        """
        count = minibatch_count(len(parts[0].batch), self.minibatch_size)
        if (fewest := min(len(part.batch) for part in parts)) < count:
            raise ValueError(f"a part of {fewest} rows cannot be cut into {count} minibatches; give it more rows")
        sums: dict[str, float] = {}
        for epoch in range(self.epochs):
            shuffling = generator(seed, "shuffle", epoch)
            cuts = [torch.randperm(len(part.batch), generator=shuffling).tensor_split(count) for part in parts]
            for i in range(count):
                step = [replace(part, batch=part.batch.select(cut[i])) for part, cut in zip(parts, cuts, strict=True)]
                for name, value in self._step(step).items():
                    sums[name] = sums.get(name, 0.0) + value / (self.epochs * count)
        return sums

    def accumulate(self, part: Part) -> Metrics:
        """Add this rank's part of the gradient of one minibatch's loss to the modules; returns the mean of each term.

        The counts are those of the whole minibatch, so the gradient depends neither on the microbatches nor, once it
        is summed over the ranks, on how many these are.
        """
        device = next(next(iter(self.modules.values())).parameters()).device
        rows = len(part.batch)
        mask = getattr(part.batch, "token_mask", None)
        counts = {"row": rows, "token": 0 if mask is None else int(mask.sum())}
        means: dict[str, float] = {}
        for index in part.microbatches(part.batch, self.tokens_at_once):
            with out_of_memory.reading(part.batch.lengths[index], self.tokens_at_once):
                microbatch = part.batch.select(index).to(device)
                total = torch.zeros((), device=device)
                for term in part.loss(part.forward(microbatch), microbatch):
                    values = term.values.where(microbatch.token_mask, 0) if term.per == "token" else term.values
                    mean = values.sum() / counts[term.per]
                    means[term.name] = means.get(term.name, 0.0) + mean.item()
                    if term.weight:
                        total = total + part.weight * term.weight * mean
                total.backward()
        return ranks.sum_by_name(means)

    def _step(self, parts: Sequence[Part]) -> Metrics:
        self.optimiser.zero_grad(set_to_none=True)
        metrics: Metrics = {}
        for part in parts:
            metrics |= self.accumulate(part)
        for name, module in self.modules.items():
            ranks.sum_gradients(module.parameters())
            norm = nn.utils.clip_grad_norm_(module.parameters(), self.max_grad_norm)
            metrics[f"grad_norm/{name}"] = norm.item()
        if broken := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"{', '.join(broken)} not finite at optimiser step {self.updates}; the weights were not changed by it; "
                "lower the learning rate, or look at the last samples"
            )
        factor = self.rate_factor()
        for group, rate in zip(self.optimiser.param_groups, self.lr.values(), strict=True):
            group["lr"] = rate * factor
        self.optimiser.step()
        self.updates += 1
        return metrics | {"lr": next(iter(self.lr.values())) * factor}

    def state_dict(self) -> dict[str, Any]:
        """What changes beside the modules; the ranks make sure first that they have the same ones.

        Raises:
            RuntimeError: they have not; a checkpoint of this would be a mixture.
        """
        for name, module in self.modules.items():
            ranks.check_equal(f"weights of {name}", module.parameters())
        return {"updates": self.updates, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.optimiser.load_state_dict(state["optimiser"])
