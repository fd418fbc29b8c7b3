"""The true scores of an embedded world: what a study measures, never what a policy is trained on."""

from collections.abc import Callable, Collection
from typing import Self

import torch

from rlhf_lab.data.templates import Template
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.types import Rollout, Score


class Gold:
    """A function of request and response, as a source of scores."""

    def __init__(self, measure: Callable[[str, str], float]) -> None:
        self.measure = measure

    def check(self, promised: Collection[str] = ()) -> None:
        """There is nothing to load."""

    def load(self, hardware: Hardware, policy: Template) -> Self:
        return self

    def score(self, rollout: Rollout) -> Score:
        pairs = zip(rollout.prompts, rollout.responses, strict=True)
        value = torch.tensor([self.measure(prompt.request, response) for prompt, response in pairs])
        return Score(value=value, members=value[:, None])
