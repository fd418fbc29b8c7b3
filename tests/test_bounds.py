"""Bounds against published vectors, finite differences, enumeration and simulated coverage; and the trap of c~."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from rlhf_lab.bounds import Bootstrap, ClopperPearson, EmpiricalBernstein, Hoeffding, Mean, StudentT, widened_cost
from rlhf_lab.interfaces import Bound


def student(
    delta: float = 0.1, train: float = 1.0, test: float = 0.0, size: int | None = None, guard: bool = True
) -> StudentT:
    return StudentT(delta=delta, train_inflation=train, test_inflation=test, test_size=size, guard=guard)


def clopper(delta: float = 0.1, unsafe_above: float = 0.0) -> ClopperPearson:
    return ClopperPearson(delta=delta, unsafe_above=unsafe_above)


HOEFFDING = Hoeffding(delta=0.1, low=0.0, high=1.0)
BERNSTEIN = EmpiricalBernstein(delta=0.1, low=0.0, high=1.0, guard=True)
BOOTSTRAP = Bootstrap(delta=0.1, resamples=500, seed=0, guard=True)
BOUNDS: list[Bound] = [Mean(), student(), HOEFFDING, BERNSTEIN, BOOTSTRAP, clopper(unsafe_above=0.5)]


def by_name(bound: object) -> str:
    return type(bound).__name__


@pytest.mark.parametrize(
    ("train", "test", "size", "n", "kappa"),
    [
        *[(1.0, 1.0, 1000, n, kappa) for n, kappa in ((256, 0.121), (32, 0.272), (16, 0.376))],
        *[(4.0, 2.0, 100, n, kappa) for n, kappa in ((256, 0.579), (32, 1.184), (16, 1.599))],
        # the test's own
        *[(1.0, 0.0, None, n, kappa) for n, kappa in ((1000, 0.0406), (100, 0.129))],
    ],
)
def test_kappa_is_the_published_one(train: float, test: float, size: int | None, n: int, kappa: float):
    assert student(train=train, test=test, size=size).kappa(n) == pytest.approx(kappa, abs=5e-4)


def test_without_a_test_to_come_its_term_drops_out():
    assert student(train=1.5, test=0.0, size=50).kappa(20) == student(train=1.5).kappa(20)


def test_a_test_to_come_of_no_known_size_is_refused():
    with pytest.raises(
        ValueError, match=r"test_inflation=2 .*test_size=null .*; set bound.test_size or bound.test_inf"
    ):
        student(test=2.0, size=None)


def test_student_by_hand():
    costs = torch.tensor([1.0, 2.0, 4.0, 5.0])  # mean 3, variance 10 / 3; t of 3 degrees of freedom at .95 is 2.353363
    assert student(delta=0.05).upper(costs) == pytest.approx(3 + 2.353363 / 2 * math.sqrt(10 / 3), rel=1e-6)


def test_hoeffding_and_empirical_bernstein_by_hand():
    costs = torch.tensor([-1.0, 0.0, 0.0, 1.0, 3.0])  # mean .6, variance 2.3; a range of 6
    assert Hoeffding(delta=0.05, low=-2, high=4).upper(costs) == pytest.approx(0.6 + 6 * math.sqrt(2.9957323 / 10))
    by_hand = 0.6 + math.sqrt(2 * 2.3 * 3.6888795 / 5) + 6 * 7 * 3.6888795 / 12
    bernstein = EmpiricalBernstein(delta=0.05, low=-2, high=4, guard=False)
    assert bernstein.upper(costs) == pytest.approx(by_hand)


def test_bounds_of_a_range_move_and_scale_with_it():
    costs = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for unit in (HOEFFDING, BERNSTEIN):
        other = type(unit)(**{**unit.__dict__, "low": -3.0, "high": 7.0})
        assert other.upper(10 * costs - 3) == pytest.approx(10 * unit.upper(costs) - 3)


def test_bootstrap_against_every_resample_of_three():
    costs = [0.0, 1.0, 5.0]
    means = sorted(sum(drawn) / 3 for drawn in itertools.product(costs, repeat=3))  # 27, equally likely
    upper = Bootstrap(delta=0.1, resamples=20_000, seed=3, guard=True).upper(torch.tensor(costs))
    assert upper == pytest.approx(means[24])  # 2.4 of 27 are above: the quantile is the third from the end
    assert means[23] == means[24] == means[25] != means[26]


def test_bootstrap_is_a_function_of_the_window_and_its_seed(monkeypatch: pytest.MonkeyPatch):
    costs = torch.rand(40, generator=torch.Generator().manual_seed(0))
    assert BOOTSTRAP.upper(costs) == BOOTSTRAP.upper(costs)
    assert BOOTSTRAP.upper(costs) != Bootstrap(delta=0.1, resamples=500, seed=1, guard=True).upper(costs)
    monkeypatch.setattr("rlhf_lab.bounds.RESAMPLED_AT_ONCE", 40 * 7)  # 500 is no multiple of 7
    assert BOOTSTRAP.upper(costs) == pytest.approx(student().upper(costs), abs=0.02)


@pytest.mark.parametrize(("unsafe", "n"), [(0, 10), (3, 10), (9, 10), (10, 10), (7, 50)])
def test_clopper_pearson_is_the_bound_of_the_exact_binomial_test(unsafe: int, n: int):
    costs = torch.tensor([0.5] * unsafe + [-0.5] * (n - unsafe))
    exact = stats.binomtest(unsafe, n, alternative="less").proportion_ci(confidence_level=0.9, method="exact").high
    assert clopper().upper(costs) == pytest.approx(exact)
    if unsafe < n:  # at the bound, so few unsafe responses have probability delta exactly: enumerate
        p = clopper().upper(costs)
        seen = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(unsafe + 1))
        assert seen == pytest.approx(0.1)


def test_clopper_pearson_counts_what_is_above_and_not_at_its_threshold():
    assert clopper(unsafe_above=0.3).upper(torch.tensor([0.25, 0.5, 0.5])) > clopper(unsafe_above=0.5).upper(
        torch.tensor([0.25, 0.5, 0.5])
    )


def shortfall(bound: Bound, draw: Callable[[torch.Generator], Tensor], truth: float, trials: int) -> float:
    """How often the bound is below the truth."""
    source = torch.Generator().manual_seed(7)
    return sum(bound.upper(draw(source)) < truth for _ in range(trials)) / trials


def normal(source: torch.Generator, n: int = 15) -> Tensor:
    return torch.randn(n, generator=source, dtype=torch.float64) * 2 - 1


def log_normal(source: torch.Generator, n: int = 20) -> Tensor:
    return (1.2 * torch.randn(n, generator=source, dtype=torch.float64)).exp()


def rare(source: torch.Generator, n: int = 200) -> Tensor:
    """Unsafe, at a cost of 1, with probability .02; otherwise safe at a cost of 0: skewed, and within a range."""
    return (torch.rand(n, generator=source, dtype=torch.float64) < 0.02).double()


def test_student_is_exceeded_as_often_as_it_says_by_normal_costs():
    # four standard errors of a share of .1 in 3,000 are .022
    assert shortfall(student(), normal, -1.0, 3000) == pytest.approx(0.1, abs=0.022)


def test_student_is_exceeded_more_often_than_it_says_by_skewed_costs():
    """A limitation: 27 % at n = 20, 19 % at n = 100 where 10 % are promised."""
    truth = math.exp(1.2**2 / 2)
    assert shortfall(student(), log_normal, truth, 3000) == pytest.approx(0.27, abs=0.033)
    assert shortfall(student(), lambda source: log_normal(source, 100), truth, 3000) == pytest.approx(0.19, abs=0.03)


def test_the_mean_is_exceeded_half_of_the_time():
    assert shortfall(Mean(), normal, -1.0, 2000) == pytest.approx(0.5, abs=0.045)


@pytest.mark.parametrize("bound", [HOEFFDING, BERNSTEIN, clopper(unsafe_above=0.5)], ids=by_name)
def test_bounds_that_assume_no_shape_hold_for_rare_unsafe_responses(bound: Bound):
    assert shortfall(bound, rare, 0.02, 2000) <= 0.1


def test_clopper_pearson_is_not_wide():
    """Its coverage is above 1 - delta since counts are whole; another delta would not pass for this one."""
    # k <= 1 of 200 at p = .02: .0894 from the binomial; k <= 2 gives .2351
    assert shortfall(clopper(unsafe_above=0.5), rare, 0.02, 2000) == pytest.approx(0.0894, abs=0.026)


def test_bootstrap_is_nearly_right_for_many_normal_costs():
    bound = Bootstrap(delta=0.1, resamples=200, seed=0, guard=True)
    assert shortfall(bound, lambda source: normal(source, 100), -1.0, 1000) == pytest.approx(0.1, abs=0.04)


COSTS = torch.tensor([-1.5, -0.5, 0.0, 0.2, 0.9, 1.4, 3.0], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.2, 0.8, 0.0, -1.0, 0.5, -0.4], dtype=torch.float64)


def population(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the cost under a softmax policy, exactly."""
    p = logits.softmax(0)
    mean = (p * COSTS).sum()
    return mean, (p * (COSTS - mean).square()).sum().sqrt()


