"""Dual steps worked by hand: ascent on log lambda, PID, window, delay, cap, floor, sign; and what is priced."""

import copy
import math

import pytest
import torch

from rlhf_lab.bounds import ClopperPearson, Mean, StudentT
from rlhf_lab.constraints import PID, FixedPrice, Lagrangian, LogAscent
from rlhf_lab.interfaces import Bound, Dual

STUDENT = StudentT(delta=0.1, train_inflation=1.0, test_inflation=0.0, test_size=None, guard=True)


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
    dual = LogAscent(init, lr, max_multiplier, min_multiplier)
    return Lagrangian(limit, margin, window, delay, Mean(), dual)


def composed(bound: Bound = STUDENT, dual: Dual | None = None, window: int = 8) -> Lagrangian:
    return Lagrangian(limit=0.25, margin=0.0, window=window, delay=0, bound=bound, dual=dual or FixedPrice(1.0))


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
    assert first == pytest.approx({"lambda": 0.5, "bound": 1.0, "violation": 0.75, "limit": 0.25, "at_cap": 0.0})
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


def test_pid_by_hand():
    dual = PID(kp=2.0, ki=0.5, kd=3.0, init=0.25, max_multiplier=100.0)
    assert dual.multiplier == 0.25
    dual.step(1.0)  # nothing to have risen from: 2 * 1 + (.25 + .5)
    assert dual.multiplier == pytest.approx(2.75)
    dual.step(1.5)  # 2 * 1.5 + (.75 + .75) + 3 * .5
    assert dual.multiplier == pytest.approx(6.0)
    dual.step(0.5)  # falling costs are not rewarded: 2 * .5 + (1.5 + .25)
    assert dual.multiplier == pytest.approx(2.75)
    dual.step(-2.0)  # -4 + (1.75 - 1) < 0
    assert dual.multiplier == 0.0
    assert not dual.at_cap


def test_pid_does_not_wind_up():
    dual = PID(kp=0.0, ki=1.0, kd=0.0, init=0.0, max_multiplier=2.0)
    for _ in range(50):
        dual.step(1.0)
    assert (dual.multiplier, dual.at_cap) == (2.0, True)
    dual.step(-0.5)  # at once: what was over the cap is not to be paid back
    assert (dual.multiplier, dual.at_cap) == (1.5, False)
    for _ in range(50):
        dual.step(-1.0)
    assert dual.multiplier == 0.0
    dual.step(0.5)
    assert dual.multiplier == 0.5


def test_pid_with_the_integral_alone_is_ascent_on_lambda_and_swings_more_than_with_all_three():
    def overcorrection(kp: float, kd: float) -> float:
        """How far the cost is pushed below its limit of 0, when it follows lambda slowly; 0 at lambda = 1."""
        dual, cost, least = PID(kp=kp, ki=0.2, kd=kd, init=0.0, max_multiplier=100.0), 1.0, 0.0
        for _ in range(200):
            dual.step(cost)
            cost += 0.2 * ((1.0 - dual.multiplier) - cost)
            least = min(least, cost)
        assert dual.multiplier == pytest.approx(1.0, abs=1e-3)
        return -least

    ascent = PID(kp=0.0, ki=0.2, kd=0.0, init=0.0, max_multiplier=100.0)
    for violation in (1.0, 0.25, -0.5):
        ascent.step(violation)
    assert ascent.multiplier == pytest.approx(0.2 * 0.75)
    assert overcorrection(0.0, 0.0) > 0.1
    assert overcorrection(0.5, 0.5) < 0.03


@pytest.mark.parametrize("violation", [math.nan, math.inf])
def test_a_violation_that_is_no_number_has_no_price(violation: float):
    with pytest.raises(FloatingPointError, match="look at the costs"):
        PID(kp=1.0, ki=0.0, kd=0.0, init=0.0, max_multiplier=2.0).step(violation)


def test_a_start_over_the_cap_is_refused():
    with pytest.raises(ValueError, match="starts at 3, over its cap 2"):
        PID(kp=1.0, ki=0.0, kd=0.0, init=3, max_multiplier=2)


def test_a_fixed_price_stays():
    priced = composed(bound=Mean(), dual=FixedPrice(0.7))
    for cost in (5.0, -5.0):
        assert priced.step(torch.full((4,), cost))["lambda"] == 0.7
    with pytest.raises(ValueError, match="no state"):
        FixedPrice(0.7).load_state_dict({"log_multiplier": 0.0})


def test_the_mean_bound_prices_the_cost_itself():
    costs = torch.tensor([0.5, -1.0, 2.0])
    mean = lagrangian()
    mean.step(costs)
    assert torch.equal(mean.surrogate(costs), costs)


