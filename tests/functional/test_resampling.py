"""Intervals over prompts cover as often as they say, and resample prompts, not responses."""

import numpy as np
import pytest
import scipy
import torch
from torch.testing import assert_close

from rlhf_lab.functional.resampling import bootstrap_means, cluster_bootstrap, mean_interval


def test_the_t_interval_is_scipys():
    values = torch.tensor([0.3, 1.7, -0.4, 2.2, 0.9])
    mean, half = mean_interval(values)
    low, high = scipy.stats.t.interval(0.95, 4, loc=values.mean(), scale=scipy.stats.sem(values.numpy()))
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-6)
    assert mean_interval(torch.tensor([2.0])) == (2.0, float("inf"))


def test_the_interval_agrees_with_scipys_bootstrap():
    values = torch.tensor(np.random.default_rng(0).gamma(2.0, size=60))
    low, high = cluster_bootstrap(values, lambda drawn: drawn.median(), 4000, seed=1)
    other = scipy.stats.bootstrap(
        (values.numpy(),),
        lambda x, axis: np.quantile(x, 0.5, axis=axis, method="lower"),
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert (low.item(), high.item()) == pytest.approx((other.low, other.high), abs=0.05)


def test_the_mean_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(3)
    studies = torch.randn(50, 1000, generator=generator) + 2.0  # a thousand studies of fifty prompts
    low, high = bootstrap_means(studies, 500, seed=4)
    assert ((low <= 2) & (high >= 2)).double().mean().item() == pytest.approx(0.94, abs=0.025)


def test_responses_of_one_prompt_stay_together():
    prompts = torch.randn(40, 1, generator=torch.Generator().manual_seed(5))
    by_prompt = bootstrap_means(prompts, 2000, seed=6)
    copied = cluster_bootstrap(prompts.expand(40, 25), lambda drawn: drawn.mean(), 2000, seed=6)
    assert_close(copied[0], by_prompt[0][0])  # 25 copies of a response say no more than one
    assert_close(copied[1], by_prompt[1][0])


def test_pairs_are_drawn_together_and_seeds_repeat():
    easy = torch.randn(30, generator=torch.Generator().manual_seed(7)) * 10
    both = torch.stack([easy, easy + 1], dim=1)
    low, high = cluster_bootstrap(both, lambda drawn: drawn.mean(0).diff()[0], 200, seed=8)
    assert_close(torch.stack([low, high]), torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)
    wide = bootstrap_means(both, 200, seed=8)
    assert_close(wide, bootstrap_means(both, 200, seed=8))
    assert not torch.equal(wide[0], bootstrap_means(both, 200, seed=9)[0])
    assert wide[0].shape == (2,)


def test_one_prompt_says_nothing_of_others_and_none_is_refused():
    assert [end.item() for end in bootstrap_means(torch.ones(1), 10, seed=0)] == [float("-inf"), float("inf")]
    with pytest.raises(ValueError, match="10 draws of 0 prompts"):
        cluster_bootstrap(torch.ones(0), lambda drawn: drawn.mean(), 10, seed=0)
