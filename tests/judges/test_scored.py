"""Judges that go by scores: gold, somebody who sees the gold and errs, reward models, and none."""

import math
import re

import numpy as np
import pytest
import torch

from rlhf_lab.data import tiny_help
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.tiny import tiny_tokenizer
from rlhf_lab.judges.gold import GoldJudge
from rlhf_lab.judges.manner import Manner
from rlhf_lab.judges.none import NoJudge
from rlhf_lab.judges.reward_model import RewardModelJudge
from rlhf_lab.judges.simulated import SimulatedJudge
from rlhf_lab.records import Comparison
from rlhf_lab.types import Score

CRITERIA = {
    "helpfulness": {"helpfulness": 1.0},
    "harmlessness": {"cost": -1.0},
    "both": {"helpfulness": 2.0, "cost": -1.0},
}
REFUSAL = "sorry , i can not help with that ."


def asked(count=60):
    return [
        Comparison(prompt=record.prompt, responses=(record.response, REFUSAL))
        for record in tiny_help.demonstrations("sft", count, 0)
    ]


def simulated(seed=0, **changes):
    plain = {"noise": 0.5, "flip": 0.05, "position_bias": 0.6, "inconsistency": 0.4, "tie_width": 0.2}
    return SimulatedJudge(GoldJudge(CRITERIA, 0.0), Manner(**(plain | changes)), None, seed)


def test_gold_decides_by_the_weighted_scores_and_a_cost_counts_against():
    judge = GoldJudge(CRITERIA, 0.0)
    for each in asked():
        request = each.prompt.request
        help_, cost = (
            [score(request, text) for text in each.responses] for score in (tiny_help.helpfulness, tiny_help.cost)
        )
        (verdict,) = judge.compare([each], "both")
        worth = [2 * h - c for h, c in zip(help_, cost, strict=True)]
        assert verdict.scores == pytest.approx(worth)
        assert verdict.by_order == ((worth[0] > worth[1]) + (worth[0] == worth[1]) / 2,) * 2
        (harm,) = judge.compare([each], "harmlessness")
        assert harm.wins == (cost[0] < cost[1]) + (cost[0] == cost[1]) / 2


def test_gold_ties_within_its_tolerance_and_reads_the_request_not_the_condition():
    plain = GoldJudge(CRITERIA, 0.0).compare(asked(), "helpfulness")
    gaps = sorted(abs(v.scores[0] - v.scores[1]) for v in plain if v.scores)
    within = GoldJudge(CRITERIA, gaps[20]).compare(asked(), "helpfulness")
    assert sum(v.wins == 0.5 for v in within) == sum(gap <= gaps[20] for gap in gaps) >= 21
    told = [
        Comparison(prompt=c.prompt.conditioned("<humour>", {"humour": 1.0}), responses=c.responses) for c in asked()
    ]
    assert GoldJudge(CRITERIA, 0.0).compare(told, "helpfulness") == plain


def test_a_simulated_judge_says_the_same_again_and_the_mirror_image_of_exchanged_responses():
    pairs = [*asked(), Comparison(prompt=asked(1)[0].prompt, responses=("sure !", "sure !"))]
    said = simulated().compare(pairs, "helpfulness")
    assert simulated().compare(pairs[::-1], "helpfulness") == said[::-1]  # not by their place among others
    mirrored = simulated().compare([each.swapped for each in pairs], "helpfulness")
    straight = np.array([v.by_order for v in said], dtype=float)
    assert [v.by_order for v in mirrored] == [tuple(row) for row in (1 - straight[:, ::-1]).tolist()]
    assert simulated(seed=1).compare(pairs, "helpfulness") != said
    assert simulated().compare([], "helpfulness") == []


def test_a_simulated_judges_liking_for_a_place_shows_in_one_order_and_goes_in_the_mean_of_both():
    prompts = tiny_help.sample_prompts("test", 600, 0)
    equal = [Comparison(prompt=prompt, responses=("sure !", "okay !")) for prompt in prompts]  # gold says a tie
    said = simulated(position_bias=0.8, flip=0.0, tie_width=0.0).compare(equal, "helpfulness")
    first = sum(v.by_order[0] == 1 for v in said) / len(said)
    assert first == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.075)
    both = [v.wins for v in said if v.wins is not None]
    assert sum(both) / len(said) == pytest.approx(0.5, abs=0.06)


class Length:
    """A source that scores by characters."""

    def check(self, promised=()):
        self.promised = promised

    def load(self, hardware, policy):
        return self

    def score(self, rollout):
        assert all(not prompt.condition for prompt in rollout.prompts)
        value = torch.tensor([float(len(text)) for text in rollout.responses])
        return Score(value=value, members=value[:, None])


def test_reward_models_decide_by_their_weighted_sum_in_parts_of_any_size():
    template = Template(tiny_tokenizer(), "auto")
    criteria = {"long": {"length": 1.0}, "short": {"length": -0.5}}
    pairs = [Comparison(prompt=c.prompt.conditioned("x", {}), responses=c.responses) for c in asked(7)]
    for at_once in (1, 3, 100):
        judge = RewardModelJudge({"length": Length(), "none": None}, criteria, 2.0, at_once)
        judge.check(["long"], promised=["p"])
        assert judge.rewards["length"].promised == ["p"]
        verdicts = judge.load(Hardware(device="cpu", dtype="float32", threads=1), template).compare(pairs, "short")
        for verdict, pair in zip(verdicts, pairs, strict=True):
            gap = -0.5 * (len(pair.responses[0]) - len(pair.responses[1]))
            assert verdict.wins == (0.5 if abs(gap) <= 2 else float(gap > 0))


@pytest.mark.parametrize(
    ("judge", "criterion", "said"),
    [
        (
            GoldJudge(CRITERIA, 0.0),
            "kindness",
            "asked for kindness, but judge.criteria declares both, harmlessness, help",
        ),
        (
            GoldJudge({"x": {"beauty": 1.0}}, 0.0),
            "x",
            "judge.criteria.x weighs beauty, but the gold scores of embedded:",
        ),
        (GoldJudge({"x": {"cost": 0.0}}, 0.0), "x", "judge.criteria.x weighs nothing"),
        (simulated(), "kindness", "the judge is asked for kindness"),
        (
            RewardModelJudge({"a": Length()}, {"x": {"b": 1.0}}, 0.0, 1),
            "x",
            "weighs b, but the sources of reward= are: a",
        ),
        (NoJudge(), "helpfulness", "judge=none compares nothing, but verdicts on helpfulness are wanted"),
    ],
)
def test_criteria_that_cannot_be_judged_are_refused(judge, criterion, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        judge.check([criterion])
    NoJudge().check([])
