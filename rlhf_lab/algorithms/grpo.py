"""Group relative policy optimisation (DeepSeekMath, Shao et al. 2024, arXiv:2402.03300)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_lab.functional.advantages import group_relative
from rlhf_lab.functional.losses import clip_fraction, clipped_surrogate
from rlhf_lab.interfaces import Constraint, Objective, Stateful
from rlhf_lab.objectives import KLPenalty
from rlhf_lab.returns import priced_returns, spread
from rlhf_lab.types import Experience, Metrics, NonNegative, PolicyForward, Positive, ScoredRollout, Term


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Maximise E[G], the return of a whole response, by how it compares with its siblings:

        A_i = (G_i - mean G) / sd G          L = mean_i 1/|y_i| sum_t [-min(q_t A_i, clip(q_t) A_i) + beta k_t]

    q = pi / pi_old of each token; the KL term is k3 in the loss as published (kl=in_loss). Dividing by the group's
    spread weighs prompts whose responses hardly differ as much as others, and so changes what is maximised; dividing by
    the response's length favours short good and long bad responses. Both can be left out, as in Dr. GRPO.

    Args:
        scale_by_sd: true as published; false in Dr. GRPO. A group whose returns do not differ teaches nothing.
        length: "sequence", the mean over a response's tokens, as published; "tokens", their sum, Dr. GRPO up to a
            constant.

    Source: Shao et al. 2024, arXiv:2402.03300, eqs. 3-4; Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO).
    """

    critics: ClassVar[tuple[str, ...]] = ()
    least_samples: ClassVar[int] = 2

    objective: Objective
    constraints: Mapping[str, Constraint]  # cost stream -> its constraint; may be empty
    kl: KLPenalty
    kl_coef: NonNegative  # beta at the start, reward units per nat
    clip: Positive  # a token's ratio counts within [1 - clip, 1 + clip]
    reward_clip: Positive  # bound on |reward of a response|, score and penalty together
    divide_by_prices: bool  # see `priced_returns`
    scale_by_sd: bool
    length: Literal["sequence", "tokens"]

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
        advantages = group_relative(returns, scored.rollout.group, scale_by_sd=self.scale_by_sd)  # (B,)
        return Experience(scored=scored, advantages=spread(advantages, scored.response_mask), returns={}), metrics

    def loss(self, new: PolicyForward, batch: Experience) -> Sequence[Term]:
        old, mask = batch.scored, batch.token_mask
        policy = clipped_surrogate(new.logprobs, old.logprobs, batch.advantages, self.clip)
        terms = [Term("policy", policy, "token"), *self.kl.in_loss(new, old, self.beta)]
        share = mask.sum(1) if self.length == "sequence" else 1
        clipped = clip_fraction(new.logprobs, old.logprobs, self.clip)
        return [*(term.per_row(share) for term in terms), Term("clipfrac", clipped, "token", 0.0)]
