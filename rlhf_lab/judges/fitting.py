"""The manner of a judge, learnt from what it said: maximum likelihood, with intervals over prompts."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit, logit

from rlhf_lab.judges.manner import Floats, Manner

VALUES = (1.0, 0.0, 0.5)
_LEAST = 1e-12  # chance of what the model holds impossible, such as a contradiction of one who never thinks afresh
_STARTS = ((1.0, 0.05, 0.3, 0.2), (0.3, 0.01, 0.05, 0.02), (3.0, 0.2, 0.8, 0.5))  # noise, flip, inconsistency, tie


@dataclass(frozen=True, kw_only=True)
class FittedManner:
    """Fields:
    low, high: ends of the 95 % intervals, by parameter: percentiles of fits to prompts that were drawn again.
    log_likelihood: in nats, of all that was said.
    comparisons: that were read in one order or in both.
    """

    manner: Manner
    low: Mapping[str, float]
    high: Mapping[str, float]
    log_likelihood: float
    comparisons: int


def log_likelihoods(manner: Manner, margin: Floats, said: Floats) -> Floats:
    """(n,) log-chance of what was said of each comparison; of those read in one order that order's, 0 for none.

    One draw u decides both orders unless the judge thinks afresh; it says the first below P(first), the second from
    1 - P(second) on. So the chance of two verdicts is the length of what their intervals share, or the product.

    Args:
        margin: (n,).
        said: (n, 2), by order: 1, 0, 0.5, or nan for what was not asked or could not be read.
    """
    chances = manner.chances(margin)
    first, second = chances[..., 0], chances[..., 1]
    low = np.where(said == 1, 0.0, np.where(said == 0.5, first, 1 - second))
    high = np.where(said == 1, first, np.where(said == 0.5, 1 - second, 1.0))
    unread = np.isnan(said)
    low, high = np.where(unread, 0.0, low), np.where(unread, 1.0, high)  # whatever it would have said
    shared = np.clip(high.min(1) - low.max(1), 0.0, None)
    apart = (high - low).prod(1)
    mixed = (1 - manner.inconsistency) * shared + manner.inconsistency * apart
    return np.log(np.clip(np.where(unread.any(1), apart, mixed), _LEAST, None))


def fit(margin: ArrayLike, said: ArrayLike, prompt: ArrayLike, draws: int, seed: int) -> FittedManner:
    """The manner under which what was said is likeliest.

    Args:
        margin: (n,) how much better the first response is, in the units of `noise`; those that a `SimulatedJudge`
            would read, e.g. differences of gold scores.
        said: (n, 2), see `log_likelihoods`.
        prompt: (n,), equal for comparisons of one prompt, which are drawn together.
        draws: fits for the intervals; 0 for none, they are nan then.

    Raises:
        ValueError: nothing was read, or the margins are all equal, so that noise cannot be told from slips.
    """
    margin, said, prompt = np.asarray(margin, np.float64), np.asarray(said, np.float64), np.asarray(prompt)
    read = ~np.isnan(said).all(1)
    margin, said, prompt = margin[read], said[read], prompt[read]
    if len(margin) < 2 or np.ptp(margin) == 0:
        raise ValueError(
            f"{len(margin)} comparisons were read, with {len(np.unique(margin))} different margins; a manner is fitted "
            "to comparisons of different margins. Judge more pairs, or choose another margin"
        )
    if not np.isin(said[~np.isnan(said)], VALUES).all():
        raise ValueError("a verdict of one order is 1, 0 or 0.5; verdicts averaged over orders cannot be fitted")
    scale = float(np.abs(margin).mean()) or 1.0
    starts = [
        _to_free(Manner(noise=n * scale, flip=f, position_bias=0.0, inconsistency=i, tie_width=t))
        for n, f, i, t in _STARTS
    ]
    best = min((_minimised(start, margin, said) for start in starts), key=lambda found: found[1])
    drawn = np.random.default_rng(seed)
    names, places = np.unique(prompt, return_inverse=True)
    order = np.argsort(places, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(places[order])) + 1)
    found: list[list[float]] = []
    for _ in range(draws):
        rows = np.concatenate([groups[place] for place in drawn.integers(len(names), size=len(names))])
        again = _from_free(_minimised(best[0], margin[rows], said[rows])[0])
        found.append(list(asdict(again).values()))
    fields = list(asdict(_from_free(best[0])))
    ends = np.quantile(found, [0.025, 0.975], axis=0) if draws else np.full((2, len(fields)), math.nan)
    return FittedManner(
        manner=_from_free(best[0]),
        low=dict(zip(fields, ends[0].tolist(), strict=True)),
        high=dict(zip(fields, ends[1].tolist(), strict=True)),
        log_likelihood=-best[1],
        comparisons=len(margin),
    )


def _minimised(start: Floats, margin: Floats, said: Floats) -> tuple[Floats, float]:
    def cost(free: Floats) -> float:
        return -float(log_likelihoods(_from_free(free), margin, said).sum())

    # the likelihood has kinks where the intervals of two verdicts begin to share something: no gradients
    found = minimize(
        cost, start, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-5, "maxfev": 4000, "adaptive": True}
    )
    return found.x, float(found.fun)


def _to_free(manner: Manner) -> Floats:
    """Five numbers without bounds."""
    return np.array(
        [
            math.log(manner.noise),
            logit(2 * manner.flip),
            manner.position_bias,
            logit(manner.inconsistency),
            math.log(manner.tie_width),
        ]
    )


def _from_free(free: Floats) -> Manner:
    noise, flip, bias, inconsistency, tie = free.tolist()
    return Manner(
        noise=math.exp(min(noise, 50.0)),
        flip=min(0.5 * float(expit(flip)), 0.4999),
        position_bias=bias,
        inconsistency=float(expit(inconsistency)),
        tie_width=math.exp(min(tie, 50.0)),
    )
