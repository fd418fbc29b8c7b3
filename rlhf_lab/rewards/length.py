"""The length of a response as a score, to be held below a limit or weighed by an objective."""

from collections.abc import Collection
from typing import Self

from rlhf_lab.data.templates import Template
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.types import Positive, Rollout, Score


class Length:
    """Tokens of the policy's tokenizer, the EOS included; higher is longer.

    Args:
        unit: tokens that count as 1, so that a multiplier can have the size that it has for other costs.
    """

    def __init__(self, unit: Positive) -> None:
        self.unit = unit

    def check(self, promised: Collection[str] = ()) -> None:
        """There is nothing to load."""

    def load(self, hardware: Hardware, policy: Template) -> Self:
        return self

    def score(self, rollout: Rollout) -> Score:
        value = rollout.sequences.response_mask.sum(1).float() / self.unit
        return Score(value=value, members=value[:, None])
