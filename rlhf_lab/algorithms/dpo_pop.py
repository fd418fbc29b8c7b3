"""DPO-PoP: the margin of a pair is what the policy already makes of a pair that is known to be weaker."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlhf_lab.algorithms.preference import preference_terms
from rlhf_lab.types import Fraction, PairBatch, PairForward, Positive, Term


@dataclass(frozen=True, kw_only=True)
class DPOPoP:
    """L = -log sigmoid(beta (m_P - clamp(sg(m_Q), margin_min, margin_max))),  m = h_w - h_l,  h = log pi / pi_ref.

    P is the stronger preference of a quadruple and Q the weaker one, by which the policy is not trained.

    Args:
        beta: in reward units per nat.
        margin_min, margin_max: in nats, inside beta.
        ema_decay: tau of the policy whose m_Q it is, theta_ema <- tau theta_ema + (1 - tau) theta after each optimiser
            step; 0 is the policy as it is before the step.

    Source: Chittepu et al. 2025, arXiv:2509.22851, and its released code (dpo_pop_fixed, dpo_pop_fixed_ema), whose
    average is in bfloat16 and hardly leaves its start; here it is in float32.
    """

    trains: ClassVar[str] = "policy"
    reads: ClassVar[str] = "quadruples"
    uses_reference: ClassVar[bool] = True

    beta: Positive
    margin_min: float
    margin_max: float
    ema_decay: Fraction

    def __post_init__(self) -> None:
        if self.margin_min > self.margin_max:
            raise ValueError(
                f"algorithm.margin_min={self.margin_min} is over algorithm.margin_max={self.margin_max}; swap them"
            )

    def weak_margin(self, said: PairForward, weak: PairBatch) -> Tensor:
        """(B,): the clamped m_Q, from what the guiding policy says of the weaker pairs."""
        chosen, rejected = said.log_ratios(weak.reference)
        return (chosen - rejected).clamp(self.margin_min, self.margin_max)

    def loss(self, new: PairForward, batch: PairBatch) -> Sequence[Term]:
        """`batch` holds the stronger pairs, and as their margin that of the weaker ones."""
        chosen, rejected = new.log_ratios(batch.reference)
        return preference_terms(self.beta * chosen, self.beta * rejected, self.beta * batch.margin)
