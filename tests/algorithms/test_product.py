"""Any objective x any on-policy method x any ensemble x any bound x any dual x any divergence, on one small rollout.

What makes no sense is refused with its reason; all else gives finite advantages, terms and gradients.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lab.algorithms.grpo import GRPO
from rlhf_lab.algorithms.ppo import PPO
from rlhf_lab.algorithms.ppo_lag import PPOLagrangian
from rlhf_lab.algorithms.reinforce import Reinforce, RunningMean
from rlhf_lab.algorithms.rloo import RLOO
from rlhf_lab.bounds import Bootstrap, ClopperPearson, EmpiricalBernstein, Hoeffding, Mean, StudentT
from rlhf_lab.constraints import PID, FixedPrice, Lagrangian, LogAscent
from rlhf_lab.data.tokenise import join, pad
from rlhf_lab.functional import aggregate
from rlhf_lab.interfaces import Bound, Dual, Objective
from rlhf_lab.objectives import AdaptiveKL, Chebyshev, FixedKL, KLPenalty, Preferred, WeightedSum, WorstCase
from rlhf_lab.records import Prompt
from rlhf_lab.types import PolicyForward, Rollout, Score, ScoredRollout

GROUPS, SAMPLES, TOKENS, MEMBERS = 4, 3, 5, 4
ROWS = GROUPS * SAMPLES

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "helpful": lambda: WeightedSum({"helpful": 1.0}),
    "shaped": lambda: WeightedSum({"helpful": 1.0, "cost": -1.0}),
    "morlhf": lambda: WeightedSum({"helpful": 0.7, "humour": 0.3}),
    "worst_case": lambda: WorstCase({"helpful": 1.0, "humour": 1.0}),
    "chebyshev": lambda: Chebyshev({"helpful": 0.5, "humour": 0.5}, {"helpful": 2.0, "humour": 2.0}, 0.05),
    "preferred": lambda: Preferred(["helpful", "humour"]),
}
ENSEMBLES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": aggregate.mean,
    "wco": aggregate.worst_case,
    "uwo": partial(aggregate.uncertainty_weighted, weight=0.5, ddof=0),
}
BOUNDS: dict[str, Callable[[], Bound]] = {
    "mean": Mean,
    "student_t": lambda: StudentT(delta=0.1, train_inflation=1.0, test_inflation=1.0, test_size=100, guard=True),
    "hoeffding": lambda: Hoeffding(delta=0.1, low=-6.0, high=6.0),
    "empirical_bernstein": lambda: EmpiricalBernstein(delta=0.1, low=-6.0, high=6.0, guard=True),
    "bootstrap": lambda: Bootstrap(delta=0.1, resamples=50, seed=0, guard=True),
    "clopper_pearson": lambda: ClopperPearson(delta=0.1, unsafe_above=0.0),
}
DUALS: dict[str, Callable[[], Dual]] = {
    "log_ascent": lambda: LogAscent(init=0.5, lr=0.1, max_multiplier=10.0, min_multiplier=1e-3),
    "pid": lambda: PID(kp=1.0, ki=0.1, kd=1.0, init=0.5, max_multiplier=10.0),
    "fixed": lambda: FixedPrice(1.0),
}
DIVERGENCES: dict[str, Callable[[], KLPenalty]] = {
    "k1_reward": lambda: KLPenalty(estimator="k1", placement="reward", controller=FixedKL()),
    "k1_adaptive": lambda: KLPenalty(
        estimator="k1", placement="reward", controller=AdaptiveKL(target=3.0, horizon=1000, clip=0.2, estimator="k1")
    ),
    "chi2_reward": lambda: KLPenalty(estimator="chi2", placement="reward", controller=FixedKL()),
    "k2_loss": lambda: KLPenalty(estimator="k2", placement="loss", controller=FixedKL()),
    "k3_loss": lambda: KLPenalty(estimator="k3", placement="loss", controller=FixedKL()),
}
SEQUENCE = {"clip": 0.2, "reward_clip": 50.0, "divide_by_prices": True}
CRITIC = {"gamma": 1.0, "lam": 0.95, "clip": 0.2, "value_clip": 5.0, "value_coef": 1.0, "reward_clip": 50.0}
METHODS: dict[str, Callable[..., Any]] = {
    "ppo_lag": partial(PPOLagrangian, whiten_advantages=True, **CRITIC),
    "rloo": partial(RLOO, **SEQUENCE),
    "grpo": partial(GRPO, scale_by_sd=True, length="sequence", **SEQUENCE),
    "dr_grpo": partial(GRPO, scale_by_sd=False, length="tokens", **SEQUENCE),
    "reinforce": lambda **parts: Reinforce(baseline=RunningMean(0.9), **SEQUENCE, **parts),
}


@pytest.fixture(scope="module")
def members() -> Mapping[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(ROWS, MEMBERS, generator=draw) for name in ("helpful", "humour", "cost")}


def rollout(
    members: Mapping[str, Tensor], combine: Callable[[Tensor], Tensor], critics: tuple[str, ...]
) -> ScoredRollout:
    """A scored rollout of ragged responses to prompts that say which streams count."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, TOKENS + 1, (ROWS,), generator=draw).tolist()
    responses = pad([[1] * length for length in [TOKENS, *lengths[1:]]], 0, "right")
    sequences = join(*pad([[2, 3]] * ROWS, 0, "left"), *responses)
    mask = sequences.response_mask
    logprobs, reference = (-torch.rand(ROWS, TOKENS, generator=draw).where(mask, 0) for _ in range(2))
    asked = Prompt.from_text("go").conditioned("<helpful>", {"helpful": 1.0, "humour": 0.5})
    sampled = Rollout(
        prompts=[asked] * ROWS,
        sequences=sequences,
        group=torch.arange(GROUPS).repeat_interleave(SAMPLES),
        finished=mask[:, 0],
        responses=["y"] * ROWS,
        logprobs=logprobs,
    )
    return ScoredRollout(
        rollout=sampled,
        scores={name: Score(value=combine(each), members=each) for name, each in members.items()},
        ref_logprobs=reference,
        values={critic: torch.randn(ROWS, TOKENS, generator=draw).where(mask, 0) for critic in critics},
    )


