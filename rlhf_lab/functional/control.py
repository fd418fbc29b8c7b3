"""How far a policy that is told what to obtain obtains it."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

FOLLOWED = ("correlation", "slope", "order", "mean_abs_error")


def followed(asked: NDArray[np.float64], obtained: Tensor) -> Tensor:
    """What was obtained under each preference, its mean over prompts, beside what was asked for.

    Args:
        asked: (L,) a reward under each preference; at least two differ.
        obtained: (P, L) the same reward as it was obtained, by prompt, in the same units.

    Returns:
        (4,) float64, as `FOLLOWED`: correlation; slope of the regression of obtained on asked; order, Somers' D, the
        share of the pairs of preferences with different wishes that obtains them in their order less the share that
        does so in the other; mean absolute error, in the reward's units. Perfect control is 1, 1, 1, 0. A policy that
        always obtains the same has 0 for the first three.
    """
    means = obtained.double().mean(0).numpy()
    error = float(np.abs(means - asked).mean())
    if np.ptp(means) == 0:
        return torch.tensor([0.0, 0.0, 0.0, error], dtype=torch.float64)
    correlation = float(np.corrcoef(asked, means)[0, 1])
    slope = correlation * float(means.std() / asked.std())
    order = float(stats.somersd(asked, means).statistic)
    return torch.tensor([correlation, slope, order, error], dtype=torch.float64)
