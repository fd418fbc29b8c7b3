"""SimPO: preferences over mean log-probabilities, without a reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rlhf_lab.algorithms.preference import Margin, preference_terms
from rlhf_lab.functional.spans import diverging
from rlhf_lab.types import PairBatch, PairForward, Positive, Term

Length = Literal["answer", "divergence"]


def mean_logprobs(new: PairForward, batch: PairBatch, length: Length) -> tuple[Tensor, Tensor]:
    """(B,) each: log pi(y|x) / |y| of the chosen and of the rejected response.

    Args:
        length: "answer", over whole responses as in the paper; "divergence", over each from the first token in which
            the two differ, as in safe-rlhf's code, so that a common beginning counts neither in sum nor in length.
    """
    sums, lengths = [], []
    differs = diverging(*batch.texts) if length == "divergence" else None
    for said, text in zip((new.chosen, new.rejected), batch.texts, strict=True):
        span = text.response_mask if differs is None else text.response_mask & differs[:, : said.logprobs.shape[1]]
        sums.append(said.logprobs.where(span, 0).sum(1))
        lengths.append(span.sum(1))
    return sums[0] / lengths[0], sums[1] / lengths[1]


@dataclass(frozen=True, kw_only=True)
class SimPO:
    """L = -log sigmoid(beta (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - M).

    Args:
        beta: reward units per nat of a mean log-probability; much larger than DPO's, whose sums are over all tokens.
        margin: M, the paper's gamma if constant.
        length: what |y| counts, see `mean_logprobs`.

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """

    trains: ClassVar[str] = "policy"
    reads: ClassVar[str] = "preferences"

    beta: Positive
    margin: Margin
    length: Length

    @property
    def use_margin(self) -> bool:
        return self.margin.scale > 0

    def loss(self, new: PairForward, batch: PairBatch) -> Sequence[Term]:
        chosen, rejected = mean_logprobs(new, batch, self.length)  # (B,) nats per token
        return preference_terms(self.beta * chosen, self.beta * rejected, self.margin(batch, self.beta))