def score_function_gradient(cost: Tensor) -> Tensor:
    """E[c~ grad log pi], summed over the actions: grad log pi(a) = e_a - pi."""
    p = LOGITS.softmax(0)
    return sum((p[a] * cost[a] * (torch.eye(7, dtype=torch.float64)[a] - p) for a in range(7)), torch.zeros(7))


def central_difference(of: Callable[[Tensor], float]) -> Tensor:
    h = 1e-5
    steps = h * torch.eye(7, dtype=torch.float64)
    return torch.tensor([(of(LOGITS + step) - of(LOGITS - step)) / (2 * h) for step in steps], dtype=torch.float64)


@pytest.mark.parametrize("kappa", [0.1, 0.5, 1.2])
def test_the_widened_cost_has_the_gradient_of_mean_plus_kappa_sd(kappa: float):
    # a window in which each action has its probability: its mean is the policy's, and Bessel's factor nearly 1
    size = 200_000
    counts = (LOGITS.softmax(0) * size).round().long()
    window = COSTS.repeat_interleave(counts)

    def bound(logits: Tensor) -> float:
        mean, sd = population(logits)
        return (mean + kappa * sd).item()

    gradient = score_function_gradient(widened_cost(COSTS, window, kappa, guard=False))
    torch.testing.assert_close(gradient, central_difference(bound), atol=2e-5, rtol=1e-4)
    assert (gradient - score_function_gradient(COSTS)).abs().max() > 0.1 * kappa  # the width has a gradient of its own


