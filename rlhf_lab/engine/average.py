"""The moving average of a policy's weights, itself a policy."""

import copy
from typing import TYPE_CHECKING, Any

import torch

from rlhf_lab.engine.parameters import parameters_of, restore_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MovingAverage:
    """theta_ema <- tau theta_ema + (1 - tau) theta, in float32 whatever the policy is in.

    In bfloat16 an update by (1 - tau) of a small change rounds away, and the average stays where it began. With tau = 0
    it is the policy itself, and no copy is made.
    """

    def __init__(self, policy: "PreTrainedModel", decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(policy).float().requires_grad_(False).eval() if decay else policy

    @torch.no_grad()
    def update(self, policy: "PreTrainedModel") -> None:
        """After an optimiser step."""
        if not self.decay:
            return
        current = parameters_of(policy)
        for name, average in parameters_of(self.model).items():
            average.lerp_(current[name].to(average), 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        return dict(parameters_of(self.model)) if self.decay else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.decay:
            restore_parameters(self.model, state)
