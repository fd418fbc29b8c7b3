"""Masked moments: padding cannot matter, and the variance is the population's."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.functional.masked import masked_mean, whiten


def test_masked_mean_weighs_entries_not_rows_and_ignores_what_is_masked():
    x = torch.tensor([[1.0, 2.0, 6.0], [5.0, torch.nan, torch.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert masked_mean(x, mask).item() == 3.5  # (1 + 2 + 6 + 5) / 4; a mean of row means would be 4


def test_whiten_gives_zero_mean_unit_population_variance_and_ignores_masked_entries():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=draw) * 3 + 5  # few entries: an unbiased variance would miss by 1 / n
    mask = torch.rand(3, 4, generator=draw) > 0.3
    y = whiten(x, mask)
    assert_close(y[mask].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(y[mask].var(correction=0), torch.tensor(1.0), atol=1e-6, rtol=0)
    assert y[~mask].eq(0).all()
    assert_close(whiten(x.where(mask, torch.full_like(x, 1e6)), mask), y)  # padding cannot matter
    wider = torch.nn.functional.pad(x, (0, 5), value=torch.nan), torch.nn.functional.pad(mask, (0, 5))
    assert_close(whiten(*wider)[:, :4], y)


def test_whiten_keeps_the_order_and_the_relative_distances():
    y = whiten(torch.tensor([[0.0, 1.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool))[0]
    assert (y[2] - y[0]) / (y[1] - y[0]) == pytest.approx(4.0, rel=1e-5)
    assert y[2] > y[0]


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 100.7, 1000.1])
@pytest.mark.parametrize("entries", [1, 37, 1517])
def test_whiten_turns_entries_that_are_all_equal_into_zero(value: float, entries: int):
    # the rounding of one float32 mean, over sqrt(1e-8), would make 0.5 of 1000.1
    x, mask = torch.full((2, entries), value), torch.ones(2, entries, dtype=torch.bool)
    assert whiten(x, mask).abs().max() < 1e-5


@pytest.mark.parametrize("function", [masked_mean, whiten])
def test_an_empty_mask_is_refused(function):
    with pytest.raises(ValueError, match="empty mask"):
        function(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
