"""What a share of wins would be if both sides wrote equally long responses."""

import math

import torch
from scipy import stats
from torch import Tensor

_MOST_STEPS = 100


def length_controlled(
    wins: Tensor, longer: Tensor, prompt: Tensor, level: float = 0.95
) -> tuple[float, float, float] | None:
    """The share of wins that a logistic regression expects where both responses are equally long.

        P(win) = sigmoid(a + b tanh(longer / sd(longer))),      the share is sigmoid(a)

    AlpacaEval 2 has a third term, the difficulty of each instruction, estimated over many models and zero on average;
    two policies alone do not tell it. The spread is taken about 0, so that exchanging the two sides gives exactly one
    minus the share.

    Args:
        wins: (B,) between 0 and 1, ties 0.5.
        longer: (B,) by how much the response whose wins these are is longer.
        prompt: (B,) int64; responses to one prompt are not independent.

    Returns:
        The share and the ends of its interval: delta method in log-odds, Student-t, errors clustered by prompt. None
        if there is none: fewer than three prompts, wins that the length or nothing at all separates, or wins that do
        not vary.

    Source: Dubois et al. 2024, arXiv:2404.04475. Clustered errors: Liang and Zeger 1986,
    Biometrika 73(1), with the factor n / (n - 1).
    """
    y, gap = wins.double(), longer.double()
    clusters = torch.unique(prompt, return_inverse=True)[1]
    num = int(clusters.max()) + 1 if len(clusters) else 0
    if num < 3:
        return None
    spread = gap.square().mean().sqrt()
    columns = [torch.ones_like(y), torch.tanh(gap / spread)] if spread > 0 else [torch.ones_like(y)]
    x = torch.stack(columns, 1)  # (B, 1 or 2)
    theta = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(_MOST_STEPS):
        chance = torch.sigmoid(x @ theta)
        information = x.T @ (x * (chance * (1 - chance))[:, None])
        if not float(torch.linalg.cond(information)) < 1e12:  # NaN too
            return None
        step = torch.linalg.solve(information, x.T @ (y - chance))
        theta = theta + step / step.abs().max().clamp(min=1)
        if float(step.abs().max()) < 1e-12:
            break
    else:
        return None
    scores = torch.zeros(num, x.shape[1], dtype=torch.float64).index_add_(0, clusters, x * (y - chance)[:, None])
    bread = torch.linalg.inv(information)
    if float(scores.abs().max()) < 1e-12:  # they do not vary, which is no reason to be sure
        return None
    error = math.sqrt(float((bread @ scores.T @ scores @ bread)[0, 0]) * num / (num - 1))
    reach = float(stats.t.ppf((1 + level) / 2, num - 1)) * error
    share, low, high = (float(torch.sigmoid(theta[0] + move)) for move in (0.0, -reach, reach))
    return share, low, high
