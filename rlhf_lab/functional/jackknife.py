"""Intervals of what is said of a whole set, where drawing prompts again would make copies that count as likeness."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy
from numpy.typing import NDArray

from rlhf_lab.functional.estimates import Estimate

Places = NDArray[np.intp]


def delete_a_group(statistic: Callable[[Places], float], cluster: Sequence[object], groups: int, seed: int) -> Estimate:
    """A statistic of rows and its 95 % interval, from leaving out one group of clusters at a time.

    A bootstrap repeats rows, and two copies of a text are as alike as can be: it would make every set look less
    diverse. Leaving rows out repeats none. Student-t with one degree less than there are groups.

    Args:
        statistic: indices of rows, ascending -> a number.
        cluster: (n,) what each row belongs to; equal ones are left out together.
        groups: of clusters, drawn by the seed; as many as there are clusters if these are fewer.

    Returns:
        The interval is unbounded for a single cluster, and nan if the statistic is nan without some group.

    Source: the delete-a-group jackknife, Kott 2001, Journal of Official Statistics 17 (4).
    """
    rows = np.arange(len(cluster))
    value = statistic(rows)
    names = {name: k for k, name in enumerate(dict.fromkeys(cluster))}
    num_groups = min(groups, len(names))
    if num_groups < 2:
        return Estimate(value=value, low=-math.inf, high=math.inf)
    place = np.random.default_rng(seed).permutation(len(names)) % num_groups
    group = place[[names[name] for name in cluster]]
    left = np.array([statistic(rows[group != g]) for g in range(num_groups)])
    error = math.sqrt((num_groups - 1) / num_groups * float(((left - left.mean()) ** 2).sum()))
    reach = float(scipy.stats.t.ppf(0.975, num_groups - 1)) * error
    return Estimate(value=value, low=value - reach, high=value + reach)
