"""Intervals over prompts: what a study would have found with other prompts of the same kind.

The prompt is what is resampled, with all of its responses, since responses to one prompt are not independent.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import scipy
import torch
from torch import Tensor

COVERAGE = 0.95
DRAWS_AT_ONCE = 64  # of prompts, so that a hundred thousand of them fit


def mean_interval(values: Tensor) -> tuple[float, float]:
    """Mean of independent values and the half width of its 95 % Student-t interval; infinite for one value.

    Args:
        values: (P,) one of each prompt: the mean over its responses, or a difference within it.
    """
    exact = values.double()
    if len(exact) < 2:
        return exact.mean().item(), float("inf")
    quantile = float(scipy.stats.t.ppf((1 + COVERAGE) / 2, len(exact) - 1))
    return exact.mean().item(), quantile * exact.std().item() / len(exact) ** 0.5


def cluster_bootstrap(
    values: Tensor, statistic: Callable[[Tensor], Tensor | float], draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """95 % percentile interval of any statistic, over prompts.

    Args:
        values: (P, …) all that belongs to each prompt. What is to be compared in pairs stands in one row.
        statistic: of (P, …) to a number or to (…) numbers.
        draws: how often P prompts are drawn with replacement; 1000 or more steady the second digit of the ends.
        seed: equal seeds draw equal prompts.

    Returns:
        The lower and the upper end, shaped as the statistic, float64; minus and plus infinity for a single prompt,
        which says nothing of others.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    found = [torch.as_tensor(statistic(values[places]), dtype=torch.float64) for places in _places(values, draws, seed)]
    return _ends(torch.stack(found), len(values))


def bootstrap_means(values: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """`cluster_bootstrap` of the mean over prompts, in matrix products.

    Args:
        values: (P, …) one number of each prompt, or several.

    Returns:
        The lower and the upper end, shaped as one prompt's values, float64.
    """
    flat = values.double().reshape(len(values), -1)
    counts = (torch.bincount(places, minlength=len(values)) for places in _places(values, draws, seed))
    found = [torch.stack(block).double() @ flat for block in iter(lambda: list(islice(counts, DRAWS_AT_ONCE)), [])]
    low, high = _ends(torch.cat(found) / len(values), len(values))
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def _places(values: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    """(P,) which prompts are in a draw, for each draw.

    Raises:
        ValueError: there is no prompt, or nothing is drawn.
    """
    if not len(values) or draws < 1:
        raise ValueError(f"{draws} draws of {len(values)} prompts; a bootstrap needs at least one of each")
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(len(values), (len(values),), generator=generator) for _ in range(draws))


def _ends(found: Tensor, num_prompts: int) -> tuple[Tensor, Tensor]:
    if num_prompts == 1:
        endless = torch.full_like(found[0], float("inf"))
        return -endless, endless
    low, high = torch.quantile(found, torch.tensor([(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]).double(), dim=0)
    return low, high
