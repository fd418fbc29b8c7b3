"""Metrics of rows: means over prompts, whatever the number of samples; what has no value is counted."""

import pytest
import scipy

from rlhf_lab.evaluation.policies import split_metrics


def row(prompt: str, gold: float, *, refusal: float | None = 0.0, win: float | None = 1.0, tokens: int = 4):
    return {
        "id": prompt,
        "condition": "",
        "scores": {"helpful": -gold},
        "gold": {"helpfulness": gold},
        "kl": 1.0,
        "kl_k2": 0.5,
        "kl_k3": 0.2,
        "tokens": tokens,
        "finished": True,
        "texts": {"refusal": refusal},
        "verdicts": {"honesty": win},
    }


def test_intervals_are_over_prompts_and_not_over_samples():
    rows = [row("a", 1.0), row("a", 3.0), row("b", 5.0), row("b", 7.0), row("c", 0.0), row("c", 0.0, tokens=10)]
    found = split_metrics("test", rows)
    low, high = scipy.stats.t.interval(0.95, 2, 8 / 3, scipy.stats.sem([2.0, 6.0, 0.0]))
    assert found["eval/test/gold/helpfulness/mean"] == pytest.approx(8 / 3)
    assert found["eval/test/gold/helpfulness/ci95"] == pytest.approx((high - low) / 2)
    assert found["eval/test/rewards/helpful/mean"] == pytest.approx(-8 / 3)
    assert found["eval/test/kl"] == 1.0
    assert found["eval/test/kl_k2"] == 0.5
    assert found["eval/test/completions/mean_length"] == 5.0
    assert found["eval/test/completions/truncated_ratio"] == 0.0
    theirs = scipy.stats.binomtest(0, 3).proportion_ci(method="wilson")  # that none was cut does not mean none will be
    assert found["eval/test/completions/truncated_ratio/ci95"] == pytest.approx(theirs.high / 2)


def test_one_prompt_under_two_conditions_is_two_cases():
    rows = [row("a", 1.0), row("a", 3.0) | {"condition": "be kind"}]
    assert split_metrics("test", rows)["eval/test/gold/helpfulness/ci95"] == pytest.approx(12.706, rel=1e-3)


def test_what_was_not_judged_is_left_out_and_counted():
    rows = [row("a", 1.0, win=1.0), row("b", 1.0, win=None), row("c", 1.0, win=0.5, refusal=None)]
    found = split_metrics("test", rows)
    assert found["eval/test/win_rate/honesty/mean"] == 0.75
    assert found["eval/test/win_rate/honesty/excluded"] == 1.0
    theirs = scipy.stats.binomtest(0, 2).proportion_ci(method="wilson")
    assert found["eval/test/text/refusal/high"] == pytest.approx(theirs.high)


def test_judged_samples_of_one_prompt_are_one_case():
    alike = [row(prompt, 1.0, win=float(prompt in "abc")) for prompt in "abcdef" for _ in range(4)]
    found = split_metrics("test", alike)
    theirs = scipy.stats.binomtest(3, 6).proportion_ci(method="wilson")
    # six prompts, but for the estimate of their variance from six
    assert found["eval/test/win_rate/honesty/low"] == pytest.approx(theirs.low, abs=0.03)
