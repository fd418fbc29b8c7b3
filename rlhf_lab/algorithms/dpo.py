"""Direct preference optimisation, with a margin if one is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf_lab.algorithms.preference import Margin, preference_terms
from rlhf_lab.types import Fraction, PairBatch, PairForward, Positive, Term


@dataclass(frozen=True, kw_only=True)
class DPO:
    """L = -log sigmoid(beta (h_w - h_l) - M),  h = log pi(y|x) - log pi_ref(y|x).

    Its optimum, on preferences by Bradley-Terry, maximises E[reward] - beta KL(pi || pi_ref).

    Args:
        beta: in reward units per nat.
        margin: M; 0 is DPO as published. A constant M > 0 widens every difference: where a beats b with the odds r,
            u = exp(beta (h_a - h_b)) has its optimum at m u^2 + (1 - r) u - r m = 0, m = exp(-M), instead of at r.
            A margin that changes its sign with the order of the pair shifts the log-odds by itself.
        label_smoothing: share of labels that are taken to be wrong.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with an offset, Amini et al. 2024, arXiv:2402.10571, eq. 8.
    """

    trains: ClassVar[str] = "policy"
    reads: ClassVar[str] = "preferences"
    uses_reference: ClassVar[bool] = True

    beta: Positive
    margin: Margin
    label_smoothing: Fraction

    @property
    def use_margin(self) -> bool:
        return self.margin.scale > 0

    def loss(self, new: PairForward, batch: PairBatch) -> Sequence[Term]:
        chosen, rejected = new.log_ratios(batch.reference)  # h_w, h_l: (B,)
        margin = self.margin(batch, self.beta)
        return preference_terms(self.beta * chosen, self.beta * rejected, margin, label_smoothing=self.label_smoothing)
