"""Losses of the methods on preferences, row by row, against loops over floats; and what carries gradient."""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_lab.algorithms.dpo import DPO
from rlhf_lab.algorithms.dpo_pop import DPOPoP
from rlhf_lab.algorithms.dpo_pop_dual import DPOPoPDual
from rlhf_lab.algorithms.modpo import MODPO
from rlhf_lab.algorithms.preference import Margin
from rlhf_lab.algorithms.simpo import SimPO, mean_logprobs
from rlhf_lab.algorithms.simpo_pop import SimPOPoP
from rlhf_lab.bounds import Mean
from rlhf_lab.constraints import Lagrangian, LogAscent
from rlhf_lab.data.tokenise import join, pad
from rlhf_lab.types import PairBatch, PairForward, PolicyForward, QuadrupleBatch, QuadrupleForward, Sequences, Term

EOS = 0  # which is the pad, too
PROMPTS = [[5], [5, 6], [5, 6, 7]]
CHOSEN = [[8, 9, EOS], [8, EOS], [7, 7, 7, 7, EOS]]
REJECTED = [[8, 7, 7, 7, EOS], [8, 8, EOS], [6, EOS]]
# the tokens from the first that differs to the end, the EOS included
OWN = ([[1, 2], [1], [0, 1, 2, 3, 4]], [[1, 2, 3, 4], [1, 2], [0, 1]])
NONE = Margin(constant=0.0, scale=0.0, unit="reward")
B = 3


def text(responses: list[list[int]]) -> Sequences:
    return join(*pad(PROMPTS, EOS, "left"), *pad(responses, EOS, "right"))


def pairs(seed: int = 0, margin: list[float] | None = None) -> PairBatch:
    reference = torch.randn(2, B, generator=torch.Generator().manual_seed(seed)) * 3 - 8
    return PairBatch(
        chosen=text(CHOSEN),
        rejected=text(REJECTED),
        margin=torch.tensor(margin or [0.0] * B),
        reference=(reference[0], reference[1]),
    )


def said(batch: PairBatch, seed: int = 1) -> PairForward:
    """Random log-probabilities of every response token, with gradient; 0 where masked."""
    draw = torch.Generator().manual_seed(seed)
    forwards = []
    for each in batch.texts:
        logprobs = -3 * torch.rand(each.response_mask.shape, generator=draw)
        logprobs = logprobs.where(each.response_mask, 0).requires_grad_()
        forwards.append(PolicyForward(logprobs, torch.zeros_like(logprobs), {}))
    return PairForward(*forwards)


def named(terms: Any) -> dict[str, Term]:
    return {term.name: term for term in terms}


def log_ratio_gap(new: PairForward, batch: PairBatch, i: int) -> float:
    sums = [sum(forward.logprobs[i].tolist()) for forward in (new.chosen, new.rejected)]
    return (sums[0] - batch.reference[0][i].item()) - (sums[1] - batch.reference[1][i].item())


def surprise(z: float) -> float:
    return -math.log(1 / (1 + math.exp(-z)))


def dpo(**changes: Any) -> DPO:
    return DPO(**{"beta": 0.3, "margin": NONE, "label_smoothing": 0.0, **changes})


def test_dpo_is_the_published_loss_of_each_row():
    batch = pairs()
    new = said(batch)
    terms = named(dpo().loss(new, batch))
    expected = [surprise(0.3 * log_ratio_gap(new, batch, i)) for i in range(B)]
    assert_close(terms["pairwise"].values, torch.tensor(expected))
    assert terms["pairwise"].per == "row"
    assert terms["accuracy"].values.tolist() == [float(log_ratio_gap(new, batch, i) > 0) for i in range(B)]
    reward = 0.3 * (new.rejected.logprobs.sum(1) - batch.reference[1])
    assert_close(terms["implicit_reward/rejected"].values, reward.detach())
    assert [name for name, term in terms.items() if term.weight] == ["pairwise"]


@pytest.mark.parametrize(("unit", "factor"), [("reward", 1.0), ("log_ratio", 0.3)])
def test_margins_make_one_loss_a_row_each_with_its_own_margin(unit: Literal["reward", "log_ratio"], factor: float):
    margins = [0.4, -1.0, 7.0]
    batch = pairs(margin=margins)
    new = said(batch)
    terms = named(dpo(margin=Margin(constant=0.5, scale=2.0, unit=unit)).loss(new, batch))
    asked = [factor * (0.5 + 2.0 * m) for m in margins]
    expected = [surprise(0.3 * log_ratio_gap(new, batch, i) - asked[i]) for i in range(B)]
    assert_close(terms["pairwise"].values, torch.tensor(expected))
    assert_close(terms["margin"].values, torch.tensor(asked))


def test_only_a_scaled_margin_needs_margins_in_the_data():
    assert not dpo(margin=Margin(constant=3.0, scale=0.0, unit="reward")).use_margin
    assert dpo(margin=Margin(constant=0.0, scale=0.5, unit="reward")).use_margin


