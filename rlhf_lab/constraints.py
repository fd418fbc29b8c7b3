"""Constraints on cost, and how the multipliers that price them move."""

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from rlhf_lab.interfaces import Bound, Dual
from rlhf_lab.types import Count, Metrics, NonNegative, NonNegativeCount, Positive

LARGEST_LOG = math.log(1e300)


class LogAscent:
    """lambda = exp(log lambda), which climbs by plain gradient ascent on the price of the violation.

        log lambda <- log lambda + lr * lambda * violation

    The ascent is on log lambda, so the step is proportional to lambda itself: a small multiplier wakes slowly, which
    `min_multiplier` bounds.

    Args:
        init: lambda at the start.
        lr: of the ascent, once per iteration.
        max_multiplier: cap of lambda; `inf` for none, and then a violation that lasts overflows it within a few steps
            (d lambda / dt grows as lambda squared), which is refused as a FloatingPointError.
        min_multiplier: floor of lambda; a hair above 0 for none. A departure: the published dual has no floor.

    Source: Dai et al. 2023, arXiv:2310.12773, section 3.4 and appendix B.
    """

    def __init__(self, init: Positive, lr: Positive, max_multiplier: Positive, min_multiplier: Positive) -> None:
        if not min_multiplier <= init <= max_multiplier:
            raise ValueError(
                f"multiplier starts at {init}, outside [{min_multiplier}, {max_multiplier}]; "
                "change init, min_multiplier or max_multiplier"
            )
        self.lr = lr
        self.bounds = math.log(min_multiplier), math.log(max_multiplier)
        self.log_multiplier = math.log(init)

    @property
    def multiplier(self) -> float:
        return math.exp(self.log_multiplier)

    @property
    def at_cap(self) -> bool:
        return self.log_multiplier >= self.bounds[1]

    def step(self, violation: float) -> None:
        low, high = self.bounds
        ascended = min(self.log_multiplier + self.lr * self.multiplier * violation, high)
        if not math.isfinite(violation) or ascended > LARGEST_LOG:
            raise FloatingPointError(
                f"the multiplier left the range of numbers (violation {violation:.3g}); "
                "set max_multiplier, or look at the costs"
            )
        self.log_multiplier = max(ascended, low)

    def state_dict(self) -> dict[str, Any]:
        return {"log_multiplier": self.log_multiplier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_multiplier = float(state["log_multiplier"])


class PID:
    """lambda = (kp violation + I + kd rise)+, with I the integral of ki violation and rise that of the violation.

        I <- clamp(I + ki violation, 0, max_multiplier),        rise = (violation - the one before)+

    The proportional part answers at once and the derivative to a cost that climbs, so lambda swings less than under
    the integral alone, which is gradient ascent on lambda. Against wind-up the integral keeps to the range of lambda.

    Args:
        kp, ki, kd: gains, in lambda per unit of cost.
        init: the integral at the start, and so lambda before the first step.
        max_multiplier: cap of lambda; `inf` for none. The published controller has none.

    Source: Stooke, Achiam and Abbeel 2020, arXiv:2007.03964, algorithm 2 (ki is inside the integral here, which is the
    same while ki is constant). Violations are of a window, where its experiments smooth them exponentially.
    """

    def __init__(
        self, kp: NonNegative, ki: NonNegative, kd: NonNegative, init: NonNegative, max_multiplier: Positive
    ) -> None:
        if init > max_multiplier:
            raise ValueError(f"multiplier starts at {init}, over its cap {max_multiplier}; change one of them")
        self.kp, self.ki, self.kd, self.cap = kp, ki, kd, max_multiplier
        self.integral = self.multiplier = float(init)
        self.before: float | None = None  # the violation of the last step; none has risen before the first

    @property
    def at_cap(self) -> bool:
        return self.multiplier >= self.cap

    def step(self, violation: float) -> None:
        if not math.isfinite(violation):
            raise FloatingPointError(f"the violation is {violation}, which has no price; look at the costs")
        rise = 0.0 if self.before is None else max(violation - self.before, 0.0)
        self.integral = min(max(self.integral + self.ki * violation, 0.0), self.cap)
        self.multiplier = min(max(self.kp * violation + self.integral + self.kd * rise, 0.0), self.cap)
        self.before = violation

    def state_dict(self) -> dict[str, Any]:
        return {"multiplier": self.multiplier, "integral": self.integral, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.multiplier, self.integral = float(state["multiplier"]), float(state["integral"])
        self.before = None if state["before"] is None else float(state["before"])


class FixedPrice:
    """lambda stays as configured: reward shaping, which no violation moves.

    Args:
        multiplier: reward units per unit of cost.
    """

    at_cap = False

    def __init__(self, multiplier: NonNegative) -> None:
        self.multiplier = multiplier

    def step(self, violation: float) -> None:
        """Nothing adapts."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"a fixed price has no state, found {sorted(state)}")


class Lagrangian:
    """bound(cost) <= limit: what bounds it, and what prices it, are parts.

    Every iteration `step` adds its costs to the window, measures the bound on it and moves the dual; `surrogate` then
    prices the same costs by the same window, so that policy and multiplier work on one Lagrangian. The cost is raw: no
    KL, no clip.

    Args:
        limit: in the units of the bound, those of the cost for all but `ClopperPearson`; Safe RLHF's code has it with
            this sign, its paper with the other.
        margin: how far under the limit the bound is held. What an optimised policy gains on a learned cost exceeds
            what it gains in truth; the margin pays for the difference. A departure: 0 as published.
        window: number of latest responses on which the bound is measured. Those of former iterations are of former
            policies.
        delay: iterations before the first step of the dual, while the window fills.
        bound: what is held below the limit; with `Mean`, E[cost]. Until the window has the costs that it needs (two,
            of most), the dual waits and the cost stands for its surrogate.
        dual: how the multiplier answers.
    """

    def __init__(
        self, limit: float, margin: NonNegative, window: Count, delay: NonNegativeCount, bound: Bound, dual: Dual
    ) -> None:
        bound.check_limit(limit - margin)
        if window < bound.least:
            raise ValueError(f"a window of {window} never holds the {bound.least} costs that the bound needs; widen it")
        self.limit, self.margin, self.delay = limit, margin, delay
        self.bound, self.dual = bound, dual
        self.recent: deque[float] = deque(maxlen=window)
        self.iterations = 0

    @property
    def multiplier(self) -> float:
        return self.dual.multiplier

    @property
    def violated_above(self) -> float:
        """A single cost above this counts as a violation: the limit, or what a bound of a rate calls unsafe."""
        return getattr(self.bound, "unsafe_above", self.limit)

    @property
    def _window(self) -> Tensor:
        return torch.tensor(list(self.recent), dtype=torch.float64)

    @property
    def _is_measured(self) -> bool:
        return len(self.recent) >= self.bound.least

    def step(self, cost: Tensor) -> Metrics:
        """Dual step on the (B,) costs of one iteration.

        Returns:
            lambda, limit, at_cap; and once the window has enough costs: bound, violation, and what the bound describes.
        """
        self.recent.extend(cost.tolist())
        measured: Metrics = {}
        if self._is_measured:
            upper = self.bound.upper(self._window)
            violation = upper - (self.limit - self.margin)
            if self.iterations >= self.delay:
                self.dual.step(violation)
            measured = {"bound": upper, "violation": violation, **self.bound.describe(cost, self._window)}
        self.iterations += 1
        return {"lambda": self.multiplier, "limit": self.limit, "at_cap": float(self.dual.at_cap), **measured}

    def surrogate(self, cost: Tensor) -> Tensor:
        """(B,) costs whose score-function gradient is that of the bound; after this iteration's `step`."""
        return self.bound.surrogate(cost, self._window.to(cost.device)) if self._is_measured else cost

    def state_dict(self) -> dict[str, Any]:
        return {"dual": self.dual.state_dict(), "recent": list(self.recent), "iterations": self.iterations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dual.load_state_dict(state["dual"])
        self.recent.clear()
        self.recent.extend(state["recent"])
        self.iterations = int(state["iterations"])
