"""Every on-policy method ends where mathematics says, in a world that can be solved.

The optima come from closed forms and root finders over whole responses (or backwards over states); the methods only see
samples. Distances are total variation, the largest over prompts; the reference is .2 and more away from every optimum.
"""

from typing import Any, Literal

import pytest
import scipy
import torch
from torch import Tensor

from rlhf_lab.bounds import StudentT
from rlhf_lab.interfaces import Objective
from rlhf_lab.objectives import Chebyshev, Preferred, WeightedSum, WorstCase
from rlhf_lab.records import Prompt
from tests.algorithms.ground_truth import (
    World,
    chi2_optimum,
    distance,
    forward_kl_optimum,
    mean,
    reverse_kl_optimum,
)
from tests.algorithms.methods import (
    BETA,
    METHODS,
    PRICED,
    Method,
    ascent,
    at_price,
    constraint,
    grpo,
    penalty,
    reinforce,
    rloo,
)

PROMPTS = [
    Prompt.from_text("left").conditioned("", {"helpful": 2.0}),
    Prompt.from_text("right").conditioned("", {"helpful": 1.0, "humour": 3.0}),
]
WORLD = World.drawn(prompts=PROMPTS)
ONE_TOKEN = World.drawn(longest=1)
HELPFUL, COST = WORLD.scores["helpful"], WORLD.scores["cost"]
CLOSE = 0.02

methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
priced = pytest.mark.parametrize("method", PRICED.values(), ids=PRICED)


def optimum(reward: Tensor, penalised: str, beta: float = BETA) -> Tensor:
    """(P, R): where a penalty `estimator in placement` leads."""
    return {
        "k1 in reward": lambda: forward_kl_optimum(WORLD.prior, reward, beta),
        "chi2 in reward": lambda: chi2_optimum(WORLD.prior, reward, beta),
        "k2 in loss": lambda: WORLD.backwards(reward, beta, forward_kl_optimum),
        "k3 in loss": lambda: WORLD.backwards(reward, beta, reverse_kl_optimum),
    }[penalised]()


def test_the_optima_are_the_best_of_ten_thousand_policies():
    # each closed form against what it claims to maximise, over policies near and far
    source = torch.Generator().manual_seed(0)
    prior, reward = WORLD.prior[:1], HELPFUL[:1]

    def forward(policy: Tensor) -> Tensor:
        return (policy * (reward - BETA * (policy / prior).log())).sum(-1)

    def reverse(policy: Tensor) -> Tensor:
        return (policy * reward - BETA * prior * (prior / policy).log()).sum(-1)

    def chi2(policy: Tensor) -> Tensor:
        return (policy * (reward - BETA * (policy / prior - 1))).sum(-1)

    for worth, closed in ((forward, forward_kl_optimum), (reverse, reverse_kl_optimum), (chi2, chi2_optimum)):
        best = closed(prior, reward, BETA)
        assert best.sum().item() == pytest.approx(1.0)
        noise = torch.randn(10_000, prior.shape[1], dtype=torch.float64, generator=source)
        near = ((best + 1e-12).log() + noise * torch.logspace(-3, 0.5, 10_000, dtype=torch.float64)[:, None]).softmax(
            -1
        )
        assert worth(near).max() <= worth(best) + 1e-9


@methods
def test_the_method_reaches_the_tilted_reference(method: Method):
    best = optimum(HELPFUL, "k1 in reward")
    assert distance(WORLD.prior, best) > 0.2
    policy, metrics = WORLD.learn(method())
    assert distance(policy, best) < CLOSE
    assert mean(policy, HELPFUL) == pytest.approx(mean(best, HELPFUL), abs=0.01)
    kl = (best * (best / WORLD.prior).log()).sum(-1).mean().item()
    assert metrics["objective/kl"] == pytest.approx(kl, abs=0.02)


@pytest.mark.slow
@methods
@pytest.mark.parametrize("penalised", ["chi2 in reward", "k2 in loss", "k3 in loss"])
def test_every_penalty_leads_to_the_optimum_of_its_divergence(method: Method, penalised: str):
    estimator, _, placement = penalised.split()
    best = optimum(HELPFUL, penalised)
    others = [optimum(HELPFUL, other) for other in ("k1 in reward", "chi2 in reward", "k2 in loss", "k3 in loss")]
    assert sum(distance(best, other) > 2 * CLOSE for other in others) == 3  # the four can be told apart
    policy, _ = WORLD.learn(method(kl=penalty(estimator, placement)), iterations=400)  # type: ignore[arg-type]
    assert distance(policy, best) < CLOSE


HUMOUR = WORLD.scores["humour"]
OBJECTIVES: dict[str, tuple[Objective, Tensor]] = {
    "weighted sum": (
        WeightedSum({"helpful": 0.3, "humour": 0.7, "cost": -0.5}),
        0.3 * HELPFUL + 0.7 * HUMOUR - 0.5 * COST,
    ),
    "worst case": (WorstCase({"helpful": 1.0, "humour": 2.0}), torch.minimum(HELPFUL, 2 * HUMOUR)),
    "chebyshev": (
        Chebyshev({"helpful": 2.0, "humour": 1.0}, {"helpful": 1.0, "humour": 0.5}, rho=0.1),
        torch.minimum(2 * (HELPFUL - 1), HUMOUR - 0.5) + 0.1 * (HELPFUL + HUMOUR - 1.5),
    ),
    # the prompts weigh, the first helpful alone, the second both
    "preferred": (Preferred(["helpful", "humour"]), torch.stack([HELPFUL[0], (HELPFUL[1] + 3 * HUMOUR[1]) / 4])),
}


