"""Losses of the methods that learn from data, against the probabilities and the signs that they stand for."""

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_lab.algorithms.cost_model import CostModel
from rlhf_lab.algorithms.probit_reward_model import ProbitRewardModel
from rlhf_lab.algorithms.ranking_model import RankingModel
from rlhf_lab.algorithms.reward_model import RewardModel
from rlhf_lab.algorithms.sft import SFT
from rlhf_lab.data.tokenise import join, pad
from rlhf_lab.functional.spans import Level
from rlhf_lab.types import (
    PairBatch,
    PolicyForward,
    RankingBatch,
    SafetyPairBatch,
    ScoreForward,
    Sequences,
    Term,
    TextBatch,
)

UNSAFE, SAFE = 1.0, -1.0
SEQUENCE: Level = "sequence"


def sequences(rows: int) -> Sequences:
    ones = torch.ones(rows, 2, dtype=torch.int64)
    return Sequences(
        tokens=ones, attention_mask=ones.bool(), position_ids=ones.cumsum(1) - 1, response_mask=ones[:, 1:].bool()
    )


def pairs(margin: list[float]) -> PairBatch:
    rows = len(margin)
    return PairBatch(chosen=sequences(rows), rejected=sequences(rows), margin=torch.tensor(margin))


def verdicts(safer_sign: list[float], unsafer_sign: list[float]) -> SafetyPairBatch:
    rows = len(safer_sign)
    return SafetyPairBatch(
        safer=sequences(rows),
        unsafer=sequences(rows),
        safer_sign=torch.tensor(safer_sign),
        unsafer_sign=torch.tensor(unsafer_sign),
    )


def named(terms: Sequence[Term]) -> dict[str, Tensor]:
    assert len({term.name for term in terms}) == len(terms)
    return {term.name: term.values for term in terms}


def test_sft_is_the_negative_log_likelihood_of_each_token():
    new = PolicyForward(torch.tensor([[0.5], [0.125]]).log(), torch.zeros(2, 1), {})
    (term,) = SFT().loss(new, TextBatch(sequences=sequences(2)))
    assert (term.name, term.per, term.weight) == ("nll", "token", 1.0)
    assert_close(term.values, torch.tensor([[math.log(2)], [3 * math.log(2)]]))


def test_reward_model_by_hand():
    new = ScoreForward((torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.5])))
    terms = RewardModel(level=SEQUENCE, l2=0.01, use_margin=False).loss(new, pairs([5.0, 5.0, 5.0]))
    assert {term.name: (term.per, term.weight) for term in terms} == {
        "pairwise": ("row", 1.0),
        "l2": ("row", 0.01),
        "accuracy": ("row", 0.0),
    }
    values = named(terms)
    won = [math.e**2 / (math.e**2 + math.e), math.e**-1 / (math.e**-1 + math.e), 0.5]
    assert values["pairwise"].tolist() == pytest.approx([-math.log(p) for p in won], rel=1e-5)
    assert values["l2"].tolist() == [2.5, 1.0, 0.25]
    assert values["accuracy"].tolist() == [1.0, 0.0, 0.0]  # a tie is not right


def test_reward_model_asks_for_the_margin_only_if_told_to():
    new, batch = ScoreForward((torch.tensor([2.0]), torch.tensor([1.0]))), pairs([1.0])
    assert named(RewardModel(level=SEQUENCE, l2=0.0, use_margin=True).loss(new, batch))[
        "pairwise"
    ].item() == pytest.approx(math.log(2))
    without = named(RewardModel(level=SEQUENCE, l2=0.0, use_margin=False).loss(new, batch))["pairwise"].item()
    assert without == pytest.approx(-math.log(math.e / (1 + math.e)), rel=1e-5)


def test_a_step_on_the_reward_models_loss_raises_the_preferred_score():
    first, second = torch.tensor([0.0, 3.0], requires_grad=True), torch.tensor([0.0, -3.0], requires_grad=True)
    values = named(
        RewardModel(level=SEQUENCE, l2=0.0, use_margin=False).loss(ScoreForward((first, second)), pairs([0.0, 0.0]))
    )
    up, down = torch.autograd.grad(values["pairwise"].sum(), (first, second))
    assert up.lt(0).all()
    assert down.gt(0).all()
    assert_close(up[0], torch.tensor(-0.5))


@pytest.mark.parametrize("safer", [SAFE, UNSAFE])
@pytest.mark.parametrize("unsafer", [SAFE, UNSAFE])
def test_the_signs_of_the_cost_loss_on_the_four_combinations_of_labels(safer: float, unsafer: float):
    low, high = torch.tensor([0.4], requires_grad=True), torch.tensor([-0.7], requires_grad=True)
    values = named(
        CostModel(level=SEQUENCE, sign_weight=1.0, l2=0.0).loss(ScoreForward((low, high)), verdicts([safer], [unsafer]))
    )
    # labelled unsafe: descent raises the cost; labelled safe: descent lowers it
    slopes = torch.autograd.grad(values["sign"].sum(), (low, high), retain_graph=True)
    assert [torch.sign(slope).item() for slope in slopes] == [-safer, -unsafer]
    # whatever the labels, the less safe response is to cost more
    down, up = torch.autograd.grad(values["pairwise"].sum(), (low, high))
    assert down.item() > 0 > up.item()