def test_dual_and_surrogate_read_one_window_with_one_n():
    """The bound on six costs, four of them of the iteration before, and the surrogate of the last two by that bound."""
    former, latest = torch.tensor([0.0, 1.0, 0.5, 0.7]), torch.tensor([0.9, -0.2])
    constraint = composed(window=6)
    constraint.step(former)
    metrics = constraint.step(latest)
    everything = torch.cat([former, latest]).double()
    mean, sd = everything.mean().item(), everything.std().item()
    kappa = 1.475884 / math.sqrt(6)  # t of 5 degrees of freedom, from a table
    assert metrics["bound"] == pytest.approx(mean + kappa * sd, rel=1e-5)
    assert metrics["violation"] == pytest.approx(mean + kappa * sd - 0.25, rel=1e-5)
    by_hand = [c + kappa * (c * c - 2 * c * mean) / (2 * sd) for c in latest.tolist()]
    torch.testing.assert_close(constraint.surrogate(latest), torch.tensor(by_hand), rtol=1e-4, atol=1e-5)
    assert metrics["trapped"] == 0.0


def test_the_trap_is_counted_in_the_costs_of_the_iteration():
    constraint = composed(window=32)
    # nearly all unsafe: mean .9375, sd .25, kappa .23 (t of 31 df is 1.31): below -.13 the quadratic falls
    metrics = constraint.step(torch.tensor([1.0] * 30 + [0.5, -0.5]))
    assert metrics["trapped"] == pytest.approx(1 / 32)


def test_until_the_window_has_enough_costs_the_dual_waits_and_the_cost_is_priced_as_it_is():
    constraint = composed(dual=LogAscent(0.5, 0.1, 10.0, 1e-3))
    one = torch.tensor([3.0])
    assert constraint.step(one) == {"lambda": pytest.approx(0.5), "limit": 0.25, "at_cap": 0.0}
    assert torch.equal(constraint.surrogate(one), one)
    two = torch.tensor([4.0])
    assert constraint.step(two)["lambda"] > 0.5
    assert not torch.equal(constraint.surrogate(two), two)


def test_a_window_that_never_holds_enough_costs_is_refused():
    with pytest.raises(ValueError, match="a window of 1 never holds the 2 costs"):
        composed(window=1)


def test_a_bound_on_a_rate_refuses_a_limit_that_is_no_rate():
    bound = ClopperPearson(delta=0.1, unsafe_above=0.0)
    with pytest.raises(ValueError, match=r"rate of unsafe responses, but the limit less the margin is -0.1; give"):
        Lagrangian(limit=0.1, margin=0.2, window=8, delay=0, bound=bound, dual=FixedPrice(1.0))


@pytest.mark.parametrize("dual", ["log_ascent", "pid", "fixed"])
def test_any_dual_goes_on_from_its_state(dual: str):
    def make() -> Lagrangian:
        duals: dict[str, Dual] = {
            "log_ascent": LogAscent(0.5, 0.1, 10.0, 1e-3),
            "pid": PID(0.5, 0.1, 0.5, init=0.2, max_multiplier=10.0),
            "fixed": FixedPrice(0.3),
        }
        return composed(dual=duals[dual])

    draw = torch.Generator().manual_seed(1)
    costs = [torch.rand(3, generator=draw) for _ in range(6)]
    straight = make()
    expected = [straight.step(cost) for cost in costs]
    for stop in range(6):
        before, after = make(), make()
        steps = [before.step(cost) for cost in costs[:stop]]
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        assert steps + [after.step(cost) for cost in costs[stop:]] == expected


def test_a_single_cost_violates_a_limit_in_its_own_units_only():
    dual = FixedPrice(1.0)
    of_mean = Lagrangian(limit=0.3, margin=0.1, window=8, delay=0, bound=Mean(), dual=dual)
    rate = ClopperPearson(delta=0.1, unsafe_above=-2.0)
    of_rate = Lagrangian(limit=0.3, margin=0.1, window=8, delay=0, bound=rate, dual=dual)
    assert of_mean.violated_above == 0.3
    assert of_rate.violated_above == -2.0


def test_a_finite_cap_holds_whatever_the_violation_and_what_is_no_number_is_refused():
    dual = LogAscent(init=0.5, lr=0.1, max_multiplier=10.0, min_multiplier=1e-3)
    dual.step(2e4)
    assert dual.multiplier == pytest.approx(10.0)
    assert dual.at_cap
    for broken in (math.nan, math.inf, -math.inf):
        with pytest.raises(FloatingPointError, match="the multiplier left the range"):
            dual.step(broken)