def test_label_smoothing_weighs_both_orders():
    batch = pairs(margin=[0.3, 0.0, -2.0])
    new = said(batch)
    method = dpo(label_smoothing=0.2, margin=Margin(constant=0.0, scale=1.0, unit="reward"))
    z = [0.3 * log_ratio_gap(new, batch, i) - batch.margin[i].item() for i in range(B)]
    expected = [0.8 * surprise(each) + 0.2 * surprise(-each) for each in z]
    assert_close(named(method.loss(new, batch))["pairwise"].values, torch.tensor(expected))


def test_modpo_asks_for_the_other_rewards_gap_in_shares_of_its_own_weight():
    gaps = {"humour": [0.5, -1.0, 0.0], "cost": [2.0, 0.0, 1.0]}
    batch = replace(pairs(), gaps={name: torch.tensor(values) for name, values in gaps.items()})
    new = said(batch)
    method = MODPO(beta=0.3, weight=0.6, others={"humour": 0.4, "cost": -0.1})
    assert method.scores == ("humour", "cost")
    for i, found in enumerate(named(method.loss(new, batch))["pairwise"].values.tolist()):
        others = 0.4 * gaps["humour"][i] - 0.1 * gaps["cost"][i]
        assert found == pytest.approx(surprise(0.3 / 0.6 * log_ratio_gap(new, batch, i) - others / 0.6), rel=1e-5)


@pytest.mark.parametrize("length", ["answer", "divergence"])
def test_simpo_averages_over_exactly_the_tokens_that_count(length: Literal["answer", "divergence"]):
    batch = pairs(margin=[0.2, 0.0, -0.7])
    new = said(batch)
    method = SimPO(beta=2.0, margin=Margin(constant=1.0, scale=1.0, unit="reward"), length=length)
    found = named(method.loss(new, batch))["pairwise"].values.tolist()
    for i in range(B):
        means = []
        for side, (forward, responses) in enumerate(((new.chosen, CHOSEN), (new.rejected, REJECTED))):
            places = OWN[side][i] if length == "divergence" else range(len(responses[i]))
            row = forward.logprobs[i].tolist()
            means.append(sum(row[t] for t in places) / len(places))
        margin = 1.0 + batch.margin[i].item()
        assert found[i] == pytest.approx(surprise(2.0 * (means[0] - means[1]) - margin), rel=1e-5)


def test_a_common_beginning_changes_nothing_from_the_divergence_on_and_much_over_the_answer():
    batch = pairs()
    new = said(batch)
    changed = said(batch)
    with torch.no_grad():
        changed.chosen.logprobs[0, 0] -= 5.0  # the first token of row 0 is the same on both sides
        changed.rejected.logprobs[0, 0] -= 5.0
    assert_close(mean_logprobs(changed, batch, "divergence"), mean_logprobs(new, batch, "divergence"))
    assert abs(mean_logprobs(changed, batch, "answer")[0][0] - mean_logprobs(new, batch, "answer")[0][0]) > 1


def quadruples() -> tuple[QuadrupleBatch, QuadrupleForward]:
    strong, weak = pairs(seed=3), pairs(seed=4)
    return QuadrupleBatch(strong=strong, weak=weak), QuadrupleForward(said(strong, 5), said(weak, 6))


def test_pop_takes_the_weaker_pair_s_gap_clamped_inside_beta():
    batch, new = quadruples()
    method = DPOPoP(beta=0.3, margin_min=-1.0, margin_max=2.0, ema_decay=0.0)
    gaps = [log_ratio_gap(new.weak, batch.weak, i) for i in range(B)]
    margin = method.weak_margin(new.weak, batch.weak)
    assert_close(margin, torch.tensor([min(max(gap, -1.0), 2.0) for gap in gaps]))
    assert len({-1.0, 2.0} & set(margin.tolist())) > 0
    taught = replace(batch.strong, margin=margin.detach())
    found = named(method.loss(new.strong, taught))["pairwise"].values.tolist()
    for i in range(B):
        z = 0.3 * (log_ratio_gap(new.strong, batch.strong, i) - margin[i].item())
        assert found[i] == pytest.approx(surprise(z), rel=1e-5)


def test_simpo_pop_takes_mean_logprobs_of_the_weaker_pair():
    batch, new = quadruples()
    method = SimPOPoP(beta=1.5, margin_min=-10.0, margin_max=10.0, ema_decay=0.0, length="answer")
    margin = method.weak_margin(new.weak, batch.weak)

    def gap(forward: PairForward, i: int) -> float:
        sides = zip((forward.chosen, forward.rejected), (CHOSEN, REJECTED), strict=True)
        chosen, rejected = (sum(said.logprobs[i].tolist()) / len(texts[i]) for said, texts in sides)
        return chosen - rejected

    assert_close(margin, torch.tensor([gap(new.weak, i) for i in range(B)]))
    found = named(method.loss(new.strong, replace(batch.strong, margin=margin)))["pairwise"].values.tolist()
    assert found == pytest.approx([surprise(1.5 * (gap(new.strong, i) - margin[i].item())) for i in range(B)])


