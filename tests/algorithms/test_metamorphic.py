"""What must not change, and what must become the same: each method seen through the others."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import scipy
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_lab.algorithms.reinforce import RunningMean
from rlhf_lab.bounds import StudentT
from rlhf_lab.constraints import FixedPrice
from rlhf_lab.interfaces import Bound
from rlhf_lab.objectives import Chebyshev, Preferred, WeightedSum, WorstCase
from rlhf_lab.records import Prompt
from rlhf_lab.types import Batch, Experience, PolicyForward, Score, ScoredRollout
from tests.algorithms.ground_truth import World, total
from tests.algorithms.methods import (
    METHODS,
    Method,
    ascent,
    at_price,
    constraint,
    grpo,
    penalty,
    ppo,
    ppo_lag,
    reinforce,
    rloo,
)

K = 4
PREFERS = [
    Prompt.from_text(text).conditioned("", {stream: 2.0}) for text, stream in (("l", "helpful"), ("r", "humour"))
]
WORLD = World.drawn(prompts=PREFERS)
without_critics = pytest.mark.parametrize("method", [reinforce, rloo, grpo], ids=["reinforce", "rloo", "grpo"])


def sampled(scores: Mapping[str, Tensor] | None = None, groups: int = 6) -> ScoredRollout:
    """Responses of a policy that is not the reference; `scores` replace those of the world."""
    source = torch.Generator().manual_seed(3)
    logits = WORLD.reference + torch.randn(WORLD.reference.shape, dtype=torch.float64, generator=source)
    values = {name: torch.zeros(WORLD.reference.shape[:2], dtype=torch.float64) for name in ("reward", "cost")}
    scored, *_ = WORLD.sample(logits, groups // 2 * K, K, values, source)
    given = {name: Score(value=value, members=value[:, None]) for name, value in (scores or {}).items()}
    return replace(scored, scores=scored.scores | given)


def moved(scored: ScoredRollout, by: float) -> PolicyForward:
    """What a policy says that has moved away from the one that sampled; with gradient."""
    source = torch.Generator().manual_seed(4)
    step = by * torch.randn(scored.logprobs.shape, dtype=torch.float64, generator=source)
    logprobs = (scored.logprobs + step).where(scored.response_mask, 0).requires_grad_()
    return PolicyForward(logprobs, torch.zeros_like(logprobs), dict(scored.values))


def loss_and_slope(algorithm: Any, experience: Experience, by: float = 0.0) -> tuple[Tensor, Tensor]:
    """The loss of the whole batch, and its slope in each token's log-probability."""
    new = moved(experience.scored, by)
    loss = total([term for term in algorithm.loss(new, experience) if "value" not in term.name], experience)
    (slope,) = torch.autograd.grad(loss, new.logprobs)
    return loss.detach(), slope.where(experience.token_mask, 0)  # a policy says nothing at the others


def prepared(algorithm: Any, scored: ScoredRollout | None = None) -> Tensor:
    return algorithm.prepare(scored or sampled())[0].advantages


def test_at_ratio_one_the_gradients_of_ppo_and_reinforce_are_the_same():
    # no critic's opinion, no KL: every token of a response is credited with all of its reward
    scored = sampled()
    plain, critic = reinforce(beta=0.0), replace(ppo(beta=0.0), lam=1.0)
    _, slope = loss_and_slope(plain, plain.prepare(scored)[0])
    _, tokenwise = loss_and_slope(critic, critic.prepare(scored)[0])
    tokens, rows = scored.response_mask.sum(), len(scored)
    assert_close(tokenwise * tokens, slope * rows)
    reward = scored.columns["helpful"][:, None].where(scored.response_mask, 0)
    assert_close(slope * rows, -reward)  # raises the log-probability of what is good, in proportion


@pytest.mark.parametrize("divide", [True, False])
@without_critics
def test_at_price_zero_a_constraint_changes_nothing(method: Method, divide: bool):
    assert_close(prepared(method({"cost": at_price(0.0)}, divide=divide)), prepared(method()))


def test_at_price_zero_ppo_lagrangian_is_ppo():
    scored = sampled()
    (priced, metrics), (plain, expected) = (a.prepare(scored) for a in (ppo_lag({"cost": at_price(0.0)}), ppo()))
    assert_close(priced.advantages, plain.advantages)
    assert_close(priced.returns["reward"], plain.returns["reward"])
    assert {name: metrics[name] for name in expected} == expected


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    "objective",
    [
        WeightedSum({"helpful": 1.0, "humour": 0.0}),
        WorstCase({"helpful": 1.0}),
        Chebyshev({"helpful": 1.0}, {"helpful": 0.0}, rho=0.0),
    ],
    ids=["morlhf", "worst_case", "chebyshev"],
)
def test_one_reward_of_weight_one_is_that_reward(method: Method, objective: Any):
    assert_close(prepared(method(objective=objective)), prepared(method()))


def test_a_prompt_that_prefers_one_reward_is_served_that_one():
    scored, objective = sampled(), Preferred(["helpful", "humour"])
    reward = objective(scored.columns, scored.rollout.prompts)
    left = torch.tensor([prompt == PREFERS[0] for prompt in scored.rollout.prompts])
    assert left.any()
    assert not left.all()
    assert_close(reward, scored.columns["helpful"].where(left, scored.columns["humour"]))


