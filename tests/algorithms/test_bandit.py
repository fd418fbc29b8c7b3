"""Learning on bandits whose optimum is known: responses of one token, a softmax policy, one critic a stream.

The constrained bandit. Arms, as (reward, cost): refuse (0.5, 0), comply (1, 1), ramble (0.4, 0.5); limit 0.25.
Rambling is dominated by a mixture of the others. Mixing p of comply into refuse earns 0.5 + p / 2 and costs p, so
p = 0.25 is the most that the limit allows: reward 0.625, cost 0.25. At the price 0.5 of a unit of cost, refusing and
complying are worth the same, so lambda = 0.5.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from rlhf_lab.algorithms.ppo import PPO
from rlhf_lab.algorithms.ppo_lag import PPOLagrangian
from rlhf_lab.bounds import Mean
from rlhf_lab.constraints import Lagrangian, LogAscent
from rlhf_lab.objectives import FixedKL, KLPenalty, WeightedSum
from rlhf_lab.records import Prompt
from rlhf_lab.types import PolicyForward, Rollout, Score, ScoredRollout, Sequences

REWARD, COST, LIMIT = torch.tensor([0.5, 1.0, 0.4]), torch.tensor([0.0, 1.0, 0.5]), 0.25
ROWS = 128


def pull(
    logits: Tensor, reference: Tensor, arms: Mapping[str, Tensor], values: Mapping[str, Tensor], draw: torch.Generator
) -> tuple[ScoredRollout, Tensor]:
    """Sample ROWS responses of one token, the arm, and score them."""
    logprobs = logits.detach().log_softmax(0)
    chosen = torch.multinomial(logprobs.exp(), ROWS, replacement=True, generator=draw)
    mask = torch.ones(ROWS, 1, dtype=torch.bool)
    sequences = Sequences(
        tokens=torch.stack([torch.zeros_like(chosen), chosen], dim=1),
        attention_mask=mask.expand(-1, 2),
        position_ids=torch.arange(2).expand(ROWS, -1),
        response_mask=mask,
    )
    rollout = Rollout(
        prompts=[Prompt.from_text("pull")] * ROWS,
        sequences=sequences,
        group=torch.zeros(ROWS, dtype=torch.int64),
        finished=mask[:, 0],
        responses=[str(arm) for arm in chosen.tolist()],
        logprobs=logprobs[chosen, None],
    )
    scored = ScoredRollout(
        rollout=rollout,
        scores={name: Score(value=each[chosen], members=each[chosen, None]) for name, each in arms.items()},
        ref_logprobs=reference.log_softmax(0)[chosen, None],
        values={critic: value.detach().expand(ROWS, 1) for critic, value in values.items()},
    )
    return scored, chosen


def learn(
    algorithm: PPO | PPOLagrangian,
    arms: Mapping[str, Tensor],
    reference: Tensor,
    *,
    iterations: int,
    lr: float,
    start: Tensor | None = None,
    epochs: int = 1,
) -> tuple[Tensor, list[float]]:
    """(iterations, arms) probabilities after each iteration, and multipliers; starts at `start` or the reference."""
    draw = torch.Generator().manual_seed(0)
    logits = (reference if start is None else start).clone().requires_grad_()
    values = {critic: torch.zeros(1, requires_grad=True) for critic in algorithm.critics}
    optimiser = torch.optim.SGD([{"params": [logits], "lr": lr}, {"params": list(values.values()), "lr": 0.2}])
    policies, prices = [], []
    for _ in range(iterations):
        scored, chosen = pull(logits, reference, arms, values, draw)
        experience, metrics = algorithm.prepare(scored)
        for _ in range(epochs):
            new = PolicyForward(
                logprobs=logits.log_softmax(0)[chosen, None],
                entropy=torch.zeros(ROWS, 1),
                values={critic: value.expand(ROWS, 1) for critic, value in values.items()},
            )
            loss = sum(term.weight * term.values.mean() for term in algorithm.loss(new, experience) if term.weight)
            optimiser.zero_grad()
            torch.as_tensor(loss).backward()
            optimiser.step()
        policies.append(logits.detach().softmax(0))
        prices.append(metrics.get("lagrange/cost/lambda", 0.0))
    return torch.stack(policies), prices


def settings(kl_coef: float, placement: Literal["reward", "loss"] = "reward") -> dict[str, Any]:
    estimator = "k1" if placement == "reward" else "k2"
    return {
        "objective": WeightedSum({"helpful": 1.0}),
        "kl": KLPenalty(estimator=estimator, placement=placement, controller=FixedKL()),
        "kl_coef": kl_coef,
        "gamma": 1.0,
        "lam": 0.95,
        "clip": 0.2,
        "value_clip": 5.0,
        "value_coef": 1.0,
        "reward_clip": 50.0,
        "whiten_advantages": False,
    }


def second_half(path: Tensor) -> Tensor:
    return path[len(path) // 2 :].mean(0)


def test_the_optimum_of_the_bandit_is_as_stated():
    steps = torch.arange(0, 1.0001, 0.01, dtype=torch.float64)
    refuse, comply = torch.meshgrid(steps, steps, indexing="ij")
    ramble = 1 - refuse - comply
    reward, cost = (arm[0] * refuse + arm[1] * comply + arm[2] * ramble for arm in (REWARD.double(), COST.double()))
    allowed = (ramble > -1e-9) & (cost < LIMIT + 1e-9)
    best = reward.where(allowed, -torch.inf).argmax()
    assert reward.flatten()[best].item() == pytest.approx(0.625)
    assert cost.flatten()[best].item() == pytest.approx(0.25)
    prices = torch.arange(0, 2, 0.01)[:, None]
    worth = (REWARD - prices * (COST - LIMIT)).amax(1)  # the dual: what the best arm is worth at each price
    assert worth.min().item() == pytest.approx(0.625)
    assert prices[worth.argmin()].item() == pytest.approx(0.5)


def mean_cost(init: float, limit: float = LIMIT) -> Lagrangian:
    dual = LogAscent(init=init, lr=0.1, max_multiplier=10.0, min_multiplier=1e-3)
    return Lagrangian(limit=limit, margin=0.0, window=ROWS, delay=0, bound=Mean(), dual=dual)


@pytest.mark.parametrize("init", [0.4, 0.6])
def test_ppo_lagrangian_finds_the_known_optimum_of_the_bandit(init: float):
    # a linear game: policy and price circle the optimum, so it is their averages that are near it
    algorithm = PPOLagrangian(constraints={"cost": mean_cost(init)}, **settings(kl_coef=0.0))
    path, prices = learn(algorithm, {"helpful": REWARD, "cost": COST}, torch.zeros(3), iterations=600, lr=1.0)
    policy = second_half(path)
    assert (policy @ REWARD).item() == pytest.approx(0.625, abs=0.04)
    assert (policy @ COST).item() == pytest.approx(0.25, abs=0.06)
    assert second_half(torch.tensor(prices)).item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("placement", ["reward", "loss"])
@pytest.mark.parametrize("init", [0.25, 1.0])
@pytest.mark.parametrize(
    ("reference", "reward", "price"),
    [
        # refuse : comply as in the optimum, where both are worth the same: no penalty moves them from there
        ([0.73, 0.245, 0.025], 0.625, 0.5),
        ([1 / 3, 1 / 3, 1 / 3], 0.607, 0.7),
    ],
)
def test_with_a_kl_penalty_ppo_lagrangian_settles_at_the_optimum(
    reference: list[float], reward: float, price: float, init: float, placement: Literal["reward", "loss"]
):
    beta, prior = 0.1, torch.tensor(reference)

    def best_response(multiplier: float) -> Tensor:
        """The maximiser of E[r - multiplier c] / (1 + multiplier) - beta KL(pi || ref), in closed form."""
        weight = prior * ((REWARD - multiplier * COST) / (1 + multiplier) / beta).exp()
        return weight / weight.sum()

    low, high = 0.0, 5.0  # the cost of the best response falls as its price rises: halve
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if best_response(middle) @ COST > LIMIT else (low, middle)
    optimum = best_response(low)
    assert (optimum @ REWARD).item() == pytest.approx(reward, abs=2e-3)
    assert low == pytest.approx(price, abs=2e-3)

    algorithm = PPOLagrangian(constraints={"cost": mean_cost(init)}, **settings(beta, placement))
    path, prices = learn(
        algorithm, {"helpful": REWARD, "cost": COST}, prior.log(), start=torch.zeros(3), iterations=400, lr=1.0
    )
    policy = second_half(path)
    assert (policy - optimum).abs().sum().item() < 0.05
    assert (policy @ COST).item() == pytest.approx(LIMIT, abs=0.02)
    assert second_half(torch.tensor(prices)).item() == pytest.approx(price, abs=0.04)


def test_without_a_constraint_ppo_goes_where_the_reward_is():
    path, _ = learn(
        PPO(**settings(kl_coef=0.0)),
        {"helpful": REWARD, "cost": COST},
        torch.zeros(3),
        iterations=200,
        lr=1.0,
        epochs=2,
    )
    assert (path[-1] @ REWARD).item() > 0.97
    assert (path[-1] @ COST).item() > 0.97


def test_a_limit_that_nothing_exceeds_changes_nothing_in_the_end():
    algorithm = PPOLagrangian(constraints={"cost": mean_cost(init=1.0, limit=2.0)}, **settings(kl_coef=0.0))
    path, prices = learn(algorithm, {"helpful": REWARD, "cost": COST}, torch.zeros(3), iterations=400, lr=1.0)
    assert prices[-1] < 0.05
    assert (path[-1] @ REWARD).item() > 0.97


@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_with_a_kl_penalty_ppo_reaches_the_tilted_reference(placement: Literal["reward", "loss"]):
    reward, reference, beta = torch.tensor([1.0, 0.0, 0.5, -0.5]), torch.tensor([-1.0, 1.0, 0.0, 0.5]), 0.5
    # the maximiser of E[r] - beta KL(pi || ref) is proportional to ref exp(r / beta)
    weight = reference.softmax(0) * (reward / beta).exp()
    optimum = weight / weight.sum()
    path, _ = learn(PPO(**settings(beta, placement)), {"helpful": reward}, reference, iterations=400, lr=0.5)
    assert (optimum - reference.softmax(0)).abs().sum() > 0.5  # there is a way to go
    assert (second_half(path) - optimum).abs().sum() < 0.03