def test_without_room_for_a_margin_pop_is_dpo_on_the_stronger_pairs():
    batch, new = quadruples()
    method = DPOPoP(beta=0.3, margin_min=0.0, margin_max=0.0, ema_decay=0.0)
    taught = replace(batch.strong, margin=method.weak_margin(new.weak, batch.weak))
    plain = named(dpo().loss(new.strong, batch.strong))["pairwise"].values
    assert_close(named(method.loss(new.strong, taught))["pairwise"].values, plain)


def test_bounds_of_the_margin_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match=r"margin_min=2.0 is over algorithm.margin_max=1.0"):
        DPOPoP(beta=0.1, margin_min=2.0, margin_max=1.0, ema_decay=0.0)


def dual(limit: float = 0.0, multiplier: float = 0.5) -> DPOPoPDual:
    ascent = LogAscent(init=multiplier, lr=0.5, max_multiplier=100.0, min_multiplier=1e-6)
    constraint = Lagrangian(limit=limit, margin=0.0, window=1, delay=0, bound=Mean(), dual=ascent)
    return DPOPoPDual(beta=0.3, constraint=constraint)


def test_the_order_term_is_negative_exactly_where_the_stronger_pair_wins_by_more():
    batch, new = quadruples()
    terms = named(dual().loss(new, batch))
    strong = [log_ratio_gap(new.strong, batch.strong, i) for i in range(B)]
    weak = [log_ratio_gap(new.weak, batch.weak, i) for i in range(B)]
    for i, value in enumerate(terms["order"].values.tolist()):
        assert value == pytest.approx(surprise(0.3 * (strong[i] - weak[i])) - math.log(2), abs=1e-5)
        assert (value < 0) == (strong[i] > weak[i])
    assert {value > 0 for value in terms["order"].values.tolist()} == {True, False}  # both happen here
    expected = [(surprise(0.3 * strong[i]) + surprise(0.3 * weak[i])) / 2 for i in range(B)]
    assert_close(terms["pairwise"].values, torch.tensor(expected))
    assert terms["order"].weight == pytest.approx(0.5)


@pytest.mark.parametrize(("mean", "rises"), [(0.2, False), (0.4, True), (-1.0, False)])
def test_the_price_rises_exactly_while_the_mean_is_over_the_limit(mean: float, rises: bool):
    method = dual(limit=0.3)
    metrics = method.observe({"order": mean, "pairwise": 9.0})
    assert (metrics["lagrange/order/lambda"] > 0.5) == rises
    assert metrics["lagrange/order/lambda"] == pytest.approx(0.5 * math.exp(0.5 * 0.5 * (mean - 0.3)))
    batch, new = quadruples()
    assert named(method.loss(new, batch))["order"].weight == metrics["lagrange/order/lambda"]
    assert method.stateful == {"order": method.constraint}


@pytest.mark.parametrize("name", ["dpo", "modpo", "simpo", "simpo_divergence", "dpo_pop_dual"])
def test_gradients_are_those_of_finite_differences(name: str):
    """float64, of the weighted sum of all terms, with respect to every token's log-probability."""
    method: Any = {
        "dpo": dpo(margin=Margin(constant=0.3, scale=1.0, unit="log_ratio"), label_smoothing=0.1),
        "modpo": MODPO(beta=0.3, weight=0.5, others={"humour": 0.5}),
        "simpo": SimPO(beta=2.0, margin=NONE, length="answer"),
        "simpo_divergence": SimPO(beta=2.0, margin=NONE, length="divergence"),
        "dpo_pop_dual": dual(multiplier=2.0),
    }[name]
    is_quadruple = method.reads == "quadruples"
    strong = replace(pairs(seed=3, margin=[0.1, 0.2, -3.0]), gaps={"humour": torch.tensor([1.0, -1.0, 0.5])})
    batch: Any = QuadrupleBatch(strong=strong, weak=pairs(seed=4)) if is_quadruple else strong
    masks = [each.response_mask for each in batch.texts]
    source = torch.Generator().manual_seed(2)
    start = [-torch.rand(mask.shape, generator=source, dtype=torch.float64) for mask in masks]

    def loss(*logprobs: Tensor) -> Tensor:
        forwards = [
            PolicyForward(x.where(mask, 0), torch.zeros_like(x), {}) for x, mask in zip(logprobs, masks, strict=True)
        ]
        half = [PairForward(*forwards[i : i + 2]) for i in range(0, len(forwards), 2)]
        new = QuadrupleForward(*half) if is_quadruple else half[0]
        return torch.stack([term.weight * term.values.sum() for term in method.loss(new, batch) if term.weight]).sum()

    inputs = [x.clone().requires_grad_() for x in start]
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6)
    loss(*inputs).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in inputs)