@pytest.mark.parametrize("method", [rloo, grpo])
def test_what_a_prompt_is_worth_as_such_teaches_nothing(method: Method):
    scored = sampled()
    shift = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(9))[scored.rollout.group]
    shifted = sampled({"helpful": scored.columns["helpful"] + shift})
    assert_close(prepared(method(), shifted), prepared(method(), scored))
    assert not torch.allclose(prepared(reinforce(), shifted), prepared(reinforce(), scored))


def test_scaled_by_its_spread_a_prompt_may_count_in_any_unit():
    scored = sampled()
    scale = 1 + scored.rollout.group.double()
    scaled = sampled({"helpful": scored.columns["helpful"] * scale})
    method = grpo(scale_by_sd=True, beta=0.0)
    assert_close(prepared(method, scaled), prepared(method, scored))
    assert not torch.allclose(prepared(grpo(beta=0.0), scaled), prepared(grpo(beta=0.0), scored))


def test_leave_one_out_is_the_published_sum_over_each_group():
    # mean over prompts of 1 / (K - 1) sum_i (G_i - mean G) log pi(y_i), and its gradient
    scored, algorithm = sampled(), rloo()
    _, slope = loss_and_slope(algorithm, algorithm.prepare(scored)[0])
    returns = scored.columns["helpful"] - 0.4 * (scored.logprobs - scored.ref_logprobs).sum(1)
    expected = torch.zeros_like(slope)
    groups = scored.rollout.group.unique().tolist()
    for group in groups:
        rows = (scored.rollout.group == group).nonzero()[:, 0].tolist()
        average = sum(returns[i] for i in rows) / len(rows)
        for i in rows:
            expected[i] = -(returns[i] - average) / (len(rows) - 1) / len(groups)
    assert_close(slope, expected.where(scored.response_mask, 0))


def test_grpo_unscaled_over_tokens_is_leave_one_out_shrunk_by_its_own_share():
    scored = sampled()
    slopes = [loss_and_slope(algorithm, algorithm.prepare(scored)[0])[1] for algorithm in (grpo(), rloo())]
    assert_close(slopes[0], slopes[1] * (K - 1) / K)


@pytest.mark.parametrize("length", ["sequence", "tokens"])
def test_grpo_away_from_the_policy_that_sampled_is_its_formula_token_by_token(length: Any):
    scored = sampled()
    algorithm = grpo(kl=penalty("k3", "loss"), length=length, scale_by_sd=True)
    experience = algorithm.prepare(scored)[0]
    loss, _ = loss_and_slope(algorithm, experience, by=0.4)
    new = moved(scored, 0.4).logprobs.detach()
    by_hand, sizes = 0.0, scored.response_mask.sum(1).tolist()
    for i, size in enumerate(sizes):
        own = 0.0
        for t in range(size):
            ratio = (new[i, t] - scored.logprobs[i, t]).exp().item()
            advantage = experience.advantages[i, t].item()
            gap = (scored.ref_logprobs[i, t] - new[i, t]).item()
            own -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            own += 0.4 * (torch.tensor(gap).exp().item() - 1 - gap)
        by_hand += own / size if length == "sequence" else own
    assert loss.item() == pytest.approx(by_hand / len(sizes), rel=1e-5)


@without_critics
@pytest.mark.parametrize("penalised", [("k1", "reward"), ("k2", "loss"), ("k3", "loss")])
def test_slopes_off_policy_are_finite_differences(method: Method, penalised: Any):
    algorithm = method(kl=penalty(*penalised))
    experience = algorithm.prepare(sampled())[0]
    _, slope = loss_and_slope(algorithm, experience, by=0.05)
    base = moved(experience.scored, 0.05).logprobs.detach()
    for i, t in ((0, 0), (3, 0), (7, 1)):
        if not experience.token_mask[i, t]:
            continue
        ends = []
        for sign in (1, -1):
            nudged = base.clone()
            nudged[i, t] += sign * 1e-6
            terms = algorithm.loss(PolicyForward(nudged, torch.zeros_like(nudged), {}), experience)
            ends.append(total(terms, experience).item())
        assert slope[i, t].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("method", [reinforce, rloo])
def test_a_response_that_has_moved_its_clip_is_left_alone_and_others_are_weighed_by_their_ratio(method: Method):
    algorithm = method()
    experience = algorithm.prepare(sampled())[0]
    new = moved(experience.scored, 0.3)
    ratio = (new.logprobs.detach() - experience.scored.logprobs).sum(1).exp()
    _, slope = loss_and_slope(algorithm, experience, by=0.3)
    advantage = experience.advantages[:, 0]
    done = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    assert done.any()
    assert not done.all()
    expected = -(ratio * advantage / len(ratio)).where(~done, 0)
    assert_close(slope, expected[:, None].where(experience.token_mask, 0))


