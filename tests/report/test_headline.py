"""The first line of a page: each kind of run says its own finding, from numbers that were written by hand."""

import json
from pathlib import Path

import pytest

from rlhf_lab.report.headline import NOTHING, verdict
from rlhf_lab.report.run import read_run

TRAINED = {
    "eval/test/gold/helpfulness/mean": 1.25,
    "eval/test/gold/helpfulness/ci95": 0.1,
    "eval/test/gold/cost/mean": 0.5,
    "eval/test/gold/cost/ci95": 0.2,
}
RATED = {
    "rating/test/helpful/sft/mean": 1000.0,
    "rating/test/helpful/sft/ci95": 0.0,
    "rating/test/helpful/ppo/mean": 1165.4,
    "rating/test/helpful/ppo/ci95": 35.6,
    "rating/test/safe/sft/mean": 1000.0,
    "rating/test/safe/sft/ci95": 0.0,
    "rating/test/safe/ppo/mean": 966.0,
    "rating/test/safe/ppo/ci95": 38.0,
    "win_rate/test/safe/sft/ppo/mean": 0.6,
}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], NOTHING),
        ([{"objective/kl": 0.5}], NOTHING),
        ([TRAINED], "Gold helpfulness on held-out prompts 1.25 ± 0.10; gold cost 0.50 ± 0.20"),
        (
            [TRAINED, TRAINED | {"eval/test/gold/helpfulness/mean": 2.0, "eval/test/gold/cost/mean": -0.5}],
            "Gold helpfulness on held-out prompts 1.25 ± 0.10 → 2.00 ± 0.10; gold cost 0.50 ± 0.20 → −0.50 ± 0.20",
        ),
        (
            [TRAINED | {"safety/passed": 1.0, "safety/bound": -0.2235, "safety/limit": 0.0}],
            "PASS: upper bound −0.22, limit 0",
        ),
        (
            [TRAINED | {"safety/passed": 0.0, "safety/bound": 0.62, "safety/limit": 0.5}],
            "NO SOLUTION FOUND: upper bound 0.62, limit 0.5",
        ),
        ([RATED], "Rated highest on test: ppo by helpful (1,165 ± 36), sft by safe (1,000 ± 0)"),
        (
            [RATED | {"rating/ood/safe/sft/mean": 1000.0, "rating/ood/safe/ppo/mean": 1001.0}],
            "Rated highest: sft by safe on test (1,000 ± 0), ppo by safe on ood (1,001)",
        ),
        (  # a split without ratings by the last criterion, which the stage leaves out
            [RATED | {"rating/ood/helpful/sft/mean": 1000.0, "rating/ood/helpful/ppo/mean": 1001.0}],
            "Rated highest: sft by safe on test (1,000 ± 0), ppo by helpful on ood (1,001)",
        ),
        (  # the first split has no gold score
            [{"eval/sft_test/loss/nll": 1.0} | {k.replace("test", "test:told"): v for k, v in TRAINED.items()}],
            "Gold helpfulness on held-out prompts 1.25 ± 0.10; gold cost 0.50 ± 0.20",
        ),
        (
            [
                {
                    "arena/test/win_rate/mean": 0.98,
                    "arena/test/win_rate/ci95": 0.02,
                    "arena/test/safe/sft/mean": 0.42,
                    "arena/test/safe/sft/ci95": 0.06,
                    "arena/test/safe/ppo/mean": 0.79,
                    "arena/test/safe/ppo/ci95": 0.05,
                }
            ],
            "On test ppo wins 98 ± 2 % against sft, and is safe in 79 ± 5 % against 42 ± 6 %",
        ),
        ([{"arena/test/win_rate/mean": 0.4, "arena/test/win_rate/ci95": 0.1}], "On test the second wins 40 ± 10 %"),
        ([{"arena/test/win_rate/mean": 0.4}], "On test the second wins 40 %"),
        (
            [
                {"step": 5.0},
                {
                    "pareto/test/soup/hypervolume/mean": 2.98,
                    "pareto/test/soup/hypervolume/ci95": 0.13,
                    "pareto/test/ric/hypervolume/mean": 3.56,
                    "pareto/test/ric/hypervolume/ci95": 0.12,
                    "pareto/test/ric/hypervolume/gain/mean": 0.57,
                    "pareto/ood/soup/hypervolume/mean": 9.0,
                },
            ],
            "Hypervolume on test: ric 3.56 ± 0.12, soup 2.98 ± 0.13",
        ),
        (
            [
                {"best_of_n/test/mean/gain/gold/helpfulness/mean": 9.0},
                {
                    "best_of_n/test/single/gain/gold/helpfulness/mean": 0.97,
                    "best_of_n/test/single/gain/gold/helpfulness/ci95": 0.11,
                    "best_of_n/test/single/gain/gold/cost/mean": 7.0,
                    "best_of_n/test/member_3/gain/gold/helpfulness/mean": 2.0,
                    "best_of_n/test/uwo/gain/gold/helpfulness/mean": 1.32,
                    "best_of_n/test/uwo/gain/gold/helpfulness/ci95": 0.17,
                    "best_of_n/test/wco/gain/gold/helpfulness/mean": 1.1,
                },
            ],
            "Best of 2 on test gains gold helpfulness: +1.32 ± 0.17 by uwo, +0.97 ± 0.11 by single",
        ),
        (
            [
                {"overoptimisation/uwo/gold/mean": 0.0, "overoptimisation/single/gold/mean": 0.0},
                {"overoptimisation/uwo/gold/mean": 1.02, "overoptimisation/single/gold/mean": 1.0},
                {"overoptimisation/uwo/gold/mean": 0.4},
                {"overoptimisation/single/gold/mean": -8.47},
            ],
            "Gold gained at its best: uwo +1.02, farthest from the start +0.40; "
            "single +1.00, farthest from the start −8.47",
        ),
        (
            [
                {
                    "eval/test/value_model/helpful/accuracy/mean": 0.7,
                    "eval/test/value_model/helpful/accuracy/low": 0.67,
                    "eval/test/value_model/helpful/accuracy/ci95": 0.03,
                    "eval/test/value_model/cost/accuracy/mean": 0.79,
                    "eval/test/value_model/cost/sign_accuracy/mean": 0.97,
                }
            ],
            "Pairs ranked right on test: helpful 0.70 ± 0.03, cost 0.79",
        ),
    ],
)
def test_a_page_begins_with_what_came_of_its_run(lines: list[dict[str, float]], said: str, tmp_path: Path):
    text = "".join(json.dumps({"step": step} | line | {"step": step}) + "\n" for step, line in enumerate(lines, 1))
    (tmp_path / "metrics.jsonl").write_text(text)
    assert verdict(read_run(tmp_path)).replace("\N{NO-BREAK SPACE}", " ") == said
