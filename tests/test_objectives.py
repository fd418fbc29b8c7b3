"""What is maximised: weighted sums, and the KL penalty with its controllers, worked by hand."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_lab.functional.kl import Divergence, KLEstimator, kl_estimate
from rlhf_lab.objectives import AdaptiveKL, Chebyshev, FixedKL, KLPenalty, Preferred, WeightedSum, WorstCase
from rlhf_lab.records import Prompt
from rlhf_lab.types import PolicyForward, Rollout, ScoredRollout, Sequences


def scored_by(logprobs: Tensor, ref_logprobs: Tensor) -> ScoredRollout:
    """Responses without padding to prompts of one token."""
    rows, width = logprobs.shape
    sequences = Sequences(
        tokens=torch.zeros(rows, 1 + width, dtype=torch.int64),
        attention_mask=torch.ones(rows, 1 + width, dtype=torch.bool),
        position_ids=torch.arange(1 + width).expand(rows, -1),
        response_mask=torch.ones(rows, width, dtype=torch.bool),
    )
    rollout = Rollout(
        prompts=[Prompt.from_text("hello")] * rows,
        sequences=sequences,
        group=torch.zeros(rows, dtype=torch.int64),
        finished=torch.ones(rows, dtype=torch.bool),
        responses=[""] * rows,
        logprobs=logprobs,
    )
    return ScoredRollout(rollout=rollout, scores={}, ref_logprobs=ref_logprobs, values={})


def adaptive() -> AdaptiveKL:
    return AdaptiveKL(target=2.0, horizon=100, clip=0.2, estimator="k1")


def test_weighted_sum_by_hand_and_scores_that_it_does_not_weigh_change_nothing():
    objective = WeightedSum({"helpful": 2.0, "length": -0.5})
    scores = {"length": torch.tensor([4.0, 0.0]), "helpful": torch.tensor([1.0, 3.0]), "cost": torch.tensor([9.0, 9.0])}
    assert objective.streams == ("helpful", "length")
    assert objective(scores, []).tolist() == [0.0, 6.0]


def test_a_weighed_score_that_is_missing_is_named_beside_those_that_are_there():
    with pytest.raises(ValueError, match=r"weighs \['harmless'\].* \['cost', 'helpful'\]"):
        WeightedSum({"harmless": 1.0, "helpful": 1.0})({"helpful": torch.zeros(2), "cost": torch.zeros(2)}, [])


def test_no_weights_are_refused():
    with pytest.raises(ValueError, match="weights is empty"):
        WeightedSum({})


@pytest.mark.parametrize(
    ("estimator", "placement", "message"),
    [
        ("k1", "loss", "penalises nothing"),
        ("k2", "reward", "k2 penalises no divergence.*use kl.estimator=k1"),
        ("k3", "reward", "k3 penalises no divergence.*or kl.placement=loss"),
        ("chi2", "loss", "half the gradient"),
    ],
)
def test_estimators_whose_gradient_is_of_no_divergence_there_are_refused(
    estimator: Divergence, placement: Literal["reward", "loss"], message: str
):
    with pytest.raises(ValueError, match=message):
        KLPenalty(estimator=estimator, placement=placement, controller=FixedKL())


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_in_the_reward_these_push_further_from_the_reference_what_is_already_rarer(estimator: KLEstimator):
    # why they are refused: E_pi[k grad log pi] by hand, at a policy that has one token rarer than the reference
    logits = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    policy = logits.log_softmax(0)
    kl = kl_estimate(policy.detach(), reference, estimator)
    (penalised,) = torch.autograd.grad((policy.exp().detach() * kl * policy).sum(), logits, retain_graph=True)
    (divergence,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    assert divergence[0] < 0  # descending the KL brings the rare token back
    assert penalised[0] > 0  # descending the penalty makes it rarer still


def test_chi2_sums_to_the_ratio_of_the_response_and_costs_twice_that():
    logprobs, reference = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
    penalty = KLPenalty(estimator="chi2", placement="reward", controller=FixedKL())
    share = penalty.estimate(scored_by(logprobs, reference))
    ratios = torch.tensor([1.0, math.exp(0.5), math.exp(-0.5), math.exp(-0.5)])
    assert_close(share, ratios.diff()[None])
    assert_close(penalty.in_reward(share, 0.1).sum(), torch.tensor(0.2 * (math.exp(-0.5) - 1)))


def test_what_chi2_charges_has_the_gradient_of_the_divergence():
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy - reference).exp() @ policy.exp(), logits, retain_graph=True)
    penalty = KLPenalty(estimator="chi2", placement="reward", controller=FixedKL())
    charged = penalty.in_reward(kl_estimate(policy.detach()[:, None], reference[:, None], "chi2"), 1.0)[:, 0]
    (estimated,) = torch.autograd.grad((policy.exp().detach() * charged) @ policy, logits)
    assert_close(estimated, exact)


def test_what_is_penalised_is_the_divergence_of_the_policy_from_the_reference():
    old = scored_by(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]]))
    assert_close(
        KLPenalty(estimator="k1", placement="reward", controller=FixedKL()).estimate(old), torch.tensor([[0.5, -1.0]])
    )


def test_the_penalty_acts_in_the_reward_or_in_the_loss_and_never_in_both():
    old = scored_by(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]]))
    new = PolicyForward(torch.tensor([[-0.5, -3.0]], requires_grad=True), torch.zeros(1, 2), {})
    in_reward = KLPenalty(estimator="k1", placement="reward", controller=FixedKL())
    in_loss = KLPenalty(estimator="k2", placement="loss", controller=FixedKL())
    kl = in_reward.estimate(old)
    assert_close(kl, torch.tensor([[0.5, -1.0]]))  # of the policy that sampled
    assert_close(in_reward.in_reward(kl, 0.1), torch.tensor([[0.05, -0.1]]))
    assert list(in_reward.in_loss(new, old, 0.1)) == []
    assert in_loss.in_reward(kl, 0.1).eq(0).all()
    (term,) = in_loss.in_loss(new, old, 0.1)
    assert (term.name, term.per, term.weight) == ("kl", "token", 0.1)
    assert_close(term.values, torch.tensor([[0.5, 2.0]]))  # of the policy that learns
    (gradient,) = torch.autograd.grad(term.values.sum(), new.logprobs)
    assert_close(gradient, torch.tensor([[1.0, -2.0]]))  # minimising it pulls towards the reference


@pytest.mark.parametrize(
    ("kl_per_token", "factor"),
    [
        (1.1, 1.01),  # 2.2 nats per response against 2: error .1, ten responses of a hundred
        (10.0, 1.02),  # clipped at .2
        (0.0, 0.98),
        (1.0, 1.0),
        (0.9, 0.99),
    ],
)
def test_adaptive_kl_by_hand(kl_per_token: float, factor: float):
    controller = adaptive()
    controller.step(torch.full((10, 2), kl_per_token - 3), torch.full((10, 2), -3.0))
    assert controller.factor == pytest.approx(factor, rel=1e-6)


def test_the_adaptive_factor_compounds_and_averages_over_responses_of_any_length():
    controller = adaptive()
    padded = torch.tensor([[3.0, 0.0], [1.0, 2.0]])  # 3 nats each: error clipped at .2
    controller.step(padded, torch.zeros(2, 2))
    controller.step(padded, torch.zeros(2, 2))
    assert controller.factor == pytest.approx(1.004**2)


def test_the_penalty_shows_the_controller_the_policy_and_the_reference_in_that_order():
    penalty = KLPenalty(estimator="k3", placement="loss", controller=adaptive())
    penalty.step(scored_by(torch.full((10, 1), -1.0), torch.full((10, 1), -3.2)))  # 2.2 nats by the controller's k1
    assert penalty.controller.factor == pytest.approx(1.01, rel=1e-6)


def test_adaptive_kl_restored_goes_on_as_if_never_stopped():
    straight, resumed = adaptive(), adaptive()
    for size in (3.0, 0.5):
        straight.step(torch.full((4, 1), size), torch.zeros(4, 1))
    resumed.load_state_dict(straight.state_dict())
    for part in (straight, resumed):
        part.step(torch.full((4, 1), 2.1), torch.zeros(4, 1))
    assert resumed.factor == straight.factor != 1.0


def test_a_fixed_coefficient_stays_and_refuses_the_state_of_another_controller():
    fixed = FixedKL()
    fixed.step(torch.full((4, 1), 50.0), torch.zeros(4, 1))
    assert fixed.factor == 1.0
    fixed.load_state_dict(fixed.state_dict())
    with pytest.raises(ValueError, match="no state"):
        fixed.load_state_dict(adaptive().state_dict())


SCORES = {"helpful": torch.tensor([1.0, -2.0, 3.0]), "humour": torch.tensor([0.5, 4.0, -1.0]), "cost": torch.ones(3)}


def test_worst_case_is_the_least_weighed_score_of_each_response():
    objective = WorstCase({"helpful": 1.0, "humour": 3.0})
    assert objective.streams == ("helpful", "humour")
    assert objective(SCORES, []).tolist() == [1.0, -2.0, -3.0]


def test_chebyshev_by_hand():
    objective = Chebyshev({"helpful": 1.0, "humour": 2.0}, {"helpful": 1.0, "humour": 1.0}, rho=0.1)
    # over the reference: (0, -.5), (-3, 3), (2, -2); worst 2 (-.5), -3, 2 (-2); sums -.5, 0, 0
    assert_close(objective(SCORES, []), torch.tensor([-1.0 - 0.05, -3.0, -4.0]))


def test_chebyshev_finds_a_middle_that_no_weighted_sum_prefers_and_rho_breaks_ties():
    # (1, 0), (0, 1) and a dent between them
    scores = {"a": torch.tensor([1.0, 0.0, 0.4, 0.4]), "b": torch.tensor([0.0, 1.0, 0.4, 0.9])}
    front = {name: column[:3] for name, column in scores.items()}
    for weight in torch.linspace(0, 1, 21).tolist():
        assert WeightedSum({"a": weight, "b": 1 - weight})(front, []).argmax() != 2
    middle = Chebyshev({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0}, rho=0.0)
    assert middle(front, []).argmax() == 2
    assert middle(scores, [])[2] == middle(scores, [])[3]
    better = Chebyshev({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0}, rho=0.01)(scores, [])
    assert better[3] > better[2]  # as bad in a, better in b


def test_what_each_prompt_prefers_by_hand():
    asked = Prompt.from_text("hello")
    prompts = [
        asked.conditioned("", {"helpful": 1.0}),
        asked.conditioned("", {"humour": 2.0}),
        asked.conditioned("", {"helpful": 1.0, "humour": 3.0}),
    ]
    reward = Preferred(["helpful", "humour"])(SCORES, prompts)
    assert_close(reward, torch.tensor([1.0, 4.0, (3.0 - 3.0) / 4]))


@pytest.mark.parametrize("weights", [{}, {"cost": 1.0}])
def test_a_prompt_that_prefers_nothing_or_something_else_is_refused(weights: dict[str, float]):
    prompts = [Prompt.from_text("hello").conditioned("x", weights)] * 3
    with pytest.raises(ValueError, match=r"weighs .*reads \['helpful', 'humour'\].*conditions=tiny_help"):
        Preferred(["helpful", "humour"])(SCORES, prompts)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WorstCase({}), "weights is empty"),
        (lambda: WorstCase({"helpful": 1.0, "cost": -1.0}), r"weights.cost=-1.0.*above 0"),
        (lambda: Chebyshev({"helpful": 1.0}, {"humour": 1.0}, 0.1), r"reference names \['humour'\]"),
        (lambda: Preferred([]), "streams is empty"),
        (lambda: WorstCase({"length": 1.0})(SCORES, []), r"weighs \['length'\]"),
    ],
)
def test_objectives_that_do_not_add_up_are_refused(build: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_horizon_that_would_turn_the_coefficient_negative_is_refused():
    controller = AdaptiveKL(target=6.0, horizon=10, clip=0.2, estimator="k1")
    with pytest.raises(ValueError, match=r"horizon=10 is so short that a batch of 64"):
        controller.step(torch.zeros(64, 3), torch.zeros(64, 3))
    assert controller.factor == 1.0
