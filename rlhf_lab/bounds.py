"""Upper bounds on what is constrained, from a sample of costs; and the per-sample cost that follows their gradient.

A constraint holds `upper(costs) <= limit`. `Mean` constrains the estimate itself; the others exceed the true mean (or
the true rate of unsafe responses) with probability 1 - delta over independent samples, each under what it `assumes`.

To descend a bound by the score function, each response is priced by its influence on the bound. For mean + kappa sd,

    c~ = c + kappa (c^2 - 2 c mu) / (2 sd),        E[c~ grad log pi] = grad (mu + kappa sd),

with mu, sd and kappa of one window of n costs: the n with which the dual measures the same bound.

The trap of c~: it falls as c rises below mu - sd / kappa, since a safe response among unsafe ones widens the spread.
There the bound asks for *more* cost. `guard` holds c~ at its lowest value there, so that it never falls as c rises.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import scipy
import torch
from annotated_types import Interval
from torch import Tensor

from rlhf_lab.types import Count, Metrics, NonNegative

Delta = Annotated[float, Interval(gt=0, le=0.5)]  # how often the bound may be too low; over one half it is no upper one

NO_SPREAD = 1e-6  # of the largest |cost|: a standard deviation at most this is rounding, and divides nothing
RESAMPLED_AT_ONCE = 2**22  # costs: 32 MB of indices


def _enough(cost: Tensor, least: int, bound: str) -> None:
    if len(cost) < least:
        raise ValueError(f"{bound} needs {least} costs or more, found {len(cost)}; widen the window or the test")


def _in_range(cost: Tensor, low: float, high: float) -> None:
    """Raises ValueError for costs outside the range: clipping them would bound the mean of something else."""
    outside = (cost < low) | (cost > high) | cost.isnan()
    if outside.any():
        raise ValueError(
            f"{int(outside.sum())} of {len(cost)} costs are outside [{low:g}, {high:g}] (they span "
            f"{cost.min().item():.3g} to {cost.max().item():.3g}), so the bound does not hold; widen bound.low and "
            "bound.high to what the cost model can say, or use bound=student_t"
        )


def _checked_range(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"bound.low={low} is not below bound.high={high}; give the range of the costs")


def _mean(cost: Tensor) -> float:
    return sum(cost.tolist()) / len(cost)


def _spread(cost: Tensor) -> float:
    """Bessel-corrected standard deviation."""
    return cost.double().std().item()


def _lowest_point(window: Tensor, kappa: float) -> float:
    """Below this cost c~ falls as the cost rises; -inf where it never does."""
    sd = _spread(window)
    if kappa <= 0 or sd <= NO_SPREAD * window.abs().max().item():
        return -math.inf
    return _mean(window) - sd / kappa


def widened_cost(cost: Tensor, window: Tensor, kappa: float, guard: bool) -> Tensor:
    """The cost whose score-function gradient is that of mean + kappa sd.

    Args:
        cost: (B,) of the responses to be priced.
        window: (n,) costs from which mean and standard deviation are taken.
        kappa: half-width in standard deviations.
        guard: hold c~ at its lowest value where it would fall as the cost rises.

    Returns:
        (B,) in units of the cost; the cost itself without spread, where the half-width is 0 and has no gradient.

    Source: HC-RLHF's augmented cost (UMass-SCALAR-Lab/HC-RLHF, reinforce_lag). The guard is a departure.
    """
    sd = _spread(window)
    if kappa <= 0 or sd <= NO_SPREAD * window.abs().max().item():
        return cost
    mu, c = _mean(window), cost.double()
    if guard:
        c = c.clamp(min=_lowest_point(window, kappa))
    return (c + kappa * (c.square() - 2 * c * mu) / (2 * sd)).to(cost.dtype)


def _trapped(cost: Tensor, window: Tensor, kappa: float) -> Metrics:
    """The share of these costs where c~ as published falls as the cost rises."""
    return {"kappa": kappa, "trapped": (cost.double() < _lowest_point(window, kappa)).double().mean().item()}


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean itself, as in Safe RLHF: no confidence, half of the time too low."""

    least: ClassVar[int] = 1
    assumes: ClassVar[str] = "nothing, and is exceeded about half of the time"

    def check_limit(self, limit: float) -> None:
        """Any limit, in units of the cost."""

    def upper(self, cost: Tensor) -> float:
        _enough(cost, self.least, "the mean")
        return _mean(cost)

    def surrogate(self, cost: Tensor, window: Tensor) -> Tensor:
        return cost

    def describe(self, cost: Tensor, window: Tensor) -> Metrics:
        return {}


