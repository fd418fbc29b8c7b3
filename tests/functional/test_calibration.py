"""Calibration against numpy's and scipy's fits, and what it refuses."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from rlhf_lab.functional.calibration import least_squares, logistic, scaled, standardise

CALIBRATIONS = [
    lambda raw: standardise(raw),
    lambda raw: scaled(raw),
    lambda raw: least_squares(raw, target_of(raw)),
    lambda raw: logistic(raw, label_of(raw)),
]


def target_of(raw: Tensor) -> Tensor:
    return torch.arange(len(raw), dtype=torch.float32)


def label_of(raw: Tensor) -> Tensor:
    return torch.arange(len(raw)) % 2


def noisy(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Raw scores, a real target and a label that both rise with them."""
    draw = torch.Generator().manual_seed(seed)
    raw = torch.randn(n, generator=draw) * 4 + 7
    target = 0.3 * raw - 5 + torch.randn(n, generator=draw)
    label = (torch.rand(n, generator=draw) < ((raw - 6) / 3).sigmoid()).float()
    return raw, target, label


def test_standardised_scores_have_mean_zero_and_unbiased_deviation_one():
    raw = noisy(9, 0)[0]  # few: a population deviation would miss by 6 %
    scale, shift = standardise(raw)
    score = scale * raw.numpy().astype(float) + shift
    assert scale > 0
    assert score.mean() == pytest.approx(0, abs=1e-6)
    assert score.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_scaled_costs_keep_their_sign_and_standardised_ones_do_not():
    raw = torch.tensor([-0.5, 0.5, 2.0, 6.0])
    (scale, shift), (other_scale, other_shift) = scaled(raw), standardise(raw)
    assert (scale * raw + shift).std(correction=1).item() == pytest.approx(1, abs=1e-6)
    assert ((scale * raw + shift) > 0).tolist() == [False, True, True, True]
    assert ((other_scale * raw + other_shift) > 0).tolist() == [False, False, False, True]


@pytest.mark.parametrize("seed", range(4))
def test_least_squares_is_numpys_line(seed: int):
    raw, target, _ = noisy(50, seed)
    expected = np.polyfit(raw.numpy().astype(float), target.numpy().astype(float), 1)
    assert least_squares(raw, target) == pytest.approx(tuple(expected), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_logistic_is_the_likeliest_line_that_scipy_finds(seed: int, unit: float):
    raw, _, label = noisy(60, seed)
    x, y = raw.numpy().astype(float), label.numpy().astype(float)

    def negative_log_likelihood(theta: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-(theta[0] * x + theta[1])))
        return -float(np.sum(np.log(np.where(y == 1, p, 1 - p))))

    best = minimize(negative_log_likelihood, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    scale, shift = logistic(raw * unit, label)
    assert (scale * unit, shift) == pytest.approx(tuple(best.x), rel=1e-4)


def test_logistic_puts_even_odds_at_zero():
    raw = torch.tensor([1.0] * 4 + [3.0] * 4)
    label = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0])  # odds of 1 : 3 at 1 and of 3 : 1 at 3
    scale, shift = logistic(raw, label)
    assert scale * 2 + shift == pytest.approx(0, abs=1e-9)
    assert scale * 3 + shift == pytest.approx(np.log(3), rel=1e-9)


@pytest.mark.parametrize("calibrate", CALIBRATIONS)
@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 1000.1])
@pytest.mark.parametrize("count", [2, 10, 37])
def test_scores_that_do_not_vary_are_refused(calibrate, value: float, count: int):
    # many counts: torch's standard deviation of equal numbers is now and then a little above 0
    with pytest.raises(ValueError, match="do not vary"):
        calibrate(torch.full((count,), value))


def test_one_score_is_refused():
    with pytest.raises(ValueError, match="cannot standardise 1 scores"):
        standardise(torch.tensor([2.0]))


@pytest.mark.parametrize("fit", [least_squares, logistic])
def test_a_model_that_ranks_the_wrong_way_round_is_refused(fit):
    raw = torch.tensor([4.0, 3.0, 2.0, 1.0, 2.5])
    with pytest.raises(ValueError, match="fall as the"):
        fit(raw, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]) if fit is least_squares else torch.tensor([0, 1, 0, 1, 1]))


@pytest.mark.parametrize("label", [0, 1])
def test_labels_that_are_all_the_same_are_refused(label: int):
    with pytest.raises(ValueError, match="all the same"):
        logistic(torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), label))


@pytest.mark.parametrize("unit", [1.0, 1e3])
def test_labels_that_are_separated_perfectly_are_refused(unit: float):
    with pytest.raises(ValueError, match="separate perfectly"):
        logistic(torch.tensor([1.0, 2.0, 3.0, 4.0]) * unit, torch.tensor([0, 0, 1, 1]))