def test_cost_model_by_hand():
    new = ScoreForward((torch.tensor([-1.0, 0.5]), torch.tensor([2.0, -0.5])))
    terms = CostModel(level=SEQUENCE, sign_weight=0.5, l2=0.01).loss(new, verdicts([SAFE, SAFE], [UNSAFE, UNSAFE]))
    assert {term.name: (term.per, term.weight) for term in terms} == {
        "pairwise": ("row", 1.0),
        "sign": ("row", 0.5),
        "l2": ("row", 0.01),
        "accuracy": ("row", 0.0),
        "accuracy_sign": ("row", 0.0),
    }
    values = named(terms)

    def unsafe(cost: float) -> float:
        return math.exp(cost) / (1 + math.exp(cost))

    # first row: the safer costs -1 and is safe, the other costs 2 and is unsafe; second row: both verdicts are wrong
    likelihoods = [(1 - unsafe(-1.0)) * unsafe(2.0), (1 - unsafe(0.5)) * unsafe(-0.5)]
    assert values["sign"].tolist() == pytest.approx([-math.log(p) for p in likelihoods], rel=1e-5)
    assert values["pairwise"].tolist() == pytest.approx([-math.log(unsafe(3.0)), -math.log(unsafe(-1.0))], rel=1e-5)
    assert values["l2"].tolist() == [2.5, 0.25]
    assert values["accuracy"].tolist() == [1.0, 0.0]
    assert values["accuracy_sign"].tolist() == [1.0, 0.0]


def test_half_of_the_verdicts_right_is_half():
    new = ScoreForward((torch.tensor([1.0]), torch.tensor([2.0])))
    terms = CostModel(level=SEQUENCE, sign_weight=1.0, l2=0.0).loss(new, verdicts([SAFE], [UNSAFE]))
    assert named(terms)["accuracy_sign"].item() == 0.5


def rankings(present: list[list[bool]]) -> RankingBatch:
    there = torch.tensor(present)
    return RankingBatch(responses=tuple(sequences(len(there)) for _ in range(there.shape[1])), present=there)


def test_ranking_model_is_a_loop_over_the_ordered_pairs_of_each_prompt():
    torch.manual_seed(0)
    scores = torch.randn(3, 4)
    present = [[True] * 4, [True, True, False, False], [True, True, True, False]]
    values = named(RankingModel(l2=0.1).loss(ScoreForward(tuple(scores.unbind(1))), rankings(present)))
    for row, there in enumerate(present):
        pairs_of_row = list(itertools.combinations(scores[row, : sum(there)].tolist(), 2))
        losses = [math.log(1 + math.exp(worse - better)) for better, worse in pairs_of_row]
        squares = [(better**2 + worse**2) / 2 for better, worse in pairs_of_row]
        right = [better > worse for better, worse in pairs_of_row]
        count = len(pairs_of_row)
        assert values["pairwise"][row].item() == pytest.approx(sum(losses) / count, rel=1e-5)
        assert values["l2"][row].item() == pytest.approx(sum(squares) / count, rel=1e-5)
        assert values["accuracy"][row].item() == pytest.approx(sum(right) / count)


def test_a_response_that_is_not_there_teaches_nothing():
    scores = torch.tensor([[0.3, -0.2, 5.0]], requires_grad=True)
    values = named(RankingModel(l2=1.0).loss(ScoreForward(tuple(scores.unbind(1))), rankings([[True, True, False]])))
    (slope,) = torch.autograd.grad(values["pairwise"].sum() + values["l2"].sum(), scores)
    assert slope[0].ne(0).tolist() == [True, True, False]


def test_a_ranking_of_two_is_a_pair():
    new = ScoreForward((torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])))
    ranked = named(RankingModel(l2=0.01).loss(new, rankings([[True, True], [True, True]])))
    paired = named(RewardModel(level=SEQUENCE, l2=0.01, use_margin=False).loss(new, pairs([0.0, 0.0])))
    for name, values in paired.items():
        assert_close(ranked[name], values)