@dataclass(frozen=True, kw_only=True)
class StudentT:
    """mean + kappa sd, kappa(n) = C1 t_{1-delta, n-1} / sqrt(n) + C2 t_{1-delta, N-1} / sqrt(N).

    With C1 = 1 and C2 = 0 the one-sided Student bound, exact for normal costs. More is pessimism in training, so that a
    later test on N prompts passes. Skewed costs exceed it more often than delta: for log-normal ones (sigma 1.2) with
    delta = .1, at n = 100, about 19 % of the time.

    Args:
        delta: how often the mean may exceed the bound.
        train_inflation: C1, of the window's own half-width.
        test_inflation: C2, of the half-width that the later test will have.
        test_size: N, prompts of that test; may be null if C2 = 0.
        guard: see `widened_cost`; false is as published.

    Source: HC-RLHF (UMass-SCALAR-Lab/HC-RLHF); Student's bound as in Thomas et al. 2019, Science 366:999.
    """

    least: ClassVar[int] = 2
    assumes: ClassVar[str] = "that the mean of n costs is nearly normal"

    delta: Delta
    train_inflation: NonNegative
    test_inflation: NonNegative
    test_size: Annotated[int, Interval(ge=2)] | None
    guard: bool

    def __post_init__(self) -> None:
        if self.test_inflation > 0 and self.test_size is None:
            raise ValueError(
                f"bound.test_inflation={self.test_inflation:g} foresees a test, but bound.test_size=null does not say "
                "of how many prompts; set bound.test_size or bound.test_inflation=0"
            )

    def kappa(self, n: int) -> float:
        """Half-width in standard deviations, for a window of n costs."""
        kappa = self.train_inflation * self._width(n)
        return kappa + (self.test_inflation * self._width(self.test_size) if self.test_size else 0.0)

    def _width(self, n: int) -> float:
        return float(scipy.stats.t.ppf(1 - self.delta, n - 1)) / math.sqrt(n)

    def check_limit(self, limit: float) -> None:
        """Any limit, in units of the cost."""

    def upper(self, cost: Tensor) -> float:
        _enough(cost, self.least, "Student's bound")
        return _mean(cost) + self.kappa(len(cost)) * _spread(cost)

    def surrogate(self, cost: Tensor, window: Tensor) -> Tensor:
        return widened_cost(cost, window, self.kappa(len(window)), self.guard)

    def describe(self, cost: Tensor, window: Tensor) -> Metrics:
        return _trapped(cost, window, self.kappa(len(window)))


@dataclass(frozen=True, kw_only=True)
class Hoeffding:
    """mean + (high - low) sqrt(log(1 / delta) / (2 n)): no assumption but the range, and wide.

    Args:
        low, high: what the cost cannot leave; a cost outside is an error.

    Source: Hoeffding 1963, J. Amer. Statist. Assoc. 58:13, theorem 2.
    """

    least: ClassVar[int] = 1
    assumes: ClassVar[str] = "that costs cannot leave the stated range"

    delta: Delta
    low: float
    high: float

    def __post_init__(self) -> None:
        _checked_range(self.low, self.high)

    def check_limit(self, limit: float) -> None:
        """Any limit, in units of the cost."""

    def upper(self, cost: Tensor) -> float:
        _enough(cost, self.least, "Hoeffding's bound")
        _in_range(cost, self.low, self.high)
        return _mean(cost) + (self.high - self.low) * math.sqrt(-math.log(self.delta) / (2 * len(cost)))

    def surrogate(self, cost: Tensor, window: Tensor) -> Tensor:
        _in_range(cost, self.low, self.high)
        return cost  # the width does not depend on the costs

    def describe(self, cost: Tensor, window: Tensor) -> Metrics:
        return {}


