"""Supervised fine-tuning: maximise the likelihood of the demonstrated responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf_lab.types import PolicyForward, Term, TextBatch


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Cross-entropy on response tokens only, every token weighing the same."""

    trains: ClassVar[str] = "policy"
    reads: ClassVar[str] = "demonstrations"

    def loss(self, new: PolicyForward, batch: TextBatch) -> Sequence[Term]:
        return [Term("nll", -new.logprobs, "token")]
