"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740), with constraints (HC-RLHF, arXiv:2506.08266)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf_lab.functional.advantages import leave_one_out
from rlhf_lab.functional.losses import clip_fraction, clipped_surrogate
from rlhf_lab.interfaces import Constraint, Objective, Stateful
from rlhf_lab.objectives import KLPenalty
from rlhf_lab.returns import priced_returns, spread
from rlhf_lab.types import Experience, Metrics, NonNegative, PolicyForward, Positive, ScoredRollout, Term


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """Maximise E[G], the return of a whole response, against the mean return of its siblings:

        A_i = G_i - mean over j != i of G_j          L = -mean_i min(q_i A_i, clip(q_i) A_i)

    q = pi(y | x) / pi_old(y | x) of the whole response: at the first step it is 1 and the gradient REINFORCE's, and
    several minibatches or passes over a batch stay right. With constraints and a confidence bound this is the
    CI-Lagrangian of HC-RLHF, whose code has no ratio.
    """

    critics: ClassVar[tuple[str, ...]] = ()
    least_samples: ClassVar[int] = 2

    objective: Objective
    constraints: Mapping[str, Constraint]  # cost stream -> its constraint; may be empty
    kl: KLPenalty
    kl_coef: NonNegative  # beta at the start, reward units per nat
    clip: Positive  # a response's ratio counts within [1 - clip, 1 + clip]
    reward_clip: Positive  # bound on |reward of a response|, score and penalty together
    divide_by_prices: bool  # see `priced_returns`

    @property
    def streams(self) -> tuple[str, ...]:
        return (*self.objective.streams, *self.constraints)

    @property
    def stateful(self) -> Mapping[str, Stateful]:
        return {"kl": self.kl.controller, **{f"lagrange/{name}": part for name, part in self.constraints.items()}}

    @property
    def beta(self) -> float:
        return self.kl_coef * self.kl.controller.factor

    def prepare(self, scored: ScoredRollout) -> tuple[Experience, Metrics]:
        self.kl.step(scored)
        returns, metrics = priced_returns(
            scored,
            objective=self.objective,
            constraints=self.constraints,
            kl=self.kl,
            kl_coef=self.beta,
            reward_clip=self.reward_clip,
            divide_by_prices=self.divide_by_prices,
        )
        advantages = leave_one_out(returns, scored.rollout.group)  # (B,)
        return Experience(scored=scored, advantages=spread(advantages, scored.response_mask), returns={}), metrics

    def loss(self, new: PolicyForward, batch: Experience) -> Sequence[Term]:
        logprobs, old_logprobs = new.sequence_logprobs, batch.scored.logprobs.sum(1)
        advantages = batch.advantages[:, 0]  # the same at every token, of which a response has at least one
        return [
            Term("policy", clipped_surrogate(logprobs, old_logprobs, advantages, self.clip), "row"),
            Term("clipfrac", clip_fraction(logprobs, old_logprobs, self.clip), "row", 0.0),
            *(term.per_row() for term in self.kl.in_loss(new, batch.scored, self.beta)),
        ]
