"""Cost model: the less safe response costs more, and the sign of a cost says whether the response is unsafe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from rlhf_lab.functional.losses import bradley_terry
from rlhf_lab.functional.spans import Level, compared
from rlhf_lab.types import NonNegative, SafetyPairBatch, ScoreForward, Term


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """L = -log sigmoid(c_H - c_L) - w [log sigmoid(z_L c_L) + log sigmoid(z_H c_H)] + l2 (c_L^2 + c_H^2) / 2,

    c_L of the safer response, c_H of the other, z = +1 for unsafe and -1 for safe.

    Args:
        sign_weight: w. 1 as in the paper (eq. 6); 0 leaves the pairwise term, and with it no meaning to "cost <= 0"
            until the model is calibrated.
        level: where the costs are compared and their signs asked for, as for the reward model.
        l2: weight of the squared scores.

    Source: Dai et al. 2023, arXiv:2310.12773, eq. 6.
    """

    trains: ClassVar[str] = "scorer"
    reads: ClassVar[str] = "safety_pairs"

    level: Level
    sign_weight: NonNegative
    l2: NonNegative

    @property
    def token_scores(self) -> bool:
        """Whether it reads a cost after every token."""
        return self.level == "token"

    def loss(self, new: ScoreForward, batch: SafetyPairBatch) -> Sequence[Term]:
        low, high, weight = compared(new, batch.texts, self.level)  # first: the safer
        z_low, z_high = batch.safer_sign, batch.unsafer_sign
        signs = -F.logsigmoid(z_low[:, None] * low) - F.logsigmoid(z_high[:, None] * high)
        right = (z_low * new.first > 0).float() + (z_high * new.second > 0).float()
        return [
            Term("pairwise", (weight * bradley_terry(high, low)).sum(1), "row"),
            Term("sign", (weight * signs).sum(1), "row", self.sign_weight),
            Term("l2", (weight * (low.square() + high.square())).sum(1) / 2, "row", self.l2),
            Term("accuracy", (new.second > new.first).float(), "row", 0.0),
            Term("accuracy_sign", right / 2, "row", 0.0),
        ]
