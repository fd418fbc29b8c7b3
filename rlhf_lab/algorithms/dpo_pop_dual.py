"""DPO on both pairs of a quadruple, constrained to the order of their margins."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlhf_lab.functional.losses import bradley_terry
from rlhf_lab.interfaces import Constraint, Stateful
from rlhf_lab.types import Metrics, Positive, QuadrupleBatch, QuadrupleForward, Term


@dataclass(frozen=True, kw_only=True)
class DPOPoPDual:
    """L = (-log sigmoid(beta m_P) - log sigmoid(beta m_Q)) / 2 + lambda g,  g = -log sigmoid(beta (m_P - m_Q)) - log 2,

    m = h_w - h_l, h = log pi / pi_ref, P the stronger and Q the weaker pair: g < 0 where m_P > m_Q, and lambda rises
    while the mean of g is over the constraint's limit.

    Source: the released code of Chittepu et al. 2025, arXiv:2509.22851 (dpo_pop).
    """

    trains: ClassVar[str] = "policy"
    reads: ClassVar[str] = "quadruples"
    uses_reference: ClassVar[bool] = True

    beta: Positive
    constraint: Constraint

    @property
    def stateful(self) -> Mapping[str, Stateful]:
        return {"order": self.constraint}

    def observe(self, means: Metrics) -> Metrics:
        """Dual ascent on the mean g of the step, of which the constraint keeps a window."""
        measured = self.constraint.step(torch.tensor([means["order"]], dtype=torch.float64))
        return {f"lagrange/order/{name}": value for name, value in measured.items()}

    def loss(self, new: QuadrupleForward, batch: QuadrupleBatch) -> Sequence[Term]:
        strong_w, strong_l = (self.beta * h for h in new.strong.log_ratios(batch.strong.reference))
        weak_w, weak_l = (self.beta * h for h in new.weak.log_ratios(batch.weak.reference))
        strong, weak = strong_w - strong_l, weak_w - weak_l  # beta m_P, beta m_Q: (B,)
        pairs = bradley_terry(strong_w, strong_l) + bradley_terry(weak_w, weak_l)
        order = bradley_terry(strong, weak) - math.log(2)
        return [
            Term("pairwise", pairs / 2, "row"),
            Term("order", order, "row", self.constraint.multiplier),
            Term("accuracy", ((strong > 0).float() + (weak > 0).float()) / 2, "row", 0.0),
            Term("accuracy_order", (strong > weak).float(), "row", 0.0),
            Term("implicit_reward/strong", strong.detach(), "row", 0.0),
            Term("implicit_reward/weak", weak.detach(), "row", 0.0),
        ]