def token_wise() -> tuple[ScoreForward, PairBatch, list[list[tuple[float, float]]]]:
    """Scores after every token of two pairs, and the pairs of scores that are to be compared."""
    prompts = pad([[3], [3]], 0, "left")
    chosen = join(*prompts, *pad([[5, 6, 1], [5, 1]], 0, "right"))
    rejected = join(*prompts, *pad([[5, 1], [7, 7, 7, 1]], 0, "right"))
    batch = PairBatch(chosen=chosen, rejected=rejected, margin=torch.tensor([0.5, 0.0]))
    first = torch.tensor([[9.0, 0.3, -0.4], [0.1, 0.8, 0.0]], requires_grad=True)
    second = torch.tensor([[9.0, -0.2, 0.0, 0.0], [0.6, 0.7, -0.5, 0.2]], requires_grad=True)
    new = ScoreForward(
        scores=(first[[0, 1], [2, 1]], second[[0, 1], [1, 3]]),
        token_scores=(first, second),
    )
    return new, batch, [[(0.3, -0.2), (-0.4, -0.2)], [(0.1, 0.6), (0.8, 0.7), (0.8, -0.5), (0.8, 0.2)]]


def test_the_token_wise_reward_loss_is_the_mean_of_the_sequence_wise_one_over_the_span():
    new, batch, rows = token_wise()
    values = named(RewardModel(level="token", l2=0.1, use_margin=True).loss(new, batch))
    for i, (margin, pairs_of_row) in enumerate(zip([0.5, 0.0], rows, strict=True)):
        losses = [math.log(1 + math.exp(-(w - lost - margin))) for w, lost in pairs_of_row]
        squares = [(w**2 + lost**2) / 2 for w, lost in pairs_of_row]
        assert values["pairwise"][i].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert values["l2"][i].item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    assert values["accuracy"].tolist() == [0.0, 1.0]  # of the ends, which is what a score is
    first, second = new.token_scores
    left, right = torch.autograd.grad(values["pairwise"].sum(), (first, second))
    assert left[0].ne(0).tolist() == [False, True, True]  # what both responses share teaches nothing
    assert right[0].ne(0).tolist() == [False, True, False, False]  # nor does padding


def test_the_token_wise_cost_loss_is_the_mean_of_the_sequence_wise_one_over_the_span():
    new, pairs_read, rows = token_wise()
    batch = SafetyPairBatch(
        safer=pairs_read.chosen,
        unsafer=pairs_read.rejected,
        safer_sign=torch.tensor([SAFE, SAFE]),
        unsafer_sign=torch.tensor([UNSAFE, SAFE]),
    )
    values = named(CostModel(level="token", sign_weight=1.0, l2=0.1).loss(new, batch))
    for i, high_sign in enumerate([UNSAFE, SAFE]):
        wins = [math.log(1 + math.exp(low - high)) for low, high in rows[i]]
        signs = [math.log(1 + math.exp(low)) + math.log(1 + math.exp(-high_sign * high)) for low, high in rows[i]]
        assert values["pairwise"][i].item() == pytest.approx(sum(wins) / len(wins), rel=1e-5)
        assert values["sign"][i].item() == pytest.approx(sum(signs) / len(signs), rel=1e-5)
    assert values["accuracy"].tolist() == [1.0, 0.0]
    assert values["accuracy_sign"].tolist() == [0.5, 0.0]


def test_a_method_says_whether_it_reads_a_score_after_every_token():
    levels: dict[Level, bool] = {"token": True, "sequence": False}
    for level, expected in levels.items():
        assert RewardModel(level=level, l2=0.0, use_margin=False).token_scores is expected
        assert CostModel(level=level, sign_weight=1.0, l2=0.0).token_scores is expected


def test_probit_reward_model_by_hand():
    new = ScoreForward(
        (torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.5])),
        log_variances=(torch.tensor([0.4, 0.0]), torch.tensor([-0.6, 0.0])),
    )
    terms = ProbitRewardModel(l2=0.01).loss(new, pairs([9.0, 9.0]))
    assert {term.name: term.weight for term in terms} == {
        "pairwise": 1.0,
        "l2": 0.01,
        "accuracy": 0.0,
        "log_variance": 0.0,
    }
    values = named(terms)
    wins = [
        1 - NormalDist(0.8, math.sqrt(math.exp(0.4) + math.exp(-0.6))).cdf(0),  # the difference is above 0
        1 - NormalDist(-1.0, math.sqrt(2)).cdf(0),
    ]
    assert values["pairwise"].tolist() == pytest.approx([-math.log(p) for p in wins], rel=1e-4)
    assert values["l2"].tolist() == pytest.approx([(1 + 0.04 + 0.16 + 0.36) / 4, 0.5 / 4])
    assert values["accuracy"].tolist() == [1.0, 0.0]
    assert values["log_variance"].tolist() == pytest.approx([-0.1, 0.0])


def test_the_probit_model_becomes_less_sure_where_it_is_wrong_and_surer_where_it_is_right():
    v = torch.zeros(2, requires_grad=True)
    new = ScoreForward((torch.tensor([1.0, -1.0]), torch.zeros(2)), log_variances=(v, torch.zeros(2)))
    values = named(ProbitRewardModel(l2=0.0).loss(new, pairs([0.0, 0.0])))
    (slope,) = torch.autograd.grad(values["pairwise"].sum(), v)
    assert slope[0] > 0 > slope[1]
