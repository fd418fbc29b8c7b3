"""The dual step worked by hand: ascent on log lambda, window, delay, cap, floor, and the sign."""

import copy
import math

import pytest
import torch

from rlhf_lab.constraints import Lagrangian


def lagrangian(
    limit: float = 0.25,
    init: float = 0.5,
    lr: float = 0.1,
    window: int = 3,
    delay: int = 0,
    max_multiplier: float = 10.0,
    min_multiplier: float = 1e-6,
    margin: float = 0.0,
) -> Lagrangian:
    return Lagrangian(limit, margin, init, lr, window, delay, max_multiplier, min_multiplier)


def test_a_margin_moves_what_is_held_and_not_the_limit_that_is_reported():
    held, bare = lagrangian(limit=0.25, margin=0.1), lagrangian(limit=0.15)
    costs = torch.tensor([0.2, 0.3, 0.1])
    with_margin, without = held.step(costs), bare.step(costs)
    assert with_margin["limit"] == 0.25
    assert with_margin["violation"] == pytest.approx(0.05)  # .2 - (.25 - .1)
    assert with_margin["lambda"] == pytest.approx(without["lambda"])


def test_window_and_delay_by_hand():
    dual = lagrangian(delay=1)
    first = dual.step(torch.tensor([1.0, 1.0]))
    assert first == pytest.approx({"lambda": 0.5, "violation": 0.75, "limit": 0.25, "at_cap": 0.0})
    second = dual.step(torch.tensor([0.0, 0.0]))  # the window of three holds 1, 0, 0: 1/3 - 1/4 = 1/12
    assert second["violation"] == pytest.approx(1 / 12)
    assert second["lambda"] == pytest.approx(0.5 * math.exp(0.1 * 0.5 / 12))
    assert dual.multiplier == second["lambda"]
    third = dual.step(torch.tensor([0.0, 0.0, 0.0, 0.0]))  # more than the window: the last three
    assert third["violation"] == pytest.approx(-0.25)
    assert third["lambda"] == pytest.approx(second["lambda"] * math.exp(0.1 * second["lambda"] * -0.25))


@pytest.mark.parametrize("init", [0.1, 1.0, 4.0])
def test_the_step_is_the_gradient_of_the_lagrangian_in_log_lambda(init: float):
    costs, limit, lr, h = torch.tensor([0.9, 0.1, 0.8]), 0.25, 0.05, 1e-6
    dual = lagrangian(limit=limit, init=init, lr=lr)

    def priced_violation(log_multiplier: float) -> float:
        return math.exp(log_multiplier) * (costs.mean().item() - limit)

    slope = (priced_violation(math.log(init) + h) - priced_violation(math.log(init) - h)) / (2 * h)
    dual.step(costs)
    assert math.log(dual.multiplier) - math.log(init) == pytest.approx(lr * slope, rel=1e-6)


@pytest.mark.parametrize(("cost", "direction"), [(0.3, 1), (0.25, 0), (0.2, -1)])
def test_violation_raises_the_price_and_slack_lowers_it(cost: float, direction: int):
    dual = lagrangian()
    dual.step(torch.tensor([cost], dtype=torch.float64))
    change = dual.multiplier - 0.5
    assert (change > 1e-9) - (change < -1e-9) == direction


def test_cap_and_floor_hold_and_the_cap_is_reported():
    capped = lagrangian(init=1.0, lr=10.0, max_multiplier=2.0)
    assert capped.step(torch.tensor([5.0]))["at_cap"] == 1.0
    assert capped.multiplier == pytest.approx(2.0)
    floored = lagrangian(init=1.0, lr=10.0, min_multiplier=0.1)
    assert floored.step(torch.tensor([-5.0]))["at_cap"] == 0.0
    assert floored.multiplier == pytest.approx(0.1)
    # neither is a trap
    assert capped.step(torch.tensor([-9.0, -9.0, -9.0]))["at_cap"] == 0.0
    floored.step(torch.tensor([5.0, 5.0, 5.0]))
    assert floored.multiplier > 0.2


def test_no_cap_is_infinity():
    dual = lagrangian(init=1.0, lr=5.0, max_multiplier=math.inf)
    assert dual.step(torch.tensor([1.25]))["at_cap"] == 0.0
    assert dual.multiplier == pytest.approx(math.exp(5.0))


@pytest.mark.parametrize("init", [0.05, 11.0])
def test_a_start_outside_the_bounds_is_refused(init: float):
    with pytest.raises(ValueError, match="outside"):
        lagrangian(init=init, min_multiplier=0.1)


def test_restored_in_the_middle_it_goes_on_as_if_never_stopped():
    draw = torch.Generator().manual_seed(0)
    costs = [torch.rand(2, generator=draw) for _ in range(8)]
    straight = lagrangian(delay=3, window=5)
    expected = [straight.step(cost) for cost in costs]
    for stop in range(8):
        before, after = lagrangian(delay=3, window=5), lagrangian(delay=3, window=5)
        after.step(torch.tensor([99.0]))  # forgotten on loading
        steps = [before.step(cost) for cost in costs[:stop]]
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        assert steps + [after.step(cost) for cost in costs[stop:]] == expected


def test_a_saved_state_does_not_change_with_the_part_that_saved_it():
    dual = lagrangian()
    dual.step(torch.tensor([1.0]))
    state = dual.state_dict()
    kept = copy.deepcopy(state)
    dual.step(torch.tensor([0.0]))
    assert state == kept


@pytest.mark.parametrize("cost", [1e4, math.nan])
def test_a_multiplier_that_leaves_the_range_of_numbers_is_said(cost: float):
    dual = lagrangian(lr=1.0, max_multiplier=math.inf)
    with pytest.raises(FloatingPointError, match="set max_multiplier"):
        dual.step(torch.tensor([cost]))
