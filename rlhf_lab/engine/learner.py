"""Batches x losses -> optimiser steps. The only code that averages a loss, and so the only one that knows counts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rlhf_lab.engine import out_of_memory, ranks
from rlhf_lab.engine.distribution import Distribution, in_step
from rlhf_lab.engine.hardware import Hardware
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
        distribution: where the weights are among the processes; null: all on every one.

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
        distribution: Distribution | None = None,
    ) -> None:
        if missing := sorted(modules.keys() - lr.keys()):
            raise ValueError(f"learner.lr has {sorted(lr)}, but {missing} learn too; add learner.lr.{missing[0]}")
        self.modules, self.lr = dict(modules), {name: lr[name] for name in modules}
        self.epochs, self.minibatch_size, self.tokens_at_once = epochs, minibatch_size, tokens_at_once
        self.schedule, self.warmup, self.total_updates = schedule, warmup, total_updates
        self.max_grad_norm = max_grad_norm
        self.updates = 0
        self.distribution = distribution or Distribution.of(Hardware(device="cpu", dtype="float32", threads=1))
        self.training = self.distribution.learning(modules, betas, weight_decay)

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

    def accumulate(self, part: Part, last: bool = True) -> Metrics:
        """Add this rank's part of the gradient of one minibatch's loss to the modules; returns the mean of each term.

        The counts are those of the whole minibatch, so the gradient depends neither on the microbatches nor, once it
        is summed over the ranks, on how many these are.

        Args:
            last: whether no other part of the minibatch follows.
        """
        rows = len(part.batch)
        mask = getattr(part.batch, "token_mask", None)
        counts = {"row": rows, "token": 0 if mask is None else int(mask.sum())}
        means: dict[str, float] = {}
        own = part.microbatches(part.batch, self.tokens_at_once)
        pieces = in_step(own) if self.training.in_step else [(index, True) for index in own]
        for i, (index, is_counted) in enumerate(pieces, 1):
            with out_of_memory.reading(part.batch.lengths[index], self.tokens_at_once):
                microbatch = part.batch.select(index).to(self.training.device)
                terms: list[tuple[str, Tensor]] = []
                total = self.training.loss(partial(self._total, part, microbatch, counts, terms))
                for name, mean in terms if is_counted else ():
                    means[name] = means.get(name, 0.0) + mean.item()
                self.training.backward(total if is_counted else total * 0, last and i == len(pieces))
        return ranks.sum_by_name(means)

    @staticmethod
    def _total(part: Part, microbatch: Any, counts: Mapping[str, int], terms: list[tuple[str, Tensor]]) -> Tensor:
        """What a microbatch adds to the loss; what it adds to the mean of each term is left in `terms`."""
        total = torch.zeros((), device=microbatch.lengths.device)
        for term in part.loss(part.forward(microbatch), microbatch):
            values = term.values.where(microbatch.token_mask, 0) if term.per == "token" else term.values
            mean = values.sum() / counts[term.per]
            terms.append((term.name, mean.detach()))
            if term.weight:
                total = total + part.weight * term.weight * mean
        return total

    def _step(self, parts: Sequence[Part]) -> Metrics:
        self.training.clear()
        metrics: Metrics = {}
        for i, part in enumerate(parts, 1):
            metrics |= self.accumulate(part, last=i == len(parts))
        norms = self.training.clip(self.max_grad_norm)
        metrics |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        if broken := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"{', '.join(broken)} not finite at optimiser step {self.updates}; the weights were not changed by it; "
                "lower the learning rate, or look at the last samples"
            )
        factor = self.rate_factor()
        self.training.step({name: rate * factor for name, rate in self.lr.items()})
        self.updates += 1
        return metrics | {"lr": next(iter(self.lr.values())) * factor}

    def state_dict(self) -> dict[str, Any]:
        """What changes beside the modules, whatever their distribution."""
        return {"updates": self.updates, "optimiser": self.training.moments()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.training.restore(state["optimiser"])
