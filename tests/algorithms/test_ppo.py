"""PPO and PPO-Lagrangian: what `prepare` makes of a rollout against slow loops, and the slopes of their losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from rlhf_lab.algorithms.ppo import PPO
from rlhf_lab.algorithms.ppo_lag import PPOLagrangian
from rlhf_lab.bounds import Mean
from rlhf_lab.constraints import Lagrangian, LogAscent
from rlhf_lab.interfaces import KLController, Objective
from rlhf_lab.objectives import AdaptiveKL, FixedKL, KLPenalty, WeightedSum
from rlhf_lab.records import Prompt
from rlhf_lab.types import Experience, Metrics, PolicyForward, Rollout, Score, ScoredRollout, Sequences

Algorithm = PPO | PPOLagrangian
LENGTHS = [5, 1, 3, 4, 2]
CRITICS = ("reward", "cost", "toxic")
BETA = 0.3


@dataclass
class FixedPrice:
    """A constraint whose multiplier does not learn."""

    multiplier: float
    limit: float = 0.0

    def step(self, cost: Tensor) -> Metrics:
        return {"lambda": self.multiplier}

    def surrogate(self, cost: Tensor) -> Tensor:
        return cost

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def dual(init: float = 0.7, lr: float = 0.5, floor: float = 1e-3) -> Lagrangian:
    """A multiplier that moves far in one step: a window of all five rows."""
    ascent = LogAscent(init=init, lr=lr, max_multiplier=10.0, min_multiplier=floor)
    return Lagrangian(limit=0.1, margin=0.0, window=len(LENGTHS), delay=0, bound=Mean(), dual=ascent)


def penalty(placement: str = "reward", controller: KLController | None = None) -> KLPenalty:
    controller = controller or FixedKL()
    if placement == "loss":
        return KLPenalty(estimator="k2", placement="loss", controller=controller)
    return KLPenalty(estimator="k1", placement="reward", controller=controller)


def ppo(**changes: Any) -> PPO:
    method = PPO(
        objective=WeightedSum({"helpful": 1.0}),
        kl=penalty(),
        kl_coef=BETA,
        gamma=0.9,
        lam=0.8,
        clip=0.2,
        value_clip=0.5,
        value_coef=0.7,
        reward_clip=float("inf"),
        whiten_advantages=False,
    )
    return replace(method, **changes)


def lagrangian(constraints: Mapping[str, Any], **changes: Any) -> PPOLagrangian:
    plain = ppo()
    method = PPOLagrangian(
        objective=plain.objective,
        constraints=constraints,
        kl=plain.kl,
        kl_coef=plain.kl_coef,
        gamma=plain.gamma,
        lam=plain.lam,
        clip=plain.clip,
        value_clip=plain.value_clip,
        value_coef=plain.value_coef,
        reward_clip=plain.reward_clip,
        whiten_advantages=plain.whiten_advantages,
    )
    return replace(method, **changes)


def scored_rollout(
    mask: Tensor, logprobs: Tensor, ref_logprobs: Tensor, scores: dict[str, Tensor], values: dict[str, Tensor]
) -> ScoredRollout:
    """Responses to prompts of one token."""
    rows = len(mask)
    attention = torch.cat([torch.ones(rows, 1, dtype=torch.bool), mask], dim=1)
    sequences = Sequences(
        tokens=attention.long(), attention_mask=attention, position_ids=attention.cumsum(1) - 1, response_mask=mask
    )
    rollout = Rollout(
        prompts=[Prompt.from_text(f"prompt {row}") for row in range(rows)],
        sequences=sequences,
        group=torch.arange(rows),
        finished=torch.ones(rows, dtype=torch.bool),
        responses=[""] * rows,
        logprobs=logprobs,
    )
    named = {name: Score(value=score, members=score[:, None]) for name, score in scores.items()}
    return ScoredRollout(rollout=rollout, scores=named, ref_logprobs=ref_logprobs, values=values)


def random_rollout(seed: int = 0) -> ScoredRollout:
    draw = torch.Generator().manual_seed(seed)
    rows, width = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]

    def column() -> Tensor:
        return torch.randn(rows, width, generator=draw, dtype=torch.float64).where(mask, 0)

    return scored_rollout(
        mask,
        logprobs=-column().abs(),
        ref_logprobs=-column().abs(),
        scores={name: torch.randn(rows, generator=draw, dtype=torch.float64) for name in ("helpful", "cost", "toxic")},
        values={critic: column() for critic in CRITICS},
    )


def slow_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The double sum: A_t = sum over k of (gamma lam)^k delta_{t+k}."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def stream(scored: ScoredRollout, row: int, name: str, critic: str, kl_sign: float) -> list[float]:
    """The slow advantages of one row in one stream, with `kl_sign` x beta x k1 at each token."""
    length = LENGTHS[row]
    k1 = (scored.logprobs - scored.ref_logprobs)[row, :length].tolist()
    rewards = [kl_sign * BETA * k for k in k1]
    rewards[-1] += scored.scores[name].value[row].item()
    return slow_advantages(rewards, scored.values[critic][row, :length].tolist(), 0.9, 0.8)


def padded(rows: list[list[float]]) -> Tensor:
    return torch.tensor([row + [0.0] * (max(LENGTHS) - len(row)) for row in rows], dtype=torch.float64)


METHODS: dict[str, Callable[[], Algorithm]] = {
    "ppo": ppo,
    "ppo whitened": lambda: ppo(whiten_advantages=True),
    "lagrangian": lambda: lagrangian({"cost": dual(), "toxic": FixedPrice(2.0)}),
    "lagrangian whitened": lambda: lagrangian({"cost": dual()}, whiten_advantages=True),
}


@pytest.fixture(params=METHODS, name="build")
def _build(request: pytest.FixtureRequest) -> Callable[[], Algorithm]:
    return METHODS[request.param]


def test_ppo_prepares_what_a_slow_loop_does():
    scored = random_rollout()
    experience, _ = ppo().prepare(scored)
    expected = padded([stream(scored, row, "helpful", "reward", -1.0) for row in range(len(LENGTHS))])
    assert_close(experience.advantages, expected)
    assert_close(experience.returns["reward"], expected + scored.values["reward"])


def test_two_constraints_are_priced_as_a_slow_loop_does_after_their_dual_step():
    scored = random_rollout()
    constraints = {"cost": dual(), "toxic": FixedPrice(2.0)}
    experience, metrics = lagrangian(constraints).prepare(scored)
    price = constraints["cost"].multiplier
    assert abs(price - 0.7) > 0.05  # it moved, and so its place in the order of things is seen
    assert metrics["lagrange/cost/lambda"] == price
    expected = []
    for row in range(len(LENGTHS)):
        gain = stream(scored, row, "helpful", "reward", -1.0)
        costs = stream(scored, row, "cost", "cost", +1.0), stream(scored, row, "toxic", "toxic", +1.0)
        tokens = zip(gain, *costs, strict=True)
        expected.append([(g - price * c - 2.0 * x) / (1 + price + 2.0) for g, c, x in tokens])
        for name, advantages in zip(("cost", "toxic"), costs, strict=True):
            target = experience.returns[name][row, : LENGTHS[row]] - scored.values[name][row, : LENGTHS[row]]
            assert_close(target, torch.tensor(advantages, dtype=torch.float64))
    assert_close(experience.advantages, padded(expected))


def test_the_dual_step_sees_raw_costs_without_clip_and_without_kl():
    scored = random_rollout()
    constraint = dual()
    _, metrics = lagrangian({"cost": constraint}, reward_clip=0.01, kl_coef=50.0).prepare(scored)
    cost = scored.scores["cost"].value
    assert metrics["lagrange/cost/violation"] == pytest.approx(sum(cost.tolist()) / len(cost) - 0.1)


def test_as_lambda_vanishes_ppo_lagrangian_becomes_ppo():
    scored = random_rollout()
    expected, _ = ppo().prepare(scored)
    experience, _ = lagrangian({"cost": dual(init=1e-9, floor=1e-9)}).prepare(scored)
    assert_close(experience.advantages, expected.advantages, rtol=1e-7, atol=1e-7)
    assert_close(experience.returns["reward"], expected.returns["reward"])


def test_as_lambda_grows_only_the_cost_is_left():
    scored = random_rollout()
    experience, _ = lagrangian({"cost": FixedPrice(1e9)}).prepare(scored)
    expected = padded([stream(scored, row, "cost", "cost", +1.0) for row in range(len(LENGTHS))])
    assert_close(experience.advantages, -expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prices", [(1e-6, 1e-6), (0.7, 3.0), (100.0, 0.2)])
def test_the_kl_penalties_of_all_streams_add_to_exactly_minus_beta_k(prices: tuple[float, float]):
    scored = random_rollout()
    silent = replace(
        scored,
        scores={name: score.map(torch.zeros_like) for name, score in scored.scores.items()},
        values={critic: torch.zeros_like(values) for critic, values in scored.values.items()},
    )
    constraints = {"cost": FixedPrice(prices[0]), "toxic": FixedPrice(prices[1])}
    experience, _ = lagrangian(constraints, gamma=1.0, lam=1.0).prepare(silent)
    expected = []
    for row, length in enumerate(LENGTHS):
        k1 = (scored.logprobs - scored.ref_logprobs)[row, :length].tolist()
        expected.append([-BETA * to_come for to_come in accumulate(reversed(k1))][::-1])
    assert_close(experience.advantages, padded(expected))


@pytest.mark.parametrize("method", [ppo(), lagrangian({"cost": FixedPrice(2.0)})])
def test_whitening_comes_after_pricing_and_leaves_the_returns(method: Algorithm):
    scored = random_rollout()
    priced, _ = method.prepare(scored)
    whitened, _ = replace(method, whiten_advantages=True).prepare(scored)
    mask = scored.response_mask
    valid = whitened.advantages[mask]
    assert valid.mean().item() == pytest.approx(0, abs=1e-9)
    assert valid.var(correction=0).item() == pytest.approx(1, abs=1e-6)
    # one line through all points: whitening reward and cost apart, before pricing, would bend it
    assert torch.corrcoef(torch.stack([valid, priced.advantages[mask]]))[0, 1].item() == pytest.approx(1, abs=1e-9)
    assert_close(whitened.returns, priced.returns)


def test_the_clip_bounds_each_tokens_reward_and_cost():
    draws = random_rollout()
    mask, zeros = draws.response_mask, torch.zeros_like(draws.logprobs)
    scores = {"helpful": torch.tensor([9.0, -9.0, 0.5, 0.0, 9.0]), "cost": torch.tensor([-9.0, 9.0, 0.25, 9.0, 0.0])}
    scored = scored_rollout(mask, zeros, zeros, {n: s.double() for n, s in scores.items()}, {c: zeros for c in CRITICS})
    method = lagrangian({"cost": FixedPrice(1.0)}, reward_clip=1.0, gamma=1.0, lam=1.0)
    experience, _ = method.prepare(scored)
    assert experience.returns["reward"][:, 0].tolist() == [1.0, -1.0, 0.5, 0.0, 1.0]
    assert experience.returns["cost"][:, 0].tolist() == [-1.0, 1.0, 0.25, 1.0, 0.0]


def test_columns_of_padding_change_nothing(build: Callable[[], Algorithm]):
    scored = random_rollout()
    rollout = scored.rollout
    extra = max(LENGTHS)
    wider = scored_rollout(
        pad(scored.response_mask, (0, extra)),
        pad(rollout.logprobs, (0, extra)),
        pad(scored.ref_logprobs, (0, extra)),
        {name: score.value for name, score in scored.scores.items()},
        {critic: pad(values, (0, extra)) for critic, values in scored.values.items()},
    )
    (narrow, narrow_metrics), (wide, wide_metrics) = build().prepare(scored), build().prepare(wider)
    assert_close(wide.advantages, pad(narrow.advantages, (0, extra)))
    for critic, returns in narrow.returns.items():
        assert_close(wide.returns[critic], pad(returns, (0, extra)))
    assert wide_metrics == pytest.approx(narrow_metrics)
    assert narrow.advantages[~scored.response_mask].eq(0).all()


def test_the_order_of_the_rows_does_not_matter(build: Callable[[], Algorithm]):
    scored, order = random_rollout(), torch.tensor([3, 0, 4, 1, 2])
    straight, metrics = build().prepare(scored)
    permuted, permuted_metrics = build().prepare(scored.select(order))
    assert_close(permuted.advantages, straight.advantages[order])
    for critic, returns in straight.returns.items():
        assert_close(permuted.returns[critic], returns[order])
    assert permuted_metrics == pytest.approx(metrics)


def test_metrics_by_hand_and_by_name():
    mask = torch.tensor([[True, True], [True, False]])
    zeros = torch.zeros(2, 2)
    scored = scored_rollout(
        mask,
        torch.tensor([[-1.0, -1.0], [-1.0, 0.0]]),
        torch.tensor([[-1.5, -2.0], [-1.5, 0.0]]),  # 1.5 and 0.5 nats
        {"helpful": torch.tensor([2.0, 4.0]), "cost": torch.tensor([1.0, 0.0])},
        {critic: zeros for critic in CRITICS},
    )
    common = {
        "objective/kl": 1.0,
        "objective/kl_coef": BETA,
        "objective/scores": 3.0,
        "objective/rlhf_reward": 3.0 - BETA,
    }
    assert ppo().prepare(scored)[1] == pytest.approx(common)
    _, metrics = lagrangian({"cost": dual(init=10.0)}).prepare(scored)
    duals = {"lambda": 10.0, "violation": 0.4, "bound": 0.5, "limit": 0.1, "at_cap": 1.0}
    assert metrics == pytest.approx(common | {f"lagrange/cost/{name}": value for name, value in duals.items()})


def test_the_coefficient_that_the_controller_moved_is_the_one_that_is_used_and_logged():
    scored = random_rollout()
    controller = AdaptiveKL(target=1e-6, horizon=len(LENGTHS), clip=0.2, estimator="k2")  # far above target: + 20 %
    adapted, metrics = ppo(kl=penalty(controller=controller)).prepare(scored)
    assert metrics["objective/kl_coef"] == pytest.approx(1.2 * BETA)
    expected, _ = ppo(kl_coef=1.2 * BETA).prepare(scored)
    assert_close(adapted.advantages, expected.advantages)


def test_a_penalty_in_the_loss_is_not_in_the_reward_too():
    scored = random_rollout()
    silent, _ = ppo(kl_coef=0.0).prepare(scored)
    for method in (ppo(kl=penalty("loss")), lagrangian({"cost": dual(init=1e-9, floor=1e-9)}, kl=penalty("loss"))):
        assert_close(method.prepare(scored)[0].advantages, silent.advantages, rtol=1e-6, atol=1e-6)


def test_what_they_read_and_carry_is_named():
    objective: Objective = WeightedSum({"helpful": 1.0, "length": -0.1})
    assert ppo(objective=objective).streams == ("helpful", "length")
    assert ppo().critics == ("reward",)
    constraint = dual()
    method = lagrangian({"toxic": FixedPrice(1.0), "cost": constraint}, objective=objective)
    assert method.streams == ("helpful", "length", "toxic", "cost")
    assert method.critics == ("reward", "toxic", "cost")
    assert method.stateful.keys() == {"kl", "lagrange/toxic", "lagrange/cost"}
    assert method.stateful["lagrange/cost"] is constraint
    assert ppo().stateful.keys() == {"kl"}


def test_no_constraint_and_a_constraint_named_as_the_rewards_critic_are_refused():
    with pytest.raises(ValueError, match="needs a constraint"):
        lagrangian({})
    with pytest.raises(ValueError, match="share the reward's critic"):
        lagrangian({"reward": dual()})


# -- the loss


def experience_of(method: Algorithm) -> tuple[Experience, PolicyForward]:
    """An experience, and a policy and critics that have moved a little since."""
    experience, _ = method.prepare(random_rollout())
    draw = torch.Generator().manual_seed(9)
    scored, mask = experience.scored, experience.token_mask

    def moved(x: Tensor, by: float) -> Tensor:
        return (x + by * torch.randn(x.shape, generator=draw, dtype=x.dtype).where(mask, 0)).requires_grad_()

    values = {critic: moved(scored.values[critic], 1.0) for critic in method.critics}
    return experience, PolicyForward(moved(scored.logprobs, 0.3), torch.zeros_like(scored.logprobs), values)


def total(method: Algorithm, new: PolicyForward, experience: Experience) -> Tensor:
    """The loss as the learner makes it: the weighted sum of means over valid tokens."""
    terms = [term for term in method.loss(new, experience) if term.weight]
    return sum((term.weight * term.values[experience.token_mask].mean() for term in terms), torch.tensor(0.0))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (ppo(), {"policy": 1.0, "clipfrac": 0.0, "value/reward": 0.7}),
        (ppo(kl=penalty("loss")), {"policy": 1.0, "clipfrac": 0.0, "value/reward": 0.7, "kl": BETA}),
        (
            lagrangian({"cost": FixedPrice(1.0), "toxic": FixedPrice(1.0)}, kl=penalty("loss")),
            {"policy": 1, "clipfrac": 0, "kl": BETA, "value/reward": 0.7, "value/cost": 0.7, "value/toxic": 0.7},
        ),
    ],
)
def test_names_and_weights_of_the_terms(method: Algorithm, expected: dict[str, float]):
    experience, new = experience_of(method)
    terms = method.loss(new, experience)
    assert {term.name: term.weight for term in terms} == expected
    assert len(terms) == len(expected)
    for term in terms:
        assert term.per == "token"
        assert term.values.shape == experience.token_mask.shape


@pytest.mark.parametrize("placement", ["reward", "loss"])
@pytest.mark.parametrize("constrained", [False, True])
def test_gradients_are_finite_differences_and_point_the_right_way(placement: str, constrained: bool):
    kl, h = penalty(placement), 1e-6
    method = lagrangian({"cost": FixedPrice(0.5)}, kl=kl) if constrained else ppo(kl=kl)
    experience, new = experience_of(method)
    columns = {"policy": new.logprobs, **new.values}
    gradients = dict(
        zip(columns, torch.autograd.grad(total(method, new, experience), list(columns.values())), strict=True)
    )

    def moved(name: str, row: int, column: int, by: float) -> float:
        shifted = {key: x.detach().clone() for key, x in columns.items()}
        shifted[name][row, column] += by
        forward = PolicyForward(shifted.pop("policy"), new.entropy, shifted)
        return total(method, forward, experience).item()

    for name, gradient in gradients.items():
        assert gradient[~experience.token_mask].eq(0).all()
        for row, length in enumerate(LENGTHS):
            for column in range(length):
                slope = (moved(name, row, column, h) - moved(name, row, column, -h)) / (2 * h)
                assert gradient[row, column].item() == pytest.approx(slope, abs=1e-7)

    tokens = sum(LENGTHS)
    for critic, values in new.values.items():
        # each value is pulled towards its own stream's return, or left alone if the clip keeps it
        errors = (values - experience.returns[critic]).detach()[experience.token_mask]
        slopes = gradients[critic][experience.token_mask]
        pulled = slopes != 0
        assert pulled.sum() > tokens / 3
        assert_close(slopes[pulled], 0.7 * errors[pulled] / tokens)


@pytest.mark.parametrize("method", [ppo(), lagrangian({"cost": FixedPrice(0.5), "toxic": FixedPrice(1.0)})])
def test_before_the_policy_moves_descent_raises_good_tokens_in_proportion_to_their_advantage(method: Algorithm):
    experience, _ = method.prepare(random_rollout())
    scored = experience.scored
    logprobs = scored.logprobs.clone().requires_grad_()
    new = PolicyForward(logprobs, torch.zeros_like(logprobs), {c: scored.values[c] for c in method.critics})
    (gradient,) = torch.autograd.grad(total(method, new, experience), logprobs)
    assert_close(gradient, -experience.advantages / sum(LENGTHS))
