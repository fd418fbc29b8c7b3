"""An ensemble of reward models is a source made of sources; its members' scores stay beside the aggregate."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Self

import torch

from rlhf_lab.data.templates import Style, Template
from rlhf_lab.engine.backbone import AdapterView
from rlhf_lab.engine.distribution import through
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.prefixes import shares_prefixes
from rlhf_lab.engine.score import by_length
from rlhf_lab.engine.trunk import Members, alias_frozen
from rlhf_lab.interfaces import Aggregate, GaussianAggregate
from rlhf_lab.rewards.scalar_model import ScalarModel
from rlhf_lab.types import Count, Rollout, Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Members:
    """Models that are each calibrated on the same reference set, so that they may be compared."""

    def __init__(
        self, members: Sequence[str], k: Count, template: Style, tokens_at_once: Count, condition: str
    ) -> None:
        if len(members) != k:
            raise ValueError(f"reward_ensemble.k={k}, but {len(members)} members are named; set k to their number")
        self.members = [ScalarModel(path, template, tokens_at_once, condition) for path in members]

    def check(self, promised: Collection[str] = ()) -> None:
        """Raises ValueError if a member cannot be loaded; loads nothing."""
        for member in self.members:
            member.check(promised)

    def load(self, hardware: Hardware, policy: Template) -> Self:
        """Read the members' weights.

        Raises:
            ValueError: they are not calibrated alike, on one reference set.
        """
        for member in self.members:
            member.load(hardware, policy)
        self.together = None
        # of models in shards no rank has the weights that would be compared; but a base has no others than itself
        first, *others = self.models
        comparable = hardware.distribution == "ddp" or (
            isinstance(first, AdapterView) and all(first.stands_beside(other) for other in others)
        )
        if comparable and all(self.members[0].reads_like(member) for member in self.members[1:]):
            alias_frozen(self.models)
            self.together = through(first, partial(Members, self.models))()
        if len(units := {(m.calibration.method, m.calibration.fitted_on) for m in self.members}) > 1:
            raise ValueError(
                f"the members are calibrated differently ({'; '.join(' on '.join(unit) for unit in sorted(units))}), "
                "so their scores cannot be compared; train them with one stage.calibration on one data set"
            )
        return self

    @property
    def num_models(self) -> int:
        """How many models read each response."""
        return len(self.members)

    @property
    def models(self) -> tuple["PreTrainedModel", ...]:
        """What was loaded."""
        return tuple(model for member in self.members for model in member.models)

    @torch.no_grad()
    def member_scores(self, rollout: Rollout) -> list[Score]:
        """Of each member; layers that all of them have in common are computed once."""
        if self.together is None or not self.together.common:
            return [member.score(rollout) for member in self.members]
        first = self.members[0]
        raw = by_length(
            first.read(rollout),
            first.tokens_at_once,
            first.model.device,
            through(first.model, self.together.raw_outputs),
            together=all(map(shares_prefixes, self.models)),
        )
        return [member.calibrated(raw[:, k]) for k, member in enumerate(self.members)]

    @property
    def units(self) -> str:
        """How the loaded members were calibrated, all alike."""
        return self.members[0].units


class Ensemble(_Members):
    """Aggregates the members' scores.

    Args:
        members: paths of the member models.
        k: how many there must be; the default members are seeds 0 to k - 1.
        aggregate: (B, k) -> (B,), from `functional/aggregate.py`; the same function serves best-of-n.
        condition: what the members are told after each request, see `ScalarModel`.

    Raises:
        ValueError: there are not k members, or too few of them for the aggregate.

    Source: Coste et al. 2024, arXiv:2310.02743.
    """

    def __init__(
        self,
        members: Sequence[str],
        k: Count,
        aggregate: Aggregate,
        template: Style,
        tokens_at_once: Count,
        condition: str = "",
    ) -> None:
        super().__init__(members, k, template, tokens_at_once, condition)
        aggregate(torch.zeros(1, k))  # refuses a k that it cannot take (a variance of one) before anything is loaded
        self.aggregate = aggregate

    def score(self, rollout: Rollout) -> Score:
        members = torch.stack([score.value for score in self.member_scores(rollout)], dim=1)
        return Score(value=self.aggregate(members), members=members)


class GaussianEnsemble(_Members):
    """Aggregates the scores of members that say how sure they are, with their variances; one member may be enough.

    Args:
        members: paths of models of two outputs, see `algorithms/probit_reward_model.py`.
        aggregate: (B, k) means and (B, k) variances -> (B,).

    Raises:
        ValueError: there are not k members.
    """

    def __init__(
        self,
        members: Sequence[str],
        k: Count,
        aggregate: GaussianAggregate,
        template: Style,
        tokens_at_once: Count,
        condition: str = "",
    ) -> None:
        super().__init__(members, k, template, tokens_at_once, condition)
        self.aggregate = aggregate

    def load(self, hardware: Hardware, policy: Template) -> Self:
        """Read the members' weights.

        Raises:
            ValueError: they are not calibrated alike, or one has no variance.
        """
        super().load(hardware, policy)
        if mute := [member.path for member in self.members if not member.is_gaussian]:
            raise ValueError(
                f"{mute[0]} does not say how sure it is; name models of algorithm=probit_reward_model in "
                "scorers.probit_models, or choose another reward_ensemble, such as uwo"
            )
        return self

    def score(self, rollout: Rollout) -> Score:
        scores = self.member_scores(rollout)
        members = torch.stack([score.value for score in scores], dim=1)
        variances = torch.cat([score.variances[0] for score in scores], dim=1)
        return Score(value=self.aggregate(members, variances), members=members, variances=(variances,))
