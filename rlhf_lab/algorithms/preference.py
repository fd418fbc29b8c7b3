"""What the methods on pairs of responses share: the margin by which the chosen one is to win, and the loss's terms."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_lab.functional.losses import bradley_terry
from rlhf_lab.types import NonNegative, PairBatch, Term


@dataclass(frozen=True, kw_only=True)
class Margin:
    """M = constant + scale * m, m the margin of each pair in the data.

    Args:
        constant: the same for every pair.
        scale: of the data's margin, which may be negative where a score contradicts the label; 0 reads none.
        unit: "reward" takes M from the difference of the implicit rewards, beta x - M; "log_ratio" from the difference
            of the log-probabilities that beta multiplies, beta (x - M).
    """

    constant: float
    scale: NonNegative
    unit: Literal["reward", "log_ratio"]

    def __call__(self, batch: PairBatch, beta: float) -> Tensor:
        """(B,) in units of the implicit reward."""
        margin = self.constant + self.scale * batch.margin
        return margin if self.unit == "reward" else beta * margin


def preference_terms(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float, *, label_smoothing: float = 0.0
) -> list[Term]:
    """-(1 - eps) log sigmoid(z) - eps log sigmoid(-z), z = r_w - r_l - M; and what is reported of it.

    Args:
        chosen, rejected: (B,) implicit rewards r_w and r_l.
        margin: (B,) M, in their units; B margins give B losses.
        label_smoothing: eps, the share of labels that are taken to be wrong (conservative DPO,
            Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO").
    """
    right = bradley_terry(chosen, rejected, margin)
    wrong = bradley_terry(rejected, chosen, -margin)
    return [
        Term("pairwise", (1 - label_smoothing) * right + label_smoothing * wrong, "row"),
        Term("accuracy", (chosen > rejected).float(), "row", 0.0),
        Term("implicit_reward/chosen", chosen.detach(), "row", 0.0),
        Term("implicit_reward/rejected", rejected.detach(), "row", 0.0),
        Term("margin", torch.as_tensor(margin, device=chosen.device).expand_as(chosen), "row", 0.0),
    ]