@pytest.mark.slow
@methods
@pytest.mark.parametrize(("objective", "reward"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective_leads_to_the_optimum_of_its_reward(method: Method, objective: Objective, reward: Tensor):
    best = optimum(reward, "k1 in reward")
    assert distance(best, optimum(HELPFUL, "k1 in reward")) > 2 * CLOSE
    policy, _ = WORLD.learn(method(objective=objective))
    assert distance(policy, best) < CLOSE


def solved(cost: Tensor, limit: float, divide: bool) -> tuple[float, Tensor]:
    """lambda at which the best response costs `limit`, and that response."""

    def response(price: float) -> Tensor:
        worth = HELPFUL - price * cost
        return forward_kl_optimum(WORLD.prior, worth / (1 + price) if divide else worth, BETA)

    price = scipy.optimize.brentq(lambda x: mean(response(x), cost) - limit, 0.0, 50.0)
    return price, response(price)


@priced
def test_a_fixed_price_is_a_weight(method: Method):
    best = forward_kl_optimum(WORLD.prior, (HELPFUL - 1.5 * COST) / 2.5, BETA)
    policy, _ = WORLD.learn(method(constraints={"cost": at_price(1.5)}))
    assert distance(policy, best) < CLOSE


@pytest.mark.slow
@priced
def test_the_price_is_found_at_which_the_cost_meets_its_limit(method: Method):
    limit = mean(optimum(HELPFUL, "k1 in reward"), COST) - 0.3
    price, best = solved(COST, limit, divide=True)
    assert 0.3 < price < 5
    policy, metrics = WORLD.learn(method(constraints={"cost": constraint(limit, ascent())}), iterations=600)
    assert distance(policy, best) < CLOSE
    assert mean(policy, COST) == pytest.approx(limit, abs=0.01)
    assert metrics["lagrange/cost/lambda"] == pytest.approx(price, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", [reinforce, rloo, grpo])
def test_undivided_the_price_is_that_of_the_constrained_optimum_at_the_same_beta(method: Method):
    limit = mean(optimum(HELPFUL, "k1 in reward"), COST) - 0.3
    price, best = solved(COST, limit, divide=False)
    assert distance(best, solved(COST, limit, divide=True)[1]) > CLOSE
    run = method(constraints={"cost": constraint(limit, ascent())}, divide=False)
    policy, metrics = WORLD.learn(run, iterations=600)
    assert distance(policy, best) < CLOSE
    assert metrics["lagrange/cost/lambda"] == pytest.approx(price, rel=0.1)


def confident(limit: float, kappa: float, guess: float) -> tuple[float, Tensor]:
    """lambda and the policy at which mean + kappa sd meets the limit; the policy prices its own mean and spread."""

    def response(price: float, mu: float, sd: float) -> Tensor:
        widened = COST + kappa * (COST**2 - 2 * COST * mu) / (2 * sd)
        return forward_kl_optimum(WORLD.prior, (HELPFUL - price * widened) / (1 + price), BETA)

    def residual(x: Any) -> list[float]:
        price, mu, sd = x
        policy = response(price, mu, sd)
        found, square = mean(policy, COST), mean(policy, COST**2)
        return [found - mu, (square - found**2) ** 0.5 - sd, found + kappa * sd - limit]

    solution = scipy.optimize.root(residual, [guess, limit - 0.1, 0.6])
    assert solution.success
    return solution.x[0], response(*solution.x)


@pytest.mark.slow
@priced
def test_a_confidence_bound_is_held_below_the_limit_by_the_price_of_its_gradient(method: Method):
    window = 512  # the costs of one iteration: kappa is then .227
    kappa = 4 * float(scipy.stats.t.ppf(0.9, window - 1)) / window**0.5
    bound = StudentT(delta=0.1, train_inflation=4.0, test_inflation=0.0, test_size=None, guard=False)
    limit = mean(optimum(HELPFUL, "k1 in reward"), COST) - 0.05
    price, best = confident(limit, kappa, guess=1.0)
    assert mean(best, COST) < limit - 0.05
    run = method(constraints={"cost": constraint(limit, ascent(), bound)})
    policy, metrics = WORLD.learn(run, iterations=800)
    assert distance(policy, best) < 1.5 * CLOSE
    assert metrics["lagrange/cost/lambda"] == pytest.approx(price, rel=0.15)


@pytest.mark.slow
@methods
def test_several_minibatches_and_passes_end_at_the_same_place(method: Method):
    policy, _ = WORLD.learn(method(), minibatches=4, epochs=2, lr=0.03, iterations=300)
    assert distance(policy, optimum(HELPFUL, "k1 in reward")) < CLOSE


@pytest.mark.parametrize("method", [rloo, grpo])
def test_small_groups_do_as_well_as_large_ones(method: Method):
    policy, _ = WORLD.learn(method(), samples=4)
    assert distance(policy, optimum(HELPFUL, "k1 in reward")) < 1.5 * CLOSE


@pytest.mark.parametrize("length", ["sequence", "tokens"])
def test_grpo_as_published_serves_rewards_in_units_of_their_own_spread(length: Literal["sequence", "tokens"]):
    # k3 in the loss; the reward is divided by its spread under the policy that is sought
    reward, beta = ONE_TOKEN.scores["helpful"], 1.0
    best = ONE_TOKEN.prior
    for _ in range(200):
        deviation = ((best * reward**2).sum(-1) - (best * reward).sum(-1) ** 2).sqrt()
        best = (best + reverse_kl_optimum(ONE_TOKEN.prior, reward / deviation[:, None], beta)) / 2
    assert distance(best, reverse_kl_optimum(ONE_TOKEN.prior, reward, beta)) > 2 * CLOSE
    published = grpo(kl=penalty("k3", "loss"), scale_by_sd=True, length=length, beta=beta)
    policy, _ = ONE_TOKEN.learn(published)
    assert distance(policy, best) < CLOSE
