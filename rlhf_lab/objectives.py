"""Named scores -> what is maximised; and how leaving the reference is penalised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lab.functional.kl import Divergence, KLEstimator, kl_estimate
from rlhf_lab.interfaces import KLController
from rlhf_lab.records import Prompt
from rlhf_lab.types import Count, Fraction, NonNegative, PolicyForward, Positive, ScoredRollout, Term


class WeightedSum:
    """reward = sum over k of w_k r_k.

    Args:
        weights: stream -> coefficient, in reward units per unit of the stream; a negative one is minimised.

    Raises:
        ValueError: there is no weight, or a score that it weighs is not there.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = _some(weights)
        self.streams = tuple(self.weights)

    def __call__(self, scores: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> Tensor:
        columns = _read(self.streams, scores)
        return torch.stack([weight * columns[stream] for stream, weight in self.weights.items()]).sum(0)


class WorstCase:
    """reward = min over k of w_k r_k: nothing is gained by what is already good.

    The minimum of each response, which is at most the minimum of the expectations (MaxMin-RLHF, Chakraborty et al.
    2024, arXiv:2402.08925): serving one stream by some responses and another by others gains there, not here.

    Args:
        weights: stream -> positive scale on which the streams are compared, reward units per unit of the stream.

    Raises:
        ValueError: there is no weight, one is not positive, or a score that it weighs is not there.
    """

    def __init__(self, weights: Mapping[str, Positive]) -> None:
        self.weights = _positive(weights)
        self.streams = tuple(self.weights)

    def __call__(self, scores: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> Tensor:
        columns = _read(self.streams, scores)
        return torch.stack([weight * columns[stream] for stream, weight in self.weights.items()]).amin(0)


class Chebyshev:
    """reward = min over k of w_k (r_k - z_k) + rho sum over k of (r_k - z_k): the augmented Chebyshev scalarisation.

    The stream that is furthest from its mark counts, and the others a little, so that of two responses with the same
    worst stream the better one wins. Every undominated vector is best for some weights, also where the front is not
    convex, which no weighted sum achieves.

    Args:
        weights: stream -> positive weight of its shortfall.
        reference: stream -> z_k, its mark, in its own units.
        rho: small; 0 leaves the sum out.

    Source: Steuer and Choo 1983, Mathematical Programming 26:326.
    """

    def __init__(self, weights: Mapping[str, Positive], reference: Mapping[str, float], rho: NonNegative) -> None:
        self.weights = _positive(weights)
        if reference.keys() != self.weights.keys():
            raise ValueError(
                f"objective.reference names {sorted(reference)}, objective.weights {sorted(weights)}; name the same"
            )
        self.reference, self.rho, self.streams = dict(reference), rho, tuple(self.weights)

    def __call__(self, scores: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> Tensor:
        columns = _read(self.streams, scores)
        over = {stream: columns[stream] - self.reference[stream] for stream in self.streams}  # (B,) each
        worst = torch.stack([weight * over[stream] for stream, weight in self.weights.items()]).amin(0)
        return worst + self.rho * torch.stack(list(over.values())).sum(0)


class Preferred:
    """reward_i = sum over k of w_ik r_k / sum over k of w_ik, with the weights that prompt i carries.

    Args:
        streams: those that a prompt may weigh; one that weighs nothing, or something else, is an error.

    Source: P-MORL, Jang et al. 2023, arXiv:2310.11564: the mean over the preferences that are active.
    """

    def __init__(self, streams: Sequence[str]) -> None:
        if not streams:
            raise ValueError("objective.streams is empty; give those that conditions weigh")
        self.streams = tuple(streams)

    def __call__(self, scores: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> Tensor:
        columns = _read(self.streams, scores)
        for prompt in prompts:
            if not prompt.weights or not prompt.weights.keys() <= columns.keys():
                raise ValueError(
                    f"a prompt weighs {sorted(prompt.weights)}, but the objective reads {list(self.streams)} by the "
                    "weights of each prompt; choose conditions that carry them, e.g. conditions=tiny_help"
                )
        rows = torch.stack([columns[stream] for stream in self.streams], dim=1)  # (B, K)
        weights = rows.new_tensor([[prompt.weights.get(stream, 0.0) for stream in self.streams] for prompt in prompts])
        return (weights * rows).sum(1) / weights.sum(1)


def _read(streams: Sequence[str], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """stream -> its (B,) scores."""
    if missing := [stream for stream in streams if stream not in scores]:
        raise ValueError(
            f"objective weighs {missing}, but the rollout was scored by {sorted(scores)}; "
            "add a reward source or change objective.weights"
        )
    return {stream: scores[stream] for stream in streams}


def _some(weights: Mapping[str, float]) -> dict[str, float]:
    if not weights:
        raise ValueError("objective.weights is empty; give at least one stream, e.g. +objective.weights.helpful=1")
    return dict(weights)


def _positive(weights: Mapping[str, float]) -> dict[str, float]:
    for stream, weight in weights.items():
        if weight <= 0:
            raise ValueError(f"objective.weights.{stream}={weight}; a minimum needs weights above 0")
    return _some(weights)


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
        change = error * len(logprobs) / self.horizon
        if change <= -1:
            raise ValueError(
                f"kl.controller.horizon={self.horizon} is so short that a batch of {len(logprobs)} responses would "
                "turn the KL coefficient negative; make it longer than clip times the batch"
            )
        self.factor *= 1 + change

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = float(state["factor"])