@dataclass(frozen=True, kw_only=True)
class EmpiricalBernstein:
    """mean + sd sqrt(2 log(2 / delta) / n) + (high - low) 7 log(2 / delta) / (3 (n - 1)).

    Narrower than Hoeffding's where the spread is small for the range and n is large.

    Args:
        low, high: what the cost cannot leave; a cost outside is an error.
        guard: see `widened_cost`.

    Source: Maurer and Pontil 2009, arXiv:0907.3740, theorem 4.
    """

    least: ClassVar[int] = 2
    assumes: ClassVar[str] = "that costs cannot leave the stated range"

    delta: Delta
    low: float
    high: float
    guard: bool

    def __post_init__(self) -> None:
        _checked_range(self.low, self.high)

    def kappa(self, n: int) -> float:
        """What a unit of standard deviation adds, for a window of n costs."""
        return math.sqrt(2 * math.log(2 / self.delta) / n)

    def check_limit(self, limit: float) -> None:
        """Any limit, in units of the cost."""

    def upper(self, cost: Tensor) -> float:
        _enough(cost, self.least, "the empirical Bernstein bound")
        _in_range(cost, self.low, self.high)
        n = len(cost)
        of_range = 7 * math.log(2 / self.delta) / (3 * (n - 1))
        return _mean(cost) + self.kappa(n) * _spread(cost) + (self.high - self.low) * of_range

    def surrogate(self, cost: Tensor, window: Tensor) -> Tensor:
        _in_range(cost, self.low, self.high)
        return widened_cost(cost, window, self.kappa(len(window)), self.guard)

    def describe(self, cost: Tensor, window: Tensor) -> Metrics:
        return _trapped(cost, window, self.kappa(len(window)))


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """The 1 - delta quantile of the means of resamples (the percentile bootstrap). Right for large n only.

    Args:
        resamples: how many; their own noise is about sqrt(delta / resamples) in coverage.
        seed: of the resamples, so that one window always has one bound.
        guard: see `widened_cost`, here with the width that the resamples show.

    Source: Efron 1979, Ann. Statist. 7:1.
    """

    least: ClassVar[int] = 2
    assumes: ClassVar[str] = "that n is large: it is too low more often than delta for few or skewed costs"

    delta: Delta
    resamples: Count
    seed: int
    guard: bool

    def check_limit(self, limit: float) -> None:
        """Any limit, in units of the cost."""

    def upper(self, cost: Tensor) -> float:
        n = len(cost)
        _enough(cost, self.least, "the bootstrap")
        draw = torch.Generator().manual_seed(self.seed)
        costs, rows = cost.double().cpu(), max(1, RESAMPLED_AT_ONCE // n)
        means = [
            costs[torch.randint(n, (min(rows, self.resamples - done), n), generator=draw)].mean(1)
            for done in range(0, self.resamples, rows)
        ]
        return torch.cat(means).quantile(1 - self.delta).item()

    def _kappa(self, window: Tensor) -> float:
        sd = _spread(window)
        return (self.upper(window) - _mean(window)) / sd if sd > 0 else 0.0

    def surrogate(self, cost: Tensor, window: Tensor) -> Tensor:
        return widened_cost(cost, window, self._kappa(window), self.guard)

    def describe(self, cost: Tensor, window: Tensor) -> Metrics:
        return _trapped(cost, window, self._kappa(window))


@dataclass(frozen=True, kw_only=True)
class ClopperPearson:
    """The exact upper bound on the *rate* of responses whose cost is over `unsafe_above`; so the limit is a rate too.

    The only bound here that needs neither a range nor a shape of the costs.

    Args:
        unsafe_above: in units of the cost; 0 for a cost model whose sign says unsafe.

    Source: Clopper and Pearson 1934, Biometrika 26:404.
    """

    least: ClassVar[int] = 1
    assumes: ClassVar[str] = "nothing but independent responses; it is of the rate of unsafe ones, not of the mean cost"

    delta: Delta
    unsafe_above: float

    def check_limit(self, limit: float) -> None:
        """Raises ValueError for a limit that is no rate between 0 and 1; 0 too, which no number of responses shows."""
        if not 0 < limit < 1:
            raise ValueError(
                f"bound=clopper_pearson is of the rate of unsafe responses, but the limit less the margin is {limit:g}"
                "; give a limit and a margin between 0 and 1, e.g. constraint.cost.limit=0.1 constraint.cost.margin=0 "
                "(stage.limit=0.1 of a test)"
            )

    def needed(self, limit: float) -> int:
        """How many responses, if all are safe, have a bound within the limit: 1 - delta^(1 / n) <= limit."""
        return math.ceil(math.log(self.delta) / math.log1p(-limit))

    def _rate(self, unsafe: int, n: int) -> float:
        return 1.0 if unsafe == n else float(scipy.stats.beta.ppf(1 - self.delta, unsafe + 1, n - unsafe))

    def upper(self, cost: Tensor) -> float:
        _enough(cost, self.least, "the Clopper-Pearson bound")
        if cost.isnan().any():
            raise ValueError("a cost is not a number, so it is neither safe nor unsafe; look at the cost model")
        return self._rate(int((cost > self.unsafe_above).sum()), len(cost))

    def surrogate(self, cost: Tensor, window: Tensor) -> Tensor:
        """What one unsafe response more or fewer among n does to the bound, times n, for each unsafe response."""
        n, unsafe = len(window), int((window > self.unsafe_above).sum())
        fewer, more = max(unsafe - 1, 0), min(unsafe + 1, n)
        slope = n * (self._rate(more, n) - self._rate(fewer, n)) / (more - fewer)
        return slope * (cost > self.unsafe_above).to(cost.dtype)

    def describe(self, cost: Tensor, window: Tensor) -> Metrics:
        return {"unsafe_rate": (window > self.unsafe_above).double().mean().item()}
