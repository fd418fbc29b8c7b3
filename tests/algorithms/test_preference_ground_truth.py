"""What the methods on preferences end at, in a world where that is known: all pairs, with exact probabilities."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import scipy
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_lab.algorithms.dpo import DPO
from rlhf_lab.algorithms.modpo import MODPO
from rlhf_lab.algorithms.preference import Margin
from rlhf_lab.algorithms.simpo import SimPO
from rlhf_lab.types import PairBatch, PairForward, PolicyForward, Sequences
from tests.algorithms.ground_truth import World, distance, forward_kl_optimum

BETA = 0.4
WORLD = World.drawn(longest=2)
NONE = Margin(constant=0.0, scale=0.0, unit="reward")


def couples(world: World) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) each: prompt, chosen and rejected response of every ordered pair of different responses."""
    prompts, responses = world.prior.shape
    grid = torch.cartesian_prod(torch.arange(prompts), torch.arange(responses), torch.arange(responses))
    return tuple(grid[grid[:, 1] != grid[:, 2]].T)  # pyright: ignore[reportReturnType]


def text(world: World, row: Tensor) -> Sequences:
    mask, blank = world.mask[row], torch.zeros(len(row), 1, dtype=torch.int64)
    return Sequences(
        tokens=torch.cat([blank, world.tokens[row]], 1),
        attention_mask=torch.cat([blank == 0, mask], 1),
        position_ids=torch.arange(world.longest + 1).expand(len(row), -1),
        response_mask=mask,
    )


def learnt(
    method: Any,
    reward: Tensor,
    *,
    world: World = WORLD,
    margin: Tensor | None = None,
    gaps: Mapping[str, Tensor] | None = None,
    only: tuple[int, int] | None = None,
) -> Tensor:
    """(P, R) probabilities that minimise the method's loss on preferences that follow `reward` by Bradley-Terry.

    Args:
        margin, gaps: (P, R) scores whose differences the pairs carry.
        only: the two responses that are compared; all of them otherwise.
    """
    prompt, first, second = couples(world)
    if only:
        kept = torch.tensor([{a, b} == set(only) for a, b in zip(first.tolist(), second.tolist(), strict=True)])
        prompt, first, second = prompt[kept], first[kept], second[kept]

    def gap(score: Tensor) -> Tensor:
        return score[prompt, first] - score[prompt, second]

    wins = torch.sigmoid(gap(reward))  # how often the pair is seen in this order
    reference = world.token_logprobs(world.reference).sum(-1)
    batch = PairBatch(
        chosen=text(world, first),
        rejected=text(world, second),
        margin=torch.zeros_like(wins) if margin is None else gap(margin),
        reference=(reference[prompt, first], reference[prompt, second]),
        gaps={name: gap(score) for name, score in (gaps or {}).items()},
    )
    logits = world.reference.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=2000, line_search_fn="strong_wolfe", tolerance_grad=1e-11)

    def closure() -> Tensor:
        optimiser.zero_grad()
        said = world.token_logprobs(logits)
        blank = torch.zeros(batch.chosen.response_mask.shape)
        new = PairForward(*(PolicyForward(said[prompt, row], blank, {}) for row in (first, second)))
        loss = sum((wins * term.values * term.weight).sum() for term in method.loss(new, batch) if term.weight)
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]
    return world.probabilities(logits.detach())


def dpo(**changes: Any) -> DPO:
    return DPO(**{"beta": BETA, "margin": NONE, "label_smoothing": 0.0, **changes})


def test_dpo_ends_at_the_tilted_reference():
    reward = WORLD.scores["helpful"]
    best = forward_kl_optimum(WORLD.prior, reward, BETA)
    assert distance(learnt(dpo(), reward), best) < 1e-4
    assert distance(best, WORLD.prior) > 0.3  # which is far from where it began


