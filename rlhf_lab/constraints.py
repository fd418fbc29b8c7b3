"""Constraints on cost, and the multipliers that price them."""

import math
from collections import deque
from typing import Any

from torch import Tensor

from rlhf_lab.types import Count, Metrics, NonNegative, NonNegativeCount, Positive

LARGEST_LOG = math.log(1e300)


class Lagrangian:
    """E[cost] <= limit, priced by exp(log lambda), which climbs by plain gradient ascent.

        log lambda <- log lambda + lr * lambda * (Jbar - (limit - margin)),    Jbar = mean of the last `window` costs

    The ascent is on log lambda, so the step is proportional to lambda itself: a small multiplier wakes slowly, which
    `min_multiplier` bounds. The cost is raw: no KL, no clip.

    Args:
        limit: in the units of the cost; Safe RLHF's code has it with this sign, its paper with the other.
        margin: how far under the limit the learned cost is held. What an optimised policy gains on a learned cost
            exceeds what it gains in truth; the margin pays for the difference. A departure: 0 as published.
        init: lambda at the start.
        lr: of the ascent, once per iteration.
        window: number of latest responses whose mean cost is compared with the limit.
        delay: iterations before the first step, while the window fills.
        max_multiplier: cap of lambda; `inf` for none, and then a violation that lasts overflows it within a few steps
            (d lambda / dt grows as lambda squared), which is refused as a FloatingPointError.
        min_multiplier: floor of lambda; a hair above 0 for none. A departure: the published dual has no floor.

    Source: Dai et al. 2023, arXiv:2310.12773, section 3.4 and appendix B.
    """

    def __init__(
        self,
        limit: float,
        margin: NonNegative,
        init: Positive,
        lr: Positive,
        window: Count,
        delay: NonNegativeCount,
        max_multiplier: Positive,
        min_multiplier: Positive,
    ) -> None:
        if not min_multiplier <= init <= max_multiplier:
            raise ValueError(
                f"multiplier starts at {init}, outside [{min_multiplier}, {max_multiplier}]; "
                "change init, min_multiplier or max_multiplier"
            )
        self.limit, self.margin, self.lr, self.delay = limit, margin, lr, delay
        self.bounds = math.log(min_multiplier), math.log(max_multiplier)
        self.log_multiplier = math.log(init)
        self.recent: deque[float] = deque(maxlen=window)
        self.iterations = 0

    @property
    def multiplier(self) -> float:
        return math.exp(self.log_multiplier)

    def step(self, cost: Tensor) -> Metrics:
        self.recent.extend(cost.tolist())
        violation = sum(self.recent) / len(self.recent) - (self.limit - self.margin)
        if self.iterations >= self.delay:
            low, high = self.bounds
            ascended = self.log_multiplier + self.lr * self.multiplier * violation
            if not ascended <= LARGEST_LOG:  # a NaN cost lands here too
                raise FloatingPointError(
                    f"the multiplier left the range of numbers (violation {violation:.3g}); "
                    "set max_multiplier, or look at the costs"
                )
            self.log_multiplier = min(max(ascended, low), high)
        self.iterations += 1
        at_cap = self.log_multiplier >= self.bounds[1]
        return {"lambda": self.multiplier, "violation": violation, "limit": self.limit, "at_cap": float(at_cap)}

    def state_dict(self) -> dict[str, Any]:
        return {"log_multiplier": self.log_multiplier, "recent": list(self.recent), "iterations": self.iterations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_multiplier = float(state["log_multiplier"])
        self.recent.clear()
        self.recent.extend(state["recent"])
        self.iterations = int(state["iterations"])
