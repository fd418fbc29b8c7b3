"""Reward models as judges: the response that they score higher wins."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import rollout_of
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.judges.scored import Criteria, check_criteria, verdicts_of
from rlhf_lab.records import Comparison, Verdict
from rlhf_lab.types import Count, NonNegative, batches


class RewardModelJudge:
    """Decides by the sources of `reward=`, ensembles and cost models included.

    Args:
        rewards: name -> source; null leaves one out.
        criteria: criterion -> source -> weight; more of the weighted sum is better, so that of a cost is negative.
        tie_within: sums that differ by this or less tie, in units of the sources' calibration.
        comparisons_at_once: scored together, for the memory that their tokens take.
    """

    def __init__(
        self, rewards: Mapping[str, Any], criteria: Criteria, tie_within: NonNegative, comparisons_at_once: Count
    ) -> None:
        self.rewards = {name: source for name, source in rewards.items() if source is not None}
        self.criteria, self.tie_within, self.comparisons_at_once = criteria, tie_within, comparisons_at_once

    def check(self, criteria: Collection[str], promised: Collection[str] = ()) -> None:
        check_criteria(self.criteria, criteria, self.rewards, "the sources of reward= are")
        for source in self.rewards.values():
            source.check(promised)

    def load(self, hardware: Hardware, template: Template) -> Self:
        """Read the weights of every source; the template is how the responses are written down for them."""
        self.template = template
        for source in self.rewards.values():
            source.load(hardware, template)
        return self

    def scores(self, comparisons: Sequence[Comparison], criterion: str) -> list[tuple[float, float]]:
        """The weighted scores of both responses, to what the user asked, whatever the policy was told beside it."""
        weights = self.criteria[criterion]
        found: list[tuple[float, float]] = []
        for part in batches(len(comparisons), self.comparisons_at_once):
            pairs = comparisons[part]
            prompts = [each.prompt.plain for each in pairs for _ in each.responses]
            rollout = rollout_of(self.template, prompts, [text for each in pairs for text in each.responses])
            weighed = [weight * self.rewards[name].score(rollout).value.double() for name, weight in weights.items()]
            worth = torch.stack(weighed).sum(0)
            found += [(first, second) for first, second in worth.view(-1, 2).tolist()]
        return found

    def compare(self, comparisons: Sequence[Comparison], criterion: str) -> list[Verdict]:
        return list(verdicts_of(self.scores(comparisons, criterion), self.tie_within))
