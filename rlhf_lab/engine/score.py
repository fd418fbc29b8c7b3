"""Rollout -> ScoredRollout: every reward source, the reference and the critics, once and without gradient."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lab.engine import out_of_memory, ranks
from rlhf_lab.engine.forward import critic_values, policy_forward
from rlhf_lab.engine.models import Critics
from rlhf_lab.interfaces import RewardSource
from rlhf_lab.types import Rollout, ScoredRollout, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def by_length(
    sequences: Sequences, tokens_at_once: int, device: torch.device, compute: Callable[[Sequences], Tensor]
) -> Tensor:
    """Apply `compute` ((b, …) rows -> (b, …)) to rows of similar length together, within a token budget.

    Returns the results in the order of the rows, on the CPU. Each rank computes its share of the rows.
    """
    parts = own_microbatches(sequences.lengths, tokens_at_once)
    mine: list[Tensor] = []
    for part in parts:
        with out_of_memory.reading(sequences.lengths[part], tokens_at_once):
            mine.append(compute(sequences.select(part).to(device)).cpu())
    results = ranks.gather_rows(torch.cat(mine) if mine else None)
    order = ranks.dealt(sequences.lengths.argsort(stable=True))
    return torch.empty_like(results).index_copy_(0, order, results)


def own_microbatches(lengths: Tensor, tokens_at_once: int) -> list[Tensor]:
    """The microbatches of this rank's share of the rows; perhaps none. Alone: those of all rows."""
    mine = ranks.share(lengths.argsort(stable=True))
    return [mine[group] for group in microbatches(lengths[mine], tokens_at_once)]


def microbatches(lengths: Tensor, tokens_at_once: int) -> list[Tensor]:
    """Split rows into groups of similar length, rows x longest within the budget; a longer row stands alone.

    Prompts and responses are padded apart, so the columns can exceed the longest row, by a factor of two at worst.

    Args:
        lengths: (B,) int64, real tokens of each row.

    Returns:
        Row indices of each group; together every row once.
    """
    groups: list[list[int]] = []
    for row in lengths.argsort(stable=True).tolist():  # ascending: the newest row is the widest of its group
        if groups and (len(groups[-1]) + 1) * int(lengths[row]) <= tokens_at_once:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [torch.tensor(group) for group in groups]


class Scorer:
    """Everything that is measured on a rollout before any learning."""

    def __init__(
        self,
        *,
        rewards: Mapping[str, RewardSource],
        reference: "PreTrainedModel",
        critics: Critics | None,
        temperature: float,
        tokens_at_once: int,
    ) -> None:
        self.rewards, self.reference, self.critics = dict(rewards), reference, critics
        self.temperature, self.tokens_at_once = temperature, tokens_at_once

    @property
    def num_models(self) -> int:
        """How many models read each response; a source that has none, such as a gold measure, counts as none."""
        own = 1 if self.critics is None else 2
        return own + sum(getattr(source, "num_models", 0) for source in self.rewards.values())

    @torch.no_grad()
    def score(self, rollout: Rollout) -> ScoredRollout:
        """Scores by name, the reference's log-probabilities at the sampling temperature, and the critics' values."""
        sequences, critics = rollout.sequences, self.critics
        device, budget = self.reference.device, self.tokens_at_once
        values: dict[str, Tensor] = {}
        if critics is not None:
            stacked = by_length(
                sequences, budget, device, lambda part: torch.stack([*critic_values(critics, part).values()], -1)
            )
            values = {name: stacked[..., k] for k, name in enumerate(critics.names)}
        return ScoredRollout(
            rollout=rollout,
            scores={name: source.score(rollout) for name, source in self.rewards.items()},
            ref_logprobs=by_length(
                sequences,
                budget,
                device,
                lambda part: policy_forward(self.reference, part, temperature=self.temperature).logprobs,
            ),
            values=values,
        )

    def without_critics(self, temperature: float) -> "Scorer":
        """The same sources and reference for responses sampled at another temperature, to be measured only."""
        return Scorer(
            rewards=self.rewards,
            reference=self.reference,
            critics=None,
            temperature=temperature,
            tokens_at_once=self.tokens_at_once,
        )