@pytest.mark.parametrize(("unit", "worth"), [("reward", 1.0), ("log_ratio", BETA)])
def test_a_margin_of_the_data_is_reward_beyond_what_the_preferences_say(unit, worth):
    reward, bonus = WORLD.scores["helpful"], WORLD.scores["humour"]
    found = learnt(dpo(margin=Margin(constant=0.0, scale=2.0, unit=unit)), reward, margin=bonus)
    assert distance(found, forward_kl_optimum(WORLD.prior, reward + 2 * worth * bonus, BETA)) < 1e-4


@pytest.mark.parametrize("constant", [0.5, 2.0])
def test_a_constant_margin_widens_every_difference_as_stated(constant):
    reward, (a, b) = WORLD.scores["helpful"], (1, 5)
    found = learnt(dpo(margin=Margin(constant=constant, scale=0.0, unit="reward")), reward, only=(a, b))
    ratio = found.log() - WORLD.prior.log()
    odds, m = (reward[:, a] - reward[:, b]).exp(), math.exp(-constant)
    u = ((odds - 1) + ((odds - 1).square() + 4 * odds * m * m).sqrt()) / (2 * m)  # the positive root
    assert_close(BETA * (ratio[:, a] - ratio[:, b]), u.log(), atol=1e-4, rtol=0)
    assert (u.log().abs() > odds.log().abs()).all()


def test_label_smoothing_ends_where_so_many_labels_are_taken_back():
    reward, (a, b), eps = WORLD.scores["helpful"], (0, 4), 0.2
    found = learnt(dpo(label_smoothing=eps), reward, only=(a, b))
    ratio = found.log() - WORLD.prior.log()
    wins = torch.sigmoid(reward[:, a] - reward[:, b])
    believed = (1 - eps) * wins + eps * (1 - wins)
    assert_close(torch.sigmoid(BETA * (ratio[:, a] - ratio[:, b])), believed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("others", [{"humour": 0.7}, {"humour": 0.4, "cost": -0.3}])
def test_modpo_ends_at_the_optimum_of_the_weighted_rewards(others):
    reward, weight = WORLD.scores["helpful"], 0.6
    found = learnt(MODPO(beta=BETA, weight=weight, others=others), reward, gaps=WORLD.scores)
    total = weight * reward + sum(w * WORLD.scores[name] for name, w in others.items())
    assert distance(found, forward_kl_optimum(WORLD.prior, total, BETA)) < 1e-4


def test_modpo_with_nothing_else_to_weigh_is_dpo():
    reward = WORLD.scores["cost"]
    assert_close(learnt(MODPO(beta=BETA, weight=1.0, others={}), reward), learnt(dpo(), reward))


def simpo_optimum(world: World, reward: Tensor, beta: float) -> Tensor:
    """(P, R): beta log pi(y) / |y| = r(y) + c for every y, c such that the probabilities sum to 1."""
    lengths = world.mask.sum(1)

    def logprobs(scores: Tensor, c: float) -> Tensor:
        return lengths * (scores + c) / beta

    rows = []
    for scores in reward:
        c = scipy.optimize.brentq(lambda c, r=scores: logprobs(r, c).exp().sum().item() - 1, -20, 20, xtol=1e-12)
        rows.append(logprobs(scores, c).exp())
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_simpo_ends_where_mean_logprobs_differ_as_the_rewards_do(scale):
    reward, bonus, beta = WORLD.scores["helpful"], WORLD.scores["humour"], 2.0
    method = SimPO(beta=beta, margin=Margin(constant=0.0, scale=scale, unit="reward"), length="answer")
    found = learnt(method, reward, margin=bonus)
    assert distance(found, simpo_optimum(WORLD, reward + scale * bonus, beta)) < 1e-4


def test_simpo_forgets_the_reference_and_dpo_does_not():
    reward = torch.zeros_like(WORLD.prior)  # every pair is a coin toss
    assert distance(learnt(dpo(), reward), WORLD.prior) < 1e-6
    found = learnt(SimPO(beta=2.0, margin=NONE, length="answer"), reward)
    per_token = found.log() / WORLD.mask.sum(1)
    assert_close(per_token, per_token[:, :1].expand_as(per_token), atol=1e-4, rtol=0)
