"""What a response earns, worked by hand and with a constraint that shows what it was asked."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_lab.objectives import FixedKL, KLPenalty, WeightedSum
from rlhf_lab.records import Prompt
from rlhf_lab.returns import priced_returns, spread
from rlhf_lab.types import Metrics, Rollout, Score, ScoredRollout, Sequences

KL = torch.tensor([[0.5, 0.0], [1.0, -3.0]])  # nats: 0.5 and -2


@dataclass
class Priced:
    """A constraint at a fixed price whose surrogate is the squared cost, and which notes the order of its calls."""

    multiplier: float
    limit: float = 0.0
    calls: list[str] = field(default_factory=list)

    def step(self, cost: Tensor) -> Metrics:
        self.calls.append(f"step {cost.tolist()}")
        return {"lambda": self.multiplier}

    def surrogate(self, cost: Tensor) -> Tensor:
        self.calls.append("surrogate")
        return cost.square()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def scored() -> ScoredRollout:
    scores = {"helpful": torch.tensor([1.0, 2.0]), "cost": torch.tensor([3.0, -1.0]), "toxic": torch.tensor([0.0, 2.0])}
    mask = torch.ones(2, 2, dtype=torch.bool)
    sequences = Sequences(
        tokens=torch.zeros(2, 3, dtype=torch.int64),
        attention_mask=torch.ones(2, 3, dtype=torch.bool),
        position_ids=torch.arange(3).expand(2, 3),
        response_mask=mask,
    )
    rollout = Rollout(
        prompts=[Prompt.from_text("hello")] * 2,
        sequences=sequences,
        group=torch.zeros(2, dtype=torch.int64),
        finished=mask[:, 0],
        responses=["", ""],
        logprobs=KL - 1,
    )
    return ScoredRollout(
        rollout=rollout,
        scores={name: Score(value=value, members=value[:, None]) for name, value in scores.items()},
        ref_logprobs=torch.full((2, 2), -1.0),
        values={},
    )


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "objective": WeightedSum({"helpful": 1.0}),
        "constraints": {},
        "kl": KLPenalty(estimator="k1", placement="reward", controller=FixedKL()),
        "kl_coef": 0.1,
        "reward_clip": float("inf"),
        "divide_by_prices": True,
        **changes,
    }


def test_without_constraints_a_response_earns_its_reward_less_the_penalty():
    returns, metrics = priced_returns(scored(), **settings())
    assert_close(returns, torch.tensor([0.95, 2.2]))
    assert metrics["objective/kl"] == pytest.approx(-0.75)
    assert metrics["objective/scores"] == pytest.approx(1.5)
    assert metrics["objective/rlhf_reward"] == pytest.approx((0.95 + 2.2) / 2)


@pytest.mark.parametrize(
    ("divide", "expected"),
    [
        # (r - 2 c1^2 - 1 c2^2) / (1 + 2 + 1) - 0.1 KL
        (True, [(1 - 18 - 0) / 4 - 0.05, (2 - 2 - 4) / 4 + 0.2]),
        # as published: r - 0.1 KL - 2 c1^2 - c2^2
        (False, [0.95 - 18, 2.2 - 2 - 4]),
    ],
)
def test_prices_by_hand_and_the_multiplier_steps_first(divide: bool, expected: list[float]):
    constraints = {"cost": Priced(2.0), "toxic": Priced(1.0)}
    returns, metrics = priced_returns(scored(), **settings(constraints=constraints, divide_by_prices=divide))
    assert_close(returns, torch.tensor(expected))
    assert constraints["cost"].calls == ["step [3.0, -1.0]", "surrogate"]
    assert metrics["lagrange/toxic/lambda"] == 1.0


def test_the_clip_is_on_score_and_penalty_together_and_not_on_the_cost():
    returns, _ = priced_returns(scored(), **settings(reward_clip=2.1))
    assert_close(returns, torch.tensor([0.95, 2.1]))
    constraints = {"cost": Priced(1.0)}
    published = settings(reward_clip=2.1, constraints=constraints, divide_by_prices=False)
    assert_close(priced_returns(scored(), **published)[0], torch.tensor([0.95 - 9, 2.1 - 1]))


def test_a_penalty_in_the_loss_is_not_in_the_return():
    kl = KLPenalty(estimator="k3", placement="loss", controller=FixedKL())
    returns, metrics = priced_returns(scored(), **settings(kl=kl))
    assert returns.tolist() == [1.0, 2.0]
    k3 = (torch.exp(-KL) - 1 + KL).sum(1)
    assert metrics["objective/kl"] == pytest.approx(k3.mean().item())


def test_spread_is_the_same_at_every_token_and_zero_where_masked():
    mask = torch.tensor([[True, True], [True, False]])
    assert spread(torch.tensor([2.0, -3.0]), mask).tolist() == [[2.0, 2.0], [-3.0, 0.0]]
