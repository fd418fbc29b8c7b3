"""Affine maps from a value model's raw output to stated units: score = scale * raw + shift."""

import torch
from torch import Tensor


def standardise(raw: Tensor) -> tuple[float, float]:
    """(scale, shift) that give the (B,) raw scores mean 0 and (unbiased) standard deviation 1.

    Raises:
        ValueError: fewer than two scores, or all the same.
    """
    if len(raw) < 2 or raw.min() == raw.max():  # not std() == 0: rounding can make the spread of equal scores positive
        raise ValueError(f"cannot standardise {len(raw)} scores that do not vary")
    scale = 1 / raw.std().item()
    return scale, -raw.mean().item() * scale


def scaled(raw: Tensor) -> tuple[float, float]:
    """(scale, 0) that gives the (B,) raw scores (unbiased) standard deviation 1 and leaves 0 where it is.

    For costs whose sign says what is unsafe, which a shift would change.

    Raises:
        ValueError: fewer than two scores, or all the same.
    """
    return standardise(raw)[0], 0.0


def least_squares(raw: Tensor, target: Tensor) -> tuple[float, float]:
    """(scale, shift) that minimise the squared error to (B,) targets; the score is then in the targets' units.

    Raises:
        ValueError: the raw scores do not vary, or the fit has no positive slope: the model ranks the wrong way round.
    """
    x, y = raw.double(), target.double()
    if x.min() == x.max():
        raise ValueError("cannot calibrate scores that do not vary")
    scale = ((x - x.mean()) * (y - y.mean())).mean() / (x - x.mean()).square().mean()
    if scale <= 0:
        raise ValueError(f"the model's scores fall as the target rises (slope {scale:.3g}); it cannot be calibrated")
    return scale.item(), (y.mean() - scale * x.mean()).item()


def logistic(raw: Tensor, label: Tensor, steps: int = 50) -> tuple[float, float]:
    """(scale, shift) of the likeliest log-odds of (B,) labels in {0, 1}: the score is 0 at even odds (Platt scaling).

    Newton's method, in float64.

    Raises:
        ValueError: the raw scores do not vary, only one label occurs, the labels are perfectly separated, or the slope
            is not positive.
    """
    x = torch.stack([raw.double(), torch.ones(len(raw), dtype=torch.float64)], dim=1)  # (B, 2)
    y = label.double()
    if raw.min() == raw.max():
        raise ValueError("cannot calibrate scores that do not vary")
    if y.min() == y.max():
        raise ValueError("cannot calibrate on labels that are all the same")
    theta = torch.zeros(2, dtype=torch.float64)
    for _ in range(steps):
        p = (x @ theta).sigmoid()
        hessian = x.T @ (x * (p * (1 - p))[:, None])
        if torch.linalg.det(hessian) < 1e-12:
            raise ValueError("cannot calibrate on labels that the scores separate perfectly")
        theta = theta + torch.linalg.solve(hessian, x.T @ (y - p))
    if theta[0] <= 0:
        raise ValueError(f"the model's scores fall as the labels rise (slope {theta[0]:.3g}); it cannot be calibrated")
    return theta[0].item(), theta[1].item()
