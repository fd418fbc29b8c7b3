"""Bradley-Terry reward model on rankings: each response scores higher than every one behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlhf_lab.functional.losses import bradley_terry
from rlhf_lab.types import NonNegative, RankingBatch, ScoreForward, Term


@dataclass(frozen=True, kw_only=True)
class RankingModel:
    """L = mean over pairs i before j of a ranking of [-log sigmoid(s_i - s_j) + l2 (s_i^2 + s_j^2) / 2].

    Every ranking weighs the same, whatever its length. Each response is read once, not once for each of its pairs.
    With two responses it is the reward model's loss.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; Coste et al. 2024, arXiv:2310.02743, for l2.
    """

    trains: ClassVar[str] = "scorer"
    reads: ClassVar[str] = "rankings"

    l2: NonNegative

    def loss(self, new: ScoreForward, batch: RankingBatch) -> Sequence[Term]:
        s = torch.stack(new.scores, 1)  # (B, K)
        better, worse = s[:, :, None], s[:, None, :]  # entry (i, j) of a row compares its responses i and j
        pairs = (batch.present[:, :, None] & batch.present[:, None, :]).triu(1).float()
        weight = pairs / pairs.sum((1, 2), keepdim=True)  # (B, K, K), 1 in all
        squares = (better.square() + worse.square()) / 2
        return [
            Term("pairwise", (weight * bradley_terry(better, worse)).sum((1, 2)), "row"),
            Term("l2", (weight * squares).sum((1, 2)), "row", self.l2),
            Term("accuracy", (weight * (better > worse)).sum((1, 2)), "row", 0.0),
        ]
