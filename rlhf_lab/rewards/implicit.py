"""The reward that a policy trained on preferences implies: how far it moved towards a response from where it began."""

from collections.abc import Collection
from typing import Self

import torch
from torch import Tensor

from rlhf_lab.data.templates import Style, Template
from rlhf_lab.data.tokenise import sequences
from rlhf_lab.engine.distribution import Distribution, through
from rlhf_lab.engine.forward import policy_logprobs
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import LEARNT, check_path
from rlhf_lab.engine.models import load_frozen
from rlhf_lab.engine.prefixes import shares_prefixes
from rlhf_lab.engine.score import by_length
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.types import Count, Positive, Rollout, Score, Sequences


class ImplicitReward:
    """beta (log pi(y|x) - log pi_ref(y|x)), in nats times beta; up to a term of the prompt alone.

    Args:
        policy, reference: folders or hub ids that share a tokenizer.
        beta: that the policy was trained with.
        template: how the policy's conversations are written; "auto" as it was saved.
        tokens_at_once: budget of one forward.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 5.
    """

    def __init__(self, *, policy: str, reference: str, beta: Positive, template: Style, tokens_at_once: Count) -> None:
        self.policy, self.reference, self.beta, self.tokens_at_once = policy, reference, beta, tokens_at_once
        self.style: Style = template

    def check(self, promised: Collection[str] = ()) -> None:
        """Raises ValueError if a folder cannot be loaded; loads nothing."""
        check_path(self.policy, "policy of an implicit reward", promised)
        check_path(self.reference, "reference of an implicit reward", promised)

    def load(self, hardware: Hardware, policy: Template) -> Self:
        """Read the weights.

        Raises:
            ValueError: the reference writes other tokens than the policy.
        """
        self.template = Template(load_tokenizer(self.policy), self.style)
        if not self.template.writes_like(Template(load_tokenizer(self.reference), self.style)):
            raise ValueError(
                f"{self.policy} and {self.reference} do not write the same tokens, so their probabilities of a "
                "response cannot be compared; name the reference that the policy was trained from"
            )
        distribution = Distribution.of(hardware)
        options = {"device": distribution.loads_on, "dtype": LEARNT, "seed": 0, "new_tokens": {}}
        learnt, began = (load_frozen(path, **options) for path in (self.policy, self.reference))
        self.models = distribution.frozen(learnt), distribution.frozen(began)
        return self

    num_models = 2

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Score:
        """(B,) implicit rewards under each prompt's condition."""
        read = sequences(self.template, rollout.prompts, rollout.responses, rollout.finished.tolist())

        def ratio(part: Sequences) -> Tensor:
            learnt, began = (policy_logprobs(model, part).sum(1) for model in self.models)
            return self.beta * (learnt - began)

        learnt, began = self.models
        value = by_length(
            read,
            self.tokens_at_once,
            learnt.device,
            through(learnt, through(began, ratio)),
            together=all(map(shares_prefixes, self.models)),
        )
        return Score(value=value, members=value[:, None])
