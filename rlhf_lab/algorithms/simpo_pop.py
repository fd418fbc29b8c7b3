"""SimPO-PoP: DPO-PoP over mean log-probabilities, without a reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlhf_lab.algorithms.preference import preference_terms
from rlhf_lab.algorithms.simpo import Length, mean_logprobs
from rlhf_lab.types import Fraction, PairBatch, PairForward, Positive, Term


@dataclass(frozen=True, kw_only=True)
class SimPOPoP:
    """L = -log sigmoid(beta (a_P - clamp(sg(a_Q), margin_min, margin_max))),  a = log pi_w / |w| - log pi_l / |l|.

    Args:
        beta: reward units per nat of a mean log-probability.
        margin_min, margin_max: in nats per token, inside beta.
        ema_decay: tau of the policy whose a_Q it is; 0 is the policy as it is before the step, see `DPOPoP`.
        length: what |y| counts, see `mean_logprobs`.

    Source: the released code of Chittepu et al. 2025, arXiv:2509.22851 (simpo_pop_fixed_ema).
    """

    trains: ClassVar[str] = "policy"
    reads: ClassVar[str] = "quadruples"

    beta: Positive
    margin_min: float
    margin_max: float
    ema_decay: Fraction
    length: Length

    def __post_init__(self) -> None:
        if self.margin_min > self.margin_max:
            raise ValueError(
                f"algorithm.margin_min={self.margin_min} is over algorithm.margin_max={self.margin_max}; swap them"
            )

    def weak_margin(self, said: PairForward, weak: PairBatch) -> Tensor:
        """(B,): the clamped a_Q, from what the guiding policy says of the weaker pairs."""
        chosen, rejected = mean_logprobs(said, weak, self.length)
        return (chosen - rejected).clamp(self.margin_min, self.margin_max)

    def loss(self, new: PairForward, batch: PairBatch) -> Sequence[Term]:
        """`batch` holds the stronger pairs, and as their margin that of the weaker ones."""
        chosen, rejected = mean_logprobs(new, batch, self.length)
        return preference_terms(self.beta * chosen, self.beta * rejected, self.beta * batch.margin)
