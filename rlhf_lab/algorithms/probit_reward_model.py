"""A reward model that says how sure it is: each score is a normal variable, and the preferred one draws the higher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf_lab.functional.losses import probit
from rlhf_lab.types import GAUSSIAN, NonNegative, PairBatch, ScoreForward, Term


@dataclass(frozen=True, kw_only=True)
class ProbitRewardModel:
    """L = -log Phi((m_w - m_l) / sqrt(e^{v_w} + e^{v_l})) + l2 (m_w^2 + m_l^2 + v_w^2 + v_l^2) / 4.

    m is the mean of a response's score and v the logarithm of its variance, the two outputs of the head. The data say
    nothing of a factor that all deviations share with all means; l2 draws the variances to 1.

    Args:
        l2: weight of the mean square of the four outputs.

    Source: Thurstone 1927; as a reward model, the released code of HC-RLHF (values/reward_dist/trainer.py), which takes
    the logarithm of Phi + 1e-8 and so has no gradient where the model is sure and wrong.
    """

    trains: ClassVar[str] = "scorer"
    reads: ClassVar[str] = "preferences"
    outputs: ClassVar[tuple[str, ...]] = GAUSSIAN

    l2: NonNegative

    def loss(self, new: ScoreForward, batch: PairBatch) -> Sequence[Term]:
        v_w, v_l = new.log_variances
        squares = new.first.square() + new.second.square() + v_w.square() + v_l.square()
        return [
            Term("pairwise", probit(new.first, new.second, v_w, v_l), "row"),
            Term("l2", squares / 4, "row", self.l2),
            Term("accuracy", (new.first > new.second).float(), "row", 0.0),
            Term("log_variance", (v_w + v_l) / 2, "row", 0.0),
        ]
