"""Bradley-Terry reward model: the preferred response scores higher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf_lab.functional.losses import bradley_terry
from rlhf_lab.functional.spans import Level, compared
from rlhf_lab.types import NonNegative, PairBatch, ScoreForward, Term


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """L = -log sigmoid(s_w - s_l - margin) + l2 (s_w^2 + s_l^2) / 2.

    Args:
        level: "sequence" compares the scores at the ends of the responses; "token" those after every token from where
            the responses part, see `functional/spans.py`, averaged over these.
        l2: keeps the scores, which the likelihood knows only up to a shift, near 0; at the same positions.
        use_margin: ask the preferred response to win by the margin that the data give.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; l2 as in Safe RLHF, arXiv:2310.12773, eq. 13;
    margin as in Llama 2, arXiv:2307.09288, eq. 2.
    """

    trains: ClassVar[str] = "scorer"
    reads: ClassVar[str] = "preferences"

    level: Level
    l2: NonNegative
    use_margin: bool

    @property
    def token_scores(self) -> bool:
        """Whether it reads a score after every token."""
        return self.level == "token"

    def loss(self, new: ScoreForward, batch: PairBatch) -> Sequence[Term]:
        margin = batch.margin[:, None] if self.use_margin else 0.0
        first, second, weight = compared(new, batch.texts, self.level)
        return [
            Term("pairwise", (weight * bradley_terry(first, second, margin)).sum(1), "row"),
            Term("l2", (weight * (first.square() + second.square())).sum(1) / 2, "row", self.l2),
            Term("accuracy", (new.first > new.second).float(), "row", 0.0),
        ]
