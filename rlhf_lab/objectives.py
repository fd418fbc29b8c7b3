"""Named scores -> what is maximised; and how leaving the reference is penalised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lab.functional.kl import Divergence, KLEstimator, kl_estimate
from rlhf_lab.interfaces import KLController
from rlhf_lab.records import Prompt
from rlhf_lab.types import Count, Fraction, PolicyForward, Positive, ScoredRollout, Term


class WeightedSum:
    """reward = sum over k of w_k r_k.

    Args:
        weights: stream -> coefficient, in reward units per unit of the stream; a negative one is minimised.

    Raises:
        ValueError: there is no weight, or a score that it weighs is not there.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights:
            raise ValueError("objective.weights is empty; give at least one stream, e.g. +objective.weights.helpful=1")
        self.weights = dict(weights)
        self.streams = tuple(self.weights)

    def __call__(self, scores: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> Tensor:
        missing = [stream for stream in self.streams if stream not in scores]
        if missing:
            raise ValueError(
                f"objective weighs {missing}, but the rollout was scored by {sorted(scores)}; "
                "add a reward source or change objective.weights"
            )
        return torch.stack([weight * scores[stream] for stream, weight in self.weights.items()]).sum(0)


@dataclass(frozen=True, kw_only=True)
class KLPenalty:
    """How the distance to the reference is estimated, where its penalty acts, and how its coefficient moves.

    What E[r] - penalty is maximal at, for responses of one token; nu is what makes it sum to 1:

        k1 in the reward     KL(pi || ref)       pi = ref exp(r / beta) / Z
        k2 in the loss       KL(pi || ref)       the same: on policy its gradient is log(pi / ref) grad log pi
        k3 in the loss       KL(ref || pi)       pi = beta ref / (nu - r): its gradient is (1 - ref / pi) grad log pi
        chi2 in the reward   E_pi[pi / ref] - 1  pi = ref (r - nu)_+ / (2 beta)

    The derivative of E_pi[pi / ref] with respect to pi(y) is 2 pi(y) / ref(y), so that is what a response pays for
    chi2; what is logged is the divergence itself. In the loss a penalty sees each token on its own and not what it
    leads to: over several tokens the same holds for each, with r the reward to be expected after it.

    Args:
        estimator: the estimate that is penalised, and therefore logged as `objective/kl`.
        placement: "reward", a part of each token's reward; or "loss", a differentiable term of the loss.
        controller: what the configured coefficient is multiplied by as the run goes.

    Raises:
        ValueError: k1 in the loss, which penalises nothing; k2 or k3 in the reward, which also reward a token for
            becoming rarer than in the reference; chi2 in the loss.
    """

    estimator: Divergence
    placement: Literal["reward", "loss"]
    controller: KLController

    def __post_init__(self) -> None:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError(
                "kl.placement=loss with kl.estimator=k1 penalises nothing: the gradient of k1 averages to zero; "
                "use kl.estimator=k2 (whose gradient on policy is that of the KL) or k3, or kl.placement=reward"
            )

        if self.placement == "reward" and self.estimator in ("k2", "k3"):
            raise ValueError(
                f"kl.placement=reward with kl.estimator={self.estimator} penalises no divergence: a token that the "
                "policy has made rarer than the reference pays for it when it is sampled, which makes it rarer still; "
                "use kl.estimator=k1, or kl.placement=loss"
            )
        if self.placement == "loss" and self.estimator == "chi2":
            raise ValueError(
                "kl.placement=loss with kl.estimator=chi2 has half the gradient of the divergence; "
                "use kl.placement=reward"
            )

    def step(self, scored: ScoredRollout) -> None:
        """Let the controller see this iteration, before its penalty is computed."""
        self.controller.step(scored.logprobs, scored.ref_logprobs)

    def estimate(self, scored: ScoredRollout) -> Tensor:
        """(B, T) per token, of the policy that sampled: nats, or the share of chi2."""
        return kl_estimate(scored.logprobs, scored.ref_logprobs, self.estimator)

    def in_reward(self, kl: Tensor, coef: float) -> Tensor:
        """(B, T): what each token's reward loses; zeros if the penalty acts in the loss."""
        slope = 2.0 if self.estimator == "chi2" else 1.0  # E_pi[pi / ref] is of second order in pi
        return coef * slope * kl if self.placement == "reward" else torch.zeros_like(kl)

    def in_loss(self, new: PolicyForward, old: ScoredRollout, coef: float) -> Sequence[Term]:
        """The penalty as a term of the loss, gradient through the estimate; none if it acts in the reward."""
        if self.placement == "reward":
            return []
        return [Term("kl", kl_estimate(new.logprobs, old.ref_logprobs, self.estimator), "token", coef)]


class FixedKL:
    """The coefficient stays as configured."""

    factor = 1.0

    def step(self, logprobs: Tensor, ref_logprobs: Tensor) -> None:
        """Nothing adapts."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"a fixed KL coefficient has no state, found {sorted(state)}")


class AdaptiveKL:
    """Proportional control of the coefficient towards a target KL.

        error = clip(KL / target - 1, -clip, clip)          beta <- beta (1 + error n / horizon)

    Args:
        target: nats per response.
        horizon: responses over which an error of e multiplies the coefficient by exp(e), about.
        clip: largest relative error that counts.
        estimator: which estimate of the KL is controlled.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2 (clip 0.2).
    """

    def __init__(self, target: Positive, horizon: Count, clip: Fraction, estimator: KLEstimator) -> None:
        self.target, self.horizon, self.clip = target, horizon, clip
        self.estimator: KLEstimator = estimator
        self.factor = 1.0

    def step(self, logprobs: Tensor, ref_logprobs: Tensor) -> None:
        kl = kl_estimate(logprobs, ref_logprobs, self.estimator).sum(1).mean().item()
        error = min(max(kl / self.target - 1, -self.clip), self.clip)
        self.factor *= 1 + error * len(logprobs) / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = float(state["factor"])
