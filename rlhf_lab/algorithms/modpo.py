"""Multi-objective DPO: one preference data set, and trained rewards for everything else that counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlhf_lab.algorithms.preference import preference_terms
from rlhf_lab.types import PairBatch, PairForward, Positive, Term


@dataclass(frozen=True, kw_only=True)
class MODPO:
    """L = -log sigmoid(beta / w_k (h_w - h_l) - 1 / w_k w_-k^T (r_-k(y_w) - r_-k(y_l))),  h = log pi / pi_ref.

    Its optimum maximises E[w_k r_k + w_-k^T r_-k] - beta KL(pi || pi_ref), r_k being the reward that the preferences
    follow by Bradley-Terry, known only through them. Without other rewards and with w_k = 1 it is DPO.

    Args:
        beta: in reward units per nat.
        weight: w_k, of the reward in the preferences.
        others: w_-k, score -> its weight; the table has `score_<name>` of both responses (stage=score_table). A
            negative weight makes a cost of it.

    Source: Zhou et al. 2023, arXiv:2310.03708, eq. 8.
    """

    trains: ClassVar[str] = "policy"
    reads: ClassVar[str] = "preferences"
    uses_reference: ClassVar[bool] = True

    beta: Positive
    weight: Positive
    others: Mapping[str, float]

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores of the pairs that it reads."""
        return tuple(self.others)

    def loss(self, new: PairForward, batch: PairBatch) -> Sequence[Term]:
        chosen, rejected = new.log_ratios(batch.reference)  # h_w, h_l: (B,)
        others = sum((w * batch.gaps[name] for name, w in self.others.items()), torch.zeros_like(batch.margin))
        beta = self.beta / self.weight
        return preference_terms(beta * chosen, beta * rejected, others / self.weight)