def learn_once(algorithm: Any, scored: ScoredRollout) -> None:
    """Prepare, loss and gradient; everything must be finite and something must be learnt."""
    experience, metrics = algorithm.prepare(scored)
    assert experience.advantages.isfinite().all()
    assert all(value == value for value in metrics.values()), metrics
    weights = {"policy": torch.zeros(ROWS, TOKENS, requires_grad=True)}
    weights |= {critic: torch.zeros(ROWS, TOKENS, requires_grad=True) for critic in algorithm.critics}
    new = PolicyForward(
        logprobs=(scored.logprobs + weights["policy"]).where(scored.response_mask, 0),
        entropy=torch.zeros(ROWS, TOKENS),
        values={critic: weights[critic] for critic in algorithm.critics},
    )
    terms = [term for term in algorithm.loss(new, experience) if term.weight]
    torch.stack([term.weight * term.values.sum() for term in terms]).sum().backward()
    for name, weight in weights.items():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().sum() > 0, name
        assert (weight.grad.where(~scored.response_mask, 0) == 0).all(), name


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_learns(method: str, bound: str, members: Mapping[str, Tensor]):
    walked = 0
    critics = ("reward", "cost") if method == "ppo_lag" else ()
    scored = {name: rollout(members, combine, critics) for name, combine in ENSEMBLES.items()}
    for objective, ensemble, dual, divergence in product(OBJECTIVES, ENSEMBLES, DUALS, DIVERGENCES):
        constraint = Lagrangian(
            limit=0.5, margin=0.0, window=2 * ROWS, delay=0, bound=BOUNDS[bound](), dual=DUALS[dual]()
        )
        algorithm = METHODS[method](
            objective=OBJECTIVES[objective](),
            constraints={"cost": constraint},
            kl=DIVERGENCES[divergence](),
            kl_coef=0.1,
        )
        learn_once(algorithm, scored[ensemble])
        walked += 1
    assert walked == len(OBJECTIVES) * len(ENSEMBLES) * len(DUALS) * len(DIVERGENCES)


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo", "reinforce"])
def test_every_objective_learns_without_a_constraint(method: str, members: Mapping[str, Tensor]):
    for objective, divergence in product(OBJECTIVES, DIVERGENCES):
        parts: dict[str, Any] = {"objective": OBJECTIVES[objective](), "kl": DIVERGENCES[divergence](), "kl_coef": 0.1}
        make = partial(PPO, whiten_advantages=True, **CRITIC) if method == "ppo" else METHODS[method]
        algorithm = make(**parts) if method == "ppo" else make(constraints={}, **parts)
        learn_once(algorithm, rollout(members, aggregate.mean, tuple(algorithm.critics)))


def test_two_constraints_are_priced_apart(members: Mapping[str, Tensor]):
    for method in METHODS:
        constraints = {
            name: Lagrangian(limit=limit, margin=0.0, window=ROWS, delay=0, bound=Mean(), dual=DUALS["log_ascent"]())
            for name, limit in (("cost", -9.0), ("humour", 9.0))
        }
        algorithm = METHODS[method](
            objective=WeightedSum({"helpful": 1.0}), constraints=constraints, kl=DIVERGENCES["k1_reward"](), kl_coef=0.1
        )
        learn_once(algorithm, rollout(members, aggregate.mean, tuple(algorithm.critics)))
        assert constraints["cost"].multiplier > 0.5 > constraints["humour"].multiplier


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: KLPenalty(estimator="k1", placement="loss", controller=FixedKL()), "averages to zero"),
        (lambda: KLPenalty(estimator="k2", placement="reward", controller=FixedKL()), "reward"),
        (lambda: KLPenalty(estimator="k3", placement="reward", controller=FixedKL()), "reward"),
        (
            lambda: Lagrangian(
                limit=-0.5, margin=0.0, window=8, delay=0, bound=BOUNDS["clopper_pearson"](), dual=DUALS["pid"]()
            ),
            "rate",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(make: Callable[[], Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        make()
