"""REINFORCE with a running baseline (Williams 1992), with constraints (HC-RLHF, arXiv:2506.08266)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rlhf_lab.functional.losses import clip_fraction, clipped_surrogate
from rlhf_lab.interfaces import Constraint, Objective, Stateful
from rlhf_lab.objectives import KLPenalty
from rlhf_lab.returns import priced_returns, spread
from rlhf_lab.types import Experience, Fraction, Metrics, NonNegative, PolicyForward, Positive, ScoredRollout, Term


class RunningMean:
    """The mean return of earlier iterations: sum_i decay^age_i G_i / sum_i decay^age_i.

    The responses of the present iteration are not in it, so it cannot bias their gradient. Before any it is 0.

    Args:
        decay: of an iteration's weight with its age. 1 never forgets, as in HC-RLHF's code: then the baseline trails a
            return that grows, and most responses of a policy that has learnt look good.
    """

    def __init__(self, decay: Fraction) -> None:
        self.decay, self.total, self.weight = decay, 0.0, 0.0

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    def add(self, returns: Tensor) -> None:
        """See the (B,) returns of one iteration."""
        self.total = self.decay * self.total + returns.mean().item()
        self.weight = self.decay * self.weight + 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.weight = float(state["total"]), float(state["weight"])


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Maximise E[G], the return of a whole response, against a baseline b:

        L = -mean_i min(q_i (G_i - b), clip(q_i) (G_i - b))

    q = pi(y | x) / pi_old(y | x) of the whole response: at the first step it is 1 and the gradient is
    (G - b) grad log pi(y | x); several minibatches or passes over a batch stay right.
    """

    critics: ClassVar[tuple[str, ...]] = ()
    least_samples: ClassVar[int] = 1

    objective: Objective
    constraints: Mapping[str, Constraint]  # cost stream -> its constraint; may be empty
    kl: KLPenalty
    kl_coef: NonNegative  # beta at the start, reward units per nat
    baseline: RunningMean
    clip: Positive  # a response's ratio counts within [1 - clip, 1 + clip]
    reward_clip: Positive  # bound on |reward of a response|, score and penalty together
    divide_by_prices: bool  # see `priced_returns`

    @property
    def streams(self) -> tuple[str, ...]:
        return (*self.objective.streams, *self.constraints)

    @property
    def stateful(self) -> Mapping[str, Stateful]:
        prices = {f"lagrange/{name}": part for name, part in self.constraints.items()}
        return {"kl": self.kl.controller, "baseline": self.baseline, **prices}

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
        advantages = returns - self.baseline.value  # (B,)
        metrics["objective/baseline"] = self.baseline.value
        self.baseline.add(returns)
        return Experience(scored=scored, advantages=spread(advantages, scored.response_mask), returns={}), metrics

    def loss(self, new: PolicyForward, batch: Experience) -> Sequence[Term]:
        logprobs, old_logprobs = new.sequence_logprobs, batch.scored.logprobs.sum(1)
        advantages = batch.advantages[:, 0]  # the same at every token, of which a response has at least one
        return [
            Term("policy", clipped_surrogate(logprobs, old_logprobs, advantages, self.clip), "row"),
            Term("clipfrac", clip_fraction(logprobs, old_logprobs, self.clip), "row", 0.0),
            *(term.per_row() for term in self.kl.in_loss(new, batch.scored, self.beta)),
        ]