@pytest.mark.parametrize("method", [ppo_lag, reinforce, rloo, grpo])
@pytest.mark.parametrize(
    "bound",
    [
        StudentT(delta=0.1, train_inflation=0.0, test_inflation=0.0, test_size=None, guard=False),
        StudentT(delta=0.5, train_inflation=3.0, test_inflation=2.0, test_size=9, guard=True),  # t of one half is 0
    ],
)
def test_a_confidence_bound_of_no_width_is_the_mean(method: Method, bound: Bound):
    narrow, plain = (method({"cost": constraint(-0.2, ascent(), b)}) for b in (bound, None))
    for _ in range(3):  # the multipliers climb alike, too
        assert_close(prepared(narrow), prepared(plain))
    assert narrow.constraints["cost"].multiplier == pytest.approx(plain.constraints["cost"].multiplier)
    assert plain.constraints["cost"].multiplier > 0.5


@pytest.mark.parametrize("method", [ppo_lag, reinforce, rloo, grpo])
def test_a_confidence_bound_prices_each_cost_by_its_influence_on_the_bound(method: Method):
    scored = sampled()
    cost = scored.columns["cost"]
    kappa = 4 * float(scipy.stats.t.ppf(0.9, len(cost) - 1)) / len(cost) ** 0.5
    influence = cost + kappa * (cost**2 - 2 * cost * cost.mean()) / (2 * cost.std())
    wide = StudentT(delta=0.1, train_inflation=4.0, test_inflation=0.0, test_size=None, guard=False)
    found = prepared(method({"cost": constraint(0.0, FixedPrice(1.0), wide)}), scored)
    assert_close(found, prepared(method({"cost": at_price(1.0)}), sampled({"cost": influence})))
    assert not torch.allclose(found, prepared(method({"cost": at_price(1.0)}), scored))


def widened(batch: Any, columns: int) -> Any:
    """The same batch with `columns` more of padding on the right of everything that has tokens."""

    def more(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() != 2 or leaf.shape[1] == 1:
            return leaf
        return torch.cat([leaf, leaf.new_zeros(len(leaf), columns)], dim=1)

    assert isinstance(batch, Batch)
    return batch.map(more)


@without_critics
@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_columns_of_padding_change_nothing(method: Method, placement: Any):
    def build() -> Any:
        return method({"cost": at_price(0.7)}, kl=penalty("k1" if placement == "reward" else "k3", placement))

    (narrow, metrics), (wide, same) = (build().prepare(scored) for scored in (sampled(), widened(sampled(), 3)))
    assert same == pytest.approx(metrics)
    assert_close(wide.advantages[:, :3], narrow.advantages)
    assert wide.advantages[:, 3:].eq(0).all()
    new = moved(narrow.scored, 0.1)
    padded = torch.cat([new.logprobs, torch.zeros(len(narrow), 3, dtype=torch.float64)], dim=1)
    losses = [
        total(build().loss(PolicyForward(logprobs, torch.zeros_like(logprobs), {}), experience), experience)
        for logprobs, experience in ((new.logprobs, narrow), (padded, wide))
    ]
    assert_close(*losses)


@without_critics
def test_the_order_of_the_rows_does_not_matter(method: Method):
    scored = sampled()
    order = torch.randperm(len(scored), generator=torch.Generator().manual_seed(1))
    straight, permuted = method({"cost": at_price(0.7)}), method({"cost": at_price(0.7)})
    assert_close(prepared(permuted, scored.select(order)), prepared(straight, scored)[order])


def advantages_after(returns: list[float], decay: float) -> list[float]:
    """What REINFORCE subtracts in each of some iterations, whose responses all earn the same."""
    algorithm = replace(reinforce(beta=0.0), baseline=RunningMean(decay))
    baselines = []
    for each in returns:
        scored = sampled()
        given = sampled({"helpful": torch.full_like(scored.columns["helpful"], each)})
        baselines.append(each - prepared(algorithm, given)[0, 0].item())
    return baselines


def test_the_baseline_is_of_earlier_iterations_and_forgets():
    assert advantages_after([1.0, 2.0, 4.0, 0.0], 1.0) == pytest.approx([0, 1, 1.5, 7 / 3])
    halved = [0, 1, (2 + 0.5 * 1) / 1.5, (4 + 0.5 * 2 + 0.25 * 1) / 1.75]
    assert advantages_after([1.0, 2.0, 4.0, 0.0], 0.5) == pytest.approx(halved)


def test_the_baseline_restored_goes_on_as_if_never_stopped():
    straight, resumed = RunningMean(0.9), RunningMean(0.9)
    for size in (3.0, 0.5):
        straight.add(torch.full((4,), size))
    resumed.load_state_dict(straight.state_dict())
    for part in (straight, resumed):
        part.add(torch.tensor([1.0, 2.0]))
    assert resumed.value == straight.value
    assert reinforce().stateful.keys() == {"kl", "baseline"}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_preparing_is_without_gradient_and_without_side_effects_on_its_input(method: Callable[..., Any]):
    scored = sampled()
    before = {name: column.clone() for name, column in scored.columns.items()}
    experience, _ = method().prepare(scored)
    assert not experience.advantages.requires_grad
    assert all(torch.equal(before[name], column) for name, column in scored.columns.items())
