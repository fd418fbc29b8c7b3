"""The on-policy methods at settings that suit the world of `ground_truth`, each setting open to change."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from rlhf_lab.algorithms.grpo import GRPO
from rlhf_lab.algorithms.ppo import PPO
from rlhf_lab.algorithms.ppo_lag import PPOLagrangian
from rlhf_lab.algorithms.reinforce import Reinforce, RunningMean
from rlhf_lab.algorithms.rloo import RLOO
from rlhf_lab.bounds import Mean
from rlhf_lab.constraints import FixedPrice, Lagrangian, LogAscent
from rlhf_lab.functional.kl import Divergence
from rlhf_lab.interfaces import Bound, Constraint, Dual, Objective
from rlhf_lab.objectives import FixedKL, KLPenalty, WeightedSum

BETA = 0.4

Method = Callable[..., Any]


def penalty(estimator: Divergence = "k1", placement: Literal["reward", "loss"] = "reward") -> KLPenalty:
    return KLPenalty(estimator=estimator, placement=placement, controller=FixedKL())


def shared(
    objective: Objective | None = None, kl: KLPenalty | None = None, beta: float = BETA, clip: float = 0.2
) -> dict[str, Any]:
    return {
        "objective": objective or WeightedSum({"helpful": 1.0}),
        "kl": kl or penalty(),
        "kl_coef": beta,
        "clip": clip,
        "reward_clip": float("inf"),
    }


CRITIC = {"gamma": 1.0, "lam": 0.95, "value_clip": 5.0, "value_coef": 1.0, "whiten_advantages": False}


def ppo(**changes: Any) -> PPO:
    return PPO(**CRITIC, **shared(**changes))


def ppo_lag(constraints: Mapping[str, Constraint] | None = None, **changes: Any) -> PPOLagrangian:
    return PPOLagrangian(constraints=constraints or {"cost": at_price(0.0)}, **CRITIC, **shared(**changes))


def reinforce(constraints: Mapping[str, Constraint] | None = None, divide: bool = True, **changes: Any) -> Reinforce:
    return Reinforce(
        constraints=constraints or {}, divide_by_prices=divide, baseline=RunningMean(0.8), **shared(**changes)
    )


def rloo(constraints: Mapping[str, Constraint] | None = None, divide: bool = True, **changes: Any) -> RLOO:
    return RLOO(constraints=constraints or {}, divide_by_prices=divide, **shared(**changes))


def grpo(
    constraints: Mapping[str, Constraint] | None = None,
    divide: bool = True,
    scale_by_sd: bool = False,
    length: Literal["sequence", "tokens"] = "tokens",
    **changes: Any,
) -> GRPO:
    return GRPO(
        constraints=constraints or {},
        divide_by_prices=divide,
        scale_by_sd=scale_by_sd,
        length=length,
        **shared(**changes),
    )


def constraint(limit: float, dual: Dual, bound: Bound | None = None) -> Lagrangian:
    return Lagrangian(limit=limit, margin=0.0, window=512, delay=0, bound=bound or Mean(), dual=dual)


def at_price(multiplier: float) -> Lagrangian:
    return constraint(0.0, FixedPrice(multiplier))


def ascent() -> LogAscent:
    return LogAscent(init=0.5, lr=0.1, max_multiplier=20.0, min_multiplier=1e-3)


METHODS: dict[str, Method] = {"ppo": ppo, "ppo_lag": ppo_lag, "reinforce": reinforce, "rloo": rloo, "grpo": grpo}
PRICED: dict[str, Method] = {name: method for name, method in METHODS.items() if name != "ppo"}
