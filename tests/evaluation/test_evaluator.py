"""What is measured of held-out responses reaches the table row by row; intervals are over prompts."""

from typing import Any

import pytest
import torch

from rlhf_lab.data.generations import Generations, write
from rlhf_lab.evaluation import evaluator
from rlhf_lab.evaluation.evaluator import Evaluator, generation_rows, sample_rows
from rlhf_lab.functional.resampling import mean_interval
from rlhf_lab.records import Prompt
from rlhf_lab.types import Rollout, Score, ScoredRollout, Sequences

TALK = Prompt.from_messages([{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))])
PROMPTS = [Prompt.from_text("one").conditioned("be kind", {"kind": 1.0}), TALK]


def rollout(prompts, samples):
    """Responses of three tokens, the second of each prompt cut after two; each token .1 nats likelier than before."""
    asked = [prompt for prompt in prompts for _ in range(samples)]
    mask = torch.tensor([[True, True, i % samples != 1] for i in range(len(asked))])
    zeros = torch.zeros(len(asked), 4, dtype=torch.int64)
    return Rollout(
        prompts=asked,
        sequences=Sequences(tokens=zeros, attention_mask=zeros == 0, position_ids=zeros, response_mask=mask),
        group=torch.arange(len(prompts)).repeat_interleave(samples),
        finished=mask[:, 2],
        responses=[f"r{i}" for i in range(len(asked))],
        logprobs=torch.where(mask, -0.5, 0.0),
    )


class Scorer:
    """An ensemble of two: the number of the row, and its negative."""

    def score(self, drawn):
        members = torch.stack([torch.arange(len(drawn)), -torch.arange(len(drawn))], dim=1).float()
        score = Score(value=members[:, 0], members=members)
        before = drawn.logprobs - 0.1 * drawn.sequences.response_mask
        return ScoredRollout(rollout=drawn, scores={"help": score}, ref_logprobs=before, values={})


def test_every_measurement_of_a_response_reaches_its_row(tmp_path):
    scored = Scorer().score(rollout(PROMPTS, 2))
    rows = sample_rows("test", scored, {"truth": Score(value=torch.arange(4.0) / 2, members=torch.zeros(4, 1))})
    write(tmp_path / "table.parquet", generation_rows(rows, "run", 7), {})
    table = Generations.open(tmp_path / "table.parquet")
    assert [(p.condition, p.written, texts) for p, texts in table.texts("test")] == [
        ("be kind", "one", ["r0", "r1"]),
        ("", TALK.written, ["r2", "r3"]),
    ]
    assert table.keys("test") == [(p.id, p.condition) for p in PROMPTS]
    assert table.column("finish_reason", "test").tolist() == ["stop", "length"] * 2
    assert table.column("tokens", "test").tolist() == [3, 2, 3, 2]
    assert table.column("logprob", "test") == pytest.approx([-1.5, -1.0, -1.5, -1.0])
    for name, per_token in {"kl_k1": 0.1, "kl_k2": 0.005, "kl_k3": 0.0048374}.items():
        assert table.matrix(name, "test")[0] == pytest.approx([3 * per_token, 2 * per_token], rel=1e-4)
    assert table.members("help", "test")[1].tolist() == [[2.0, -2.0], [3.0, -3.0]]
    assert table.matrix("gold_truth", "test").tolist() == [[0.0, 0.5], [1.0, 1.5]]


def test_intervals_are_over_prompts_however_many_samples_each_has(monkeypatch):
    class Engine:
        def generate(self, batch, samples, seed):
            return rollout(batch, samples)

    monkeypatch.setattr(evaluator, "prompt_batch", lambda template, prompts: prompts)
    prompts = [Prompt.from_text(str(i)) for i in range(5)]
    parts: Any = {"template": None, "engine": Engine(), "scorer": Scorer()}
    measured, rows = Evaluator({"test": prompts}, {}, parts["template"], 0, 3).evaluate(
        parts["engine"], parts["scorer"]
    )
    mean, half = mean_interval(torch.arange(15.0).view(5, 3).mean(1))
    assert measured["eval/test/rewards/help/mean"] == pytest.approx(mean)
    assert measured["eval/test/rewards/help/ci95"] == pytest.approx(half)
    assert measured["eval/test/kl_k2"] == pytest.approx(0.005 * 8 / 3, rel=1e-4)
    assert [row["sample"] for row in rows] == [0, 1, 2] * 5