def test_the_surrogate_of_a_rate_has_the_gradient_of_the_bound_on_the_rate():
    n, bound = 500, clopper()
    unsafe = COSTS > 0.0

    def upper(logits: Tensor) -> float:
        """Clopper and Pearson's bound at the expected count, as a smooth function of it."""
        k = n * logits.softmax(0)[unsafe].sum().item()
        return float(stats.beta.ppf(0.9, k + 1, n - k))

    expected = round(n * LOGITS.softmax(0)[unsafe].sum().item())
    window = torch.cat([torch.ones(expected), -torch.ones(n - expected)])
    gradient = score_function_gradient(bound.surrogate(COSTS, window))
    torch.testing.assert_close(gradient, central_difference(upper), atol=1e-4, rtol=1e-3)


def test_without_width_every_bound_on_the_mean_is_the_mean_and_prices_the_cost_itself():
    costs = torch.rand(30, generator=torch.Generator().manual_seed(1))
    for none in (student(train=0.0), student(delta=0.5)):
        assert none.upper(costs) == pytest.approx(costs.double().mean().item(), rel=1e-9)
        torch.testing.assert_close(none.surrogate(costs, costs), costs)


@pytest.mark.parametrize("bound", BOUNDS, ids=by_name)
def test_equal_costs_are_priced_without_dividing_by_no_spread(bound: Bound):
    same = torch.full((16,), 0.7)
    priced = bound.surrogate(same, same)
    assert priced.isfinite().all()
    if not isinstance(bound, ClopperPearson):
        assert torch.equal(priced, same)
        # float64 rounding is no spread either
        nearly = same.double() + 1e-12 * torch.randn(16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(bound.surrogate(same, nearly), same)
    assert bound.upper(same) >= 0.7 - 1e-6


def test_the_trap_a_rare_safe_response_is_made_dearer_unless_guarded():
    window = torch.tensor([1.0] * 30 + [0.0, -2.0])  # safe responses are rare
    kappa, mu, sd = student().kappa(32), window.mean().item(), window.std().item()
    lowest = mu - sd / kappa
    costs = torch.linspace(lowest - 4, 4, 60)
    published = student(guard=False).surrogate(costs, window)
    assert published[0] > published[20]  # less cost is priced higher
    guarded = student().surrogate(costs, window)
    assert (guarded.diff() > -1e-6).all()
    above = costs >= lowest
    torch.testing.assert_close(guarded[above], published[above])
    assert guarded[~above].unique().numel() == 1
    torch.testing.assert_close(guarded[~above][0], published.min(), atol=5e-3, rtol=0)
    below = student().describe(costs, window)
    assert below["trapped"] == pytest.approx((~above).double().mean().item())


@pytest.mark.parametrize("bound", [HOEFFDING, BERNSTEIN], ids=by_name)
@pytest.mark.parametrize("wrong", [-0.1, 1.01, math.nan])
def test_costs_outside_the_range_are_refused_and_not_clipped(bound: Hoeffding | EmpiricalBernstein, wrong: float):
    costs = torch.tensor([0.5, wrong, 0.2])
    with pytest.raises(ValueError, match=r"1 of 3 costs are outside \[0, 1\] .*widen bound.low"):
        bound.upper(costs)
    with pytest.raises(ValueError, match=r"1 of 3 costs are outside"):
        bound.surrogate(costs, torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("kind", [Hoeffding, lambda **fields: EmpiricalBernstein(**fields, guard=True)])
def test_an_empty_range_is_refused(kind: Callable[..., Bound]):
    with pytest.raises(ValueError, match=r"bound\.low=1\.0 is not below bound\.high=1\.0"):
        kind(delta=0.1, low=1.0, high=1.0)


@pytest.mark.parametrize("bound", BOUNDS, ids=by_name)
def test_too_few_costs_are_refused(bound: Bound):
    with pytest.raises(ValueError, match=f"needs {bound.least} costs or more, found {bound.least - 1}"):
        bound.upper(torch.zeros(bound.least - 1))
    assert math.isfinite(bound.upper(torch.linspace(0, 1, bound.least)))


@pytest.mark.parametrize("limit", [-0.01, 0.0, 1.0, 25.0])
def test_a_limit_on_a_rate_is_a_rate(limit: float):
    with pytest.raises(ValueError, match="limit and a margin between 0 and 1"):
        clopper().check_limit(limit)
    clopper().check_limit(1e-9)
    student().check_limit(limit)


@pytest.mark.parametrize(("delta", "limit", "n"), [(0.1, 0.1, 22), (0.05, 0.05, 59), (0.05, 0.01, 299)])
def test_as_many_safe_responses_as_published_show_a_rate_and_one_fewer_do_not(delta: float, limit: float, n: int):
    bound = clopper(delta)  # sizes of Wilks' one-sided tolerance limits, 1941
    assert bound.needed(limit) == n
    assert bound.upper(torch.zeros(n)) <= limit < bound.upper(torch.zeros(n - 1))


def test_a_cost_that_is_no_number_is_neither_safe_nor_unsafe():
    with pytest.raises(ValueError, match="neither safe nor unsafe"):
        clopper().upper(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("bound", BOUNDS, ids=by_name)
def test_the_surrogate_keeps_the_kind_of_its_costs(bound: Bound):
    costs, window = torch.tensor([0.2, 0.6]), torch.rand(9, generator=torch.Generator().manual_seed(0)).double()
    priced = bound.surrogate(costs, window)
    assert (priced.dtype, priced.shape) == (costs.dtype, costs.shape)
