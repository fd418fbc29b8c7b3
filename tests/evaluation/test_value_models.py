"""What is said of a value model, against cases worked by hand and models whose quality is known."""

import math

import pytest
import scipy
import torch

from rlhf_lab.engine.models import Calibration
from rlhf_lab.evaluation.value_models import Assessor, ScoredPairs, Yardstick, histogram_edges, histograms

ASSESSOR = Assessor(draws=200, bins=10, margin_bins=4, seed=0)


def pairs(members, *, units=(), **more):
    """Members (N, 2, M), whose mean is the score."""
    members = torch.as_tensor(members, dtype=torch.float64)
    nothing = dict.fromkeys(("variances", "gold", "margin", "unsafe"))
    return ScoredPairs(
        **{
            **nothing,
            "prompt": torch.arange(len(members)),
            "score": members.mean(2),
            "members": members,
            "is_cost": False,
            "units": units,
            **more,
        }
    )


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_accuracy_and_agreement_of_members_by_hand():
    # two members; the first ranks rows 0, 1, 2 right, the second rows 0, 1 and ties in row 3
    found, plain, _ = ASSESSOR.assess(pairs([[[2, 1], [1, 0]], [[3, 2], [0, 1]], [[1, 0], [0, 2]], [[0, 1], [1, 1]]]))
    assert found["member_0/accuracy"].value == 3 / 4
    assert found["member_1/accuracy"].value == 2.5 / 4
    assert found["members/agreement"].value == (1 + 1 + 0 + 0.5) / 4
    assert found["accuracy"].value == 2 / 4  # of the mean: 1.5 - .5, 2.5 - .5, .5 - 1, .5 - 1
    assert plain["ties"] == 0


def test_less_of_a_cost_is_better_and_its_sign_is_a_verdict():
    cost = pairs(
        [[[-1.0], [2.0]], [[0.5], [1.0]], [[1.0], [-1.0]]],
        is_cost=True,
        unsafe=torch.tensor([[False, True], [False, True], [True, True]]),
    )
    found, plain, _ = ASSESSOR.assess(cost)
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert found["sign_accuracy"].value == pytest.approx(4 / 6)  # wrong: 0.5 called unsafe, -1 called safe
    above = [safe < unsafe for safe in (-1.0, 0.5) for unsafe in (2.0, 1.0, 1.0, -1.0)]
    ties = [safe == unsafe for safe in (-1.0, 0.5) for unsafe in (2.0, 1.0, 1.0, -1.0)]
    assert found["sign_auc"].value == pytest.approx((sum(above) + sum(ties) / 2) / 8)
    assert plain["unsafe_share"] == pytest.approx(4 / 6)
    drawn = histograms(cost, histogram_edges([cost]))
    assert sum(drawn["counts"]["safe"]) == 2
    assert sum(drawn["counts"]["unsafe"]) == 4


def test_probabilities_do_not_depend_on_the_units_of_the_scores():
    raw = draw(50, 2, 3)
    scale, shift = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([1.0, -4.0, 0.0])
    units = tuple(Calibration(float(a), float(b), "standardised") for a, b in zip(scale, shift, strict=True))
    found = pairs(raw * scale + shift, units=units).win_probability
    expected = (raw[:, 0] - raw[:, 1]).sigmoid().mean(1)
    torch.testing.assert_close(found, expected)
    unsafe = pairs(raw * scale + shift, units=units, is_cost=True).unsafe_probability
    torch.testing.assert_close(unsafe, raw.sigmoid().mean(2))
    labels = pairs(raw, units=(Calibration(2.0, 1.0, "labels"),) * 3, is_cost=True).unsafe_probability
    torch.testing.assert_close(labels, raw.sigmoid().mean(2))  # the score is the log-odds already
    assert pairs(raw).win_probability is None


