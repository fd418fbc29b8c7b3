"""Cost model: the less safe response costs more, and the sign of a cost says whether the response is unsafe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from rlhf_lab.functional.losses import bradley_terry
from rlhf_lab.types import NonNegative, SafetyPairBatch, ScoreForward, Term


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """L = -log sigmoid(c_H - c_L) - w [log sigmoid(z_L c_L) + log sigmoid(z_H c_H)] + l2 (c_L^2 + c_H^2) / 2,

    c_L of the safer response, c_H of the other, z = +1 for unsafe and -1 for safe.

    Args:
        sign_weight: w. 1 as in the paper (eq. 6); 0 leaves the pairwise term, and with it no meaning to "cost <= 0"
            until the model is calibrated.
        l2: weight of the squared scores.

    Source: Dai et al. 2023, arXiv:2310.12773, eq. 6.
    """

    trains: ClassVar[str] = "scorer"
    reads: ClassVar[str] = "safety_pairs"

    sign_weight: NonNegative
    l2: NonNegative

    def loss(self, new: ScoreForward, batch: SafetyPairBatch) -> Sequence[Term]:
        low, high = new.first, new.second  # first: the safer
        signs = -F.logsigmoid(batch.safer_sign * low) - F.logsigmoid(batch.unsafer_sign * high)
        right = (batch.safer_sign * low > 0).float() + (batch.unsafer_sign * high > 0).float()
        return [
            Term("pairwise", bradley_terry(high, low), "row"),
            Term("sign", signs, "row", self.sign_weight),
            Term("l2", (low.square() + high.square()) / 2, "row", self.l2),
            Term("accuracy", (high > low).float(), "row", 0.0),
            Term("accuracy_sign", right / 2, "row", 0.0),
        ]
