"""PPO that pays a learned price for cost: PPO-Lagrangian (Safe RLHF, Dai et al. 2023, arXiv:2310.12773)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf_lab.functional.advantages import gae, token_rewards
from rlhf_lab.functional.losses import clip_fraction, clipped_surrogate, clipped_value
from rlhf_lab.functional.masked import whiten
from rlhf_lab.interfaces import Constraint, Objective, Stateful
from rlhf_lab.objectives import KLPenalty
from rlhf_lab.types import Experience, Fraction, Metrics, NonNegative, PolicyForward, Positive, ScoredRollout, Term


@dataclass(frozen=True, kw_only=True)
class PPOLagrangian:
    """Maximise E[reward] - beta KL(policy || reference) subject to bound_j(cost_j) <= limit_j for every constraint j.

    One critic for the reward and one for each cost; A = (A_R - sum_j lambda_j A_Cj) / (1 + sum_j lambda_j).
    The penalty is outside that quotient, as published: a nat costs beta whatever the prices, beside a reward that they
    divide. In units of the reward it costs beta (1 + sum_j lambda_j), so prices that rise also hold the policy closer
    to the reference.
    """

    least_samples: ClassVar[int] = 1

    objective: Objective
    constraints: Mapping[str, Constraint]  # cost stream -> its constraint
    kl: KLPenalty
    kl_coef: NonNegative  # beta at the start, reward units per nat
    gamma: Fraction
    lam: Fraction  # GAE lambda
    clip: Positive  # a ratio counts within [1 - clip, 1 + clip]
    value_clip: Positive  # in units of the return
    value_coef: NonNegative
    reward_clip: Positive  # bound on |reward or cost of a token|, score and penalty together
    whiten_advantages: bool  # after pricing: whitening reward and cost apart would change what lambda means

    def __post_init__(self) -> None:
        if not self.constraints:
            raise ValueError("algorithm=ppo_lag needs a constraint; choose one (constraint=mean_cost) or algorithm=ppo")
        if "reward" in self.constraints:
            raise ValueError("a constraint named 'reward' would share the reward's critic; rename that cost stream")

    @property
    def critics(self) -> tuple[str, ...]:
        return ("reward", *self.constraints)

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
        mask, scores = scored.response_mask, scored.columns
        self.kl.step(scored)
        kl = self.kl.estimate(scored)  # (B, T)
        penalty = self.kl.in_reward(kl, self.beta)
        metrics: Metrics = {}

        reward = self.objective(scores, scored.rollout.prompts)  # (B,)
        rewards = token_rewards(reward, penalty, mask, self.reward_clip)  # (B, T)
        advantages, returns = gae(rewards, scored.values["reward"], mask, gamma=self.gamma, lam=self.lam)
        targets, prices = {"reward": returns}, 0.0
        for name, constraint in self.constraints.items():
            # dual ascent before the policy moves, on the raw costs, as in the reference implementation
            metrics |= {f"lagrange/{name}/{key}": value for key, value in constraint.step(scores[name]).items()}
            # + beta k in the cost, - beta k in the reward: the weighted sum keeps exactly - beta k, whatever lambda
            priced = constraint.surrogate(scores[name])  # the cost itself for a bound of the mean
            costs = token_rewards(priced, -penalty, mask, self.reward_clip)
            cost_advantages, targets[name] = gae(costs, scored.values[name], mask, gamma=self.gamma, lam=self.lam)
            advantages = advantages - constraint.multiplier * cost_advantages
            prices += constraint.multiplier
        advantages = advantages / (1 + prices)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask)

        metrics |= {
            "objective/kl": kl.sum(1).mean().item(),  # nats per response: the estimate that is penalised
            "objective/kl_coef": self.beta,
            "objective/scores": reward.mean().item(),
            "objective/rlhf_reward": (reward - self.beta * kl.sum(1)).mean().item(),
        }
        return Experience(scored=scored, advantages=advantages, returns=targets), metrics

    def loss(self, new: PolicyForward, batch: Experience) -> Sequence[Term]:
        old = batch.scored
        policy = clipped_surrogate(new.logprobs, old.logprobs, batch.advantages, self.clip)
        clipped = clip_fraction(new.logprobs, old.logprobs, self.clip)
        terms = [Term("policy", policy, "token"), Term("clipfrac", clipped, "token", 0.0)]
        terms += self.kl.in_loss(new, old, self.beta)
        for critic, returns in batch.returns.items():
            value = clipped_value(new.values[critic], old.values[critic], returns, self.value_clip)
            terms.append(Term(f"value/{critic}", value, "token", self.value_coef))
        return terms