def test_a_gaussian_model_wins_as_often_as_thurstone_says():
    means, variances = draw(40, 2, 1), draw(40, 2, 1, seed=1).exp()
    found = pairs(means, variances=variances).win_probability
    deviation = (variances[:, 0] + variances[:, 1]).sqrt()
    expected = scipy.stats.norm.cdf(((means[:, 0] - means[:, 1]) / deviation)[:, 0].numpy())
    torch.testing.assert_close(found, torch.from_numpy(expected))


def test_a_model_that_is_as_sure_as_it_is_right_has_no_calibration_error_and_one_that_is_too_sure_has():
    log_odds = 2 * draw(20_000)
    right = torch.rand(20_000, generator=torch.Generator().manual_seed(3)) < log_odds.sigmoid()
    members = torch.stack([log_odds / 2, -log_odds / 2], 1)[:, :, None]
    ordered = torch.where(right[:, None, None], members, members.flip(1))  # the response that won first
    true = ASSESSOR._preference_calibration(pairs(ordered, units=(Calibration(),)))
    sure = ASSESSOR._preference_calibration(pairs(3 * ordered, units=(Calibration(),)))
    assert true[1]["ece"] < 0.01
    assert sure[1]["ece"] > 0.1
    assert true[0]["log_loss"].value < sure[0]["log_loss"].value - 0.1
    assert true[0]["brier"].low < 1 / 6 + 0.02


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_students_law_of_the_residuals_shows_how_far_the_variances_are_off(factor):
    said, deviation = draw(1500, 2), 0.2 + 0.3 * draw(1500, 2, seed=4).abs()
    gold = 3 * (said + deviation * draw(1500, 2, seed=5)) + 1  # the truth lies around what is said, as far as is said
    variances = (deviation / factor).square()[..., None]
    found, plain, _ = ASSESSOR._variances(pairs(said[..., None], variances=variances, gold=gold))
    assert plain["variance/scale"] == pytest.approx(factor, rel=0.1)
    assert plain["variance/coverage_95"] == pytest.approx({1.0: 0.95, 2.0: 0.673}[factor], abs=0.02)
    assert found["variance/spearman_with_error"].low > 0.2


def test_pairs_of_equal_margin_are_in_one_group():
    margin = torch.tensor([0.0] * 10 + [0.1 + 0.2, 0.3, 0.3, 0.5, 0.5, 0.9], dtype=torch.float64)
    lead = torch.tensor([1.0, -1.0] * 5 + [1.0] * 6)
    groups = ASSESSOR._by_margin(pairs(torch.stack([lead, 0 * lead], 1)[..., None], margin=margin))
    assert [(group["margin"], group["count"], group["value"]) for group in groups] == [
        (0.0, 10.0, 0.5),
        (pytest.approx(0.3), 3.0, 1.0),
        (pytest.approx(1.9 / 3), 3.0, 1.0),
    ]


def test_accuracy_rises_with_the_margin_where_it_does():
    margin = draw(2000).abs()
    lead = margin + draw(2000, seed=6)
    scored = pairs(torch.stack([lead, 0 * lead], 1)[..., None], margin=margin)
    groups = ASSESSOR._by_margin(scored)
    assert [group["count"] for group in groups] == [500.0] * 4
    law = scipy.stats.norm
    for group, rows in zip(groups, margin.sort().values.tensor_split(4), strict=True):
        assert group["low"] <= law.cdf(rows.numpy()).mean() <= group["high"]
    assert groups[0]["value"] < groups[-1]["value"] - 0.3
    assert ASSESSOR.assess(scored)[0]["margin/spearman"].value > 0.3


def test_what_is_constant_has_no_correlation():
    scored = pairs(torch.zeros(20, 2, 1), gold=draw(20, 2))
    assert math.isnan(ASSESSOR.assess(scored)[0]["gold/pearson"].value)


def test_a_yardstick_that_measures_nothing_is_refused():
    with pytest.raises(ValueError, match="preferred or gold"):
        Yardstick(preferred=None, gold=None, margin=None, safe="safe")
