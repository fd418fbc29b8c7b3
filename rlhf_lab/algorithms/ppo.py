"""Proximal policy optimisation with a KL penalty to the reference (Ouyang et al. 2022, arXiv:2203.02155)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf_lab.functional.advantages import gae, token_rewards
from rlhf_lab.functional.losses import clip_fraction, clipped_surrogate, clipped_value
from rlhf_lab.functional.masked import whiten
from rlhf_lab.interfaces import Objective, Stateful
from rlhf_lab.objectives import KLPenalty
from rlhf_lab.types import Experience, Fraction, Metrics, NonNegative, PolicyForward, Positive, ScoredRollout, Term


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Maximise E[reward] - beta KL(policy || reference), with one critic and clipped ratios."""

    critics: ClassVar[tuple[str, ...]] = ("reward",)
    least_samples: ClassVar[int] = 1

    objective: Objective
    kl: KLPenalty
    kl_coef: NonNegative  # beta at the start, reward units per nat
    gamma: Fraction
    lam: Fraction  # GAE lambda
    clip: Positive  # a ratio counts within [1 - clip, 1 + clip]
    value_clip: Positive  # in units of the return
    value_coef: NonNegative
    reward_clip: Positive  # bound on |reward of a token|, score and penalty together
    whiten_advantages: bool  # they then have no unit, and a penalty in the loss weighs against their spread

    @property
    def streams(self) -> tuple[str, ...]:
        return self.objective.streams

    @property
    def stateful(self) -> Mapping[str, Stateful]:
        return {"kl": self.kl.controller}

    @property
    def beta(self) -> float:
        return self.kl_coef * self.kl.controller.factor

    def prepare(self, scored: ScoredRollout) -> tuple[Experience, Metrics]:
        mask = scored.response_mask
        self.kl.step(scored)
        kl = self.kl.estimate(scored)  # (B, T)
        penalty = self.kl.in_reward(kl, self.beta)

        reward = self.objective(scored.columns, scored.rollout.prompts)  # (B,)
        rewards = token_rewards(reward, penalty, mask, self.reward_clip)  # (B, T)
        advantages, returns = gae(rewards, scored.values["reward"], mask, gamma=self.gamma, lam=self.lam)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask)

        metrics = {
            "objective/kl": kl.sum(1).mean().item(),  # nats per response: the estimate that is penalised
            "objective/kl_coef": self.beta,
            "objective/scores": reward.mean().item(),
            "objective/rlhf_reward": (reward - self.beta * kl.sum(1)).mean().item(),
        }
        return Experience(scored=scored, advantages=advantages, returns={"reward": returns}), metrics

    def loss(self, new: PolicyForward, batch: Experience) -> Sequence[Term]:
        old = batch.scored
        policy = clipped_surrogate(new.logprobs, old.logprobs, batch.advantages, self.clip)
        value = clipped_value(new.values["reward"], old.values["reward"], batch.returns["reward"], self.value_clip)
        return [
            Term("policy", policy, "token"),
            Term("clipfrac", clip_fraction(new.logprobs, old.logprobs, self.clip), "token", 0.0),
            Term("value/reward", value, "token", self.value_coef),
            *self.kl.in_loss(new, old, self.beta),
        ]
