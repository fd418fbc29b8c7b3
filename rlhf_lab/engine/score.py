"""Rollout -> ScoredRollout: every reward source, the reference and the critics, once and without gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rlhf_lab.engine import out_of_memory, ranks
from rlhf_lab.engine.critics import Critics
from rlhf_lab.engine.distribution import in_step, is_in_step, through
from rlhf_lab.engine.forward import critic_values, policy_logprobs
from rlhf_lab.engine.prefixes import shares_prefixes, siblings
from rlhf_lab.interfaces import RewardSource
from rlhf_lab.types import Rollout, ScoredRollout, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HasLengths(Protocol):
    @property
    def lengths(self) -> Tensor:
        """(B,) int64, real tokens of each row."""
        ...


def by_length(
    sequences: Sequences,
    tokens_at_once: int,
    device: torch.device,
    compute: Callable[[Sequences], Tensor],
    *,
    together: bool = False,
) -> Tensor:
    """Apply `compute` ((b, …) rows -> (b, …)) to rows of similar length together, within a token budget.

    Returns the results in the order of the rows, on the CPU. Each rank computes its share of the rows.

    Args:
        together: rows that answer one prompt stay together, for a model that shares prefixes; a prompt counts once.
    """
    parts = (own_family_microbatches if together else own_microbatches)(sequences, tokens_at_once)
    if together:
        units, world = families(sequences), ranks.world()
        order = torch.cat([rows for one in range(world) for rows in units[one::world]])
    else:
        order = ranks.dealt(sequences.lengths.argsort(stable=True))
    mine: list[Tensor] = []
    for part, is_counted in in_step(parts) if is_in_step(compute) else [(part, True) for part in parts]:
        with out_of_memory.reading(sequences.lengths[part], tokens_at_once):
            rows = compute(sequences.select(part).to(device)).cpu()
        mine += [rows] if is_counted else []
    results = ranks.gather_rows(torch.cat(mine) if mine else None)
    return torch.empty_like(results).index_copy_(0, order, results)


def families(sequences: Sequences) -> list[Tensor]:
    """The rows that answer each prompt, the least work first."""
    _, parent = siblings(sequences)
    order = parent.argsort(stable=True)
    rows = list(order.split(parent.bincount().tolist()))
    lengths = sequences.lengths
    return sorted(rows, key=lambda family: int(lengths[family].sum()))


def family_microbatches(sequences: Sequences, units: Sequence[Tensor], tokens_at_once: int) -> list[Tensor]:
    """Cut families into microbatches of at most as many tokens, each prompt counted once in each.

    A family that is larger is cut, which repeats its prompt; a row that is larger stands alone.
    """
    responses = sequences.attention_mask[:, sequences.prompt_width :].sum(1).tolist()
    prompts = sequences.attention_mask[:, : sequences.prompt_width].sum(1).tolist()
    groups: list[list[int]] = []
    room = 0
    for family in units:
        rows = family.tolist()
        need = prompts[rows[0]] + sum(responses[row] for row in rows)
        if need <= room:  # the usual case: all of it fits
            groups[-1] += rows
            room -= need
            continue
        groups.append([])
        room = tokens_at_once - prompts[rows[0]]
        for row in rows:
            if groups[-1] and responses[row] > room:
                groups.append([])
                room = tokens_at_once - prompts[row]
            groups[-1].append(row)
            room -= responses[row]
    return [torch.tensor(group) for group in groups]


def own_microbatches(rows: HasLengths, tokens_at_once: int) -> list[Tensor]:
    """The microbatches of this rank's share of the rows; perhaps none. Alone: those of all rows."""
    lengths = rows.lengths
    mine = ranks.share(lengths.argsort(stable=True))
    return [mine[group] for group in microbatches(lengths[mine], tokens_at_once)]


def own_family_microbatches(sequences: Sequences, tokens_at_once: int) -> list[Tensor]:
    """Those of this rank's share of the prompts, for a model that shares prefixes."""
    return family_microbatches(sequences, ranks.share(families(sequences)), tokens_at_once)


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
        tokens_at_once: int,
    ) -> None:
        self.rewards, self.reference, self.critics = dict(rewards), reference, critics
        self.tokens_at_once = tokens_at_once

    def num_models(self, rollout: Rollout) -> int:
        """How many models read each response; a source that has none, such as a gold measure, counts as none."""
        own = 1 if self.critics is None or rollout.values else 2
        return own + sum(getattr(source, "num_models", 0) for source in self.rewards.values())

    @torch.no_grad()
    def score(self, rollout: Rollout) -> ScoredRollout:
        """Scores by name, the reference's log-probabilities, processed as in sampling, and the critics' values.

        A token that was drawn is among those that were left to be drawn, so that no log-probability of it is infinite.
        Values that the rollout brought along are taken as they are.
        """
        sequences, critics = rollout.sequences, self.critics
        device, budget = self.reference.device, self.tokens_at_once
        values = rollout.values
        if critics is not None and not values:
            stacked = by_length(
                sequences,
                budget,
                device,
                through(critics, lambda part: torch.stack([*critic_values(critics, part).values()], -1)),
                together=shares_prefixes(critics.trunk),
            )
            values = {name: stacked[..., k] for k, name in enumerate(critics.names)}
        return ScoredRollout(
            rollout=rollout,
            scores={name: source.score(rollout) for name, source in self.rewards.items()},
            ref_logprobs=by_length(
                sequences,
                budget,
                device,
                through(
                    self.reference,
                    lambda part: policy_logprobs(self.reference, part, processing=rollout.processing),
                ),
                together=shares_prefixes(self.reference),
            ),
            values=values,
        )

    def without_critics(self) -> "Scorer":
        """The same sources and reference, for responses that are measured only."""
        return Scorer(rewards=self.rewards, reference=self.reference, critics=None, tokens_at_once=self.tokens_at_once)
