"""Training on preferences: the reference is asked once, the weaker pair gives no gradient, a kill costs nothing."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf_lab.algorithms.dpo import DPO
from rlhf_lab.algorithms.dpo_pop import DPOPoP
from rlhf_lab.algorithms.dpo_pop_dual import DPOPoPDual
from rlhf_lab.algorithms.modpo import MODPO
from rlhf_lab.algorithms.preference import Margin
from rlhf_lab.algorithms.simpo import SimPO
from rlhf_lab.bounds import Mean
from rlhf_lab.console import Console
from rlhf_lab.constraints import Lagrangian, LogAscent
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import quadruple_batch, sequences
from rlhf_lab.engine.forward import policy_forward
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.learner import Learner
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.models import load_policy
from rlhf_lab.engine.tiny import tiny_tokenizer
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.train_offline import TrainOffline
from rlhf_lab.tracking import NoTracker

TINY = "embedded:tiny"
SEED = 3
WORDS = ["bake", "mix", "wash", "the", "flour", "bread", "sponge", "."]
NONE = Margin(constant=0.0, scale=0.0, unit="reward")


def words(i: int, count: int) -> str:
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, count + 1))


def pair(i: int) -> dict[str, Any]:
    return {"prompt": f"how do i {words(i, 3)}", "chosen": words(i, 2 + i % 4), "rejected": words(i + 1, 5 - i % 3)}


PAIRS = [pair(i) for i in range(10)]
QUADRUPLES = [
    {f"{side}_{name}": value for side, j in (("strong", i), ("weak", i + 1)) for name, value in pair(j).items()}
    for i in range(10)
]


def dpo(**changes: Any) -> DPO:
    return DPO(**{"beta": 0.5, "margin": NONE, "label_smoothing": 0.0, **changes})


def pop(decay: float) -> DPOPoP:
    return DPOPoP(beta=0.5, margin_min=-100.0, margin_max=100.0, ema_decay=decay)


def dual() -> DPOPoPDual:
    ascent = LogAscent(init=1.0, lr=0.5, max_multiplier=100.0, min_multiplier=1e-3)
    return DPOPoPDual(
        beta=0.5, constraint=Lagrangian(limit=0.0, margin=0.0, window=4, delay=1, bound=Mean(), dual=ascent)
    )


METHODS = {"dpo": dpo, "pop": lambda: pop(0.0), "pop_ema": lambda: pop(0.8), "dual": dual}


def tables(folder: Path, rows: list[dict[str, Any]]) -> Dataset:
    folder.mkdir(exist_ok=True)
    for name, part in (("train", rows[:7]), ("test", rows[7:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return Dataset(
        path=str(folder),
        revision=None,
        columns={},
        template="auto",
        max_prompt_tokens=64,
        max_response_tokens=64,
        bad_rows="error",
        on_conflict="keep",
        train_size=None,
        train_split="train",
        eval_splits=None,
        eval_size=100,
        hold_out=0.0,
        seed=0,
    )


def stage(algorithm: Any, dataset: Dataset, **changes: Any) -> TrainOffline:
    learner = partial(
        Learner,
        lr={"policy": 1e-2, "scorer": 1e-2},
        epochs=1,
        minibatch_size=0,
        tokens_at_once=64,
        schedule="constant",
        warmup=0,
        weight_decay=0.0,
        betas=(0.9, 0.95),
        max_grad_norm=1.0,
    )
    settings: dict[str, Any] = {
        "algorithm": algorithm,
        "model": ModelPaths(base=TINY, policy=TINY, reference=TINY, critic=TINY, learning_rates={}),
        "dataset": dataset,
        "learner": learner,
        "hardware": Hardware(device="cpu", dtype="float32", threads=1),
        "epochs": 2,
        "batch_size": 3,
        "calibration": "none",
        "calibration_column": "",
        "checkpoint_every": 2,
        "evaluate_every": 3,
        "turns": "last",
        "pack_tokens": 0,
        "measure": None,
    }
    return TrainOffline(**{**settings, **changes})


ACCOUNTED = ("time/", "memory/", "throughput/")  # which differ from run to run


def carry_out(directory: Path, training: TrainOffline) -> list[dict[str, float]]:
    """One run, or the rest of one; the lines of its log, but for time and memory."""
    run = Run.open(
        directory,
        config={"seed": SEED, "keep_checkpoints": 2},
        overrides=[],
        artifacts={},
        tracker=NoTracker(),
        console=Console(),
    )
    try:
        training.run(run)
    finally:
        run.close()
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if not key.startswith(ACCOUNTED)} for line in lines]


def rows_for(name: str) -> list[dict[str, Any]]:
    return PAIRS if name == "dpo" else QUADRUPLES


def test_what_the_reference_says_is_kept_row_by_row(tmp_path):
    carry_out(tmp_path / "run", stage(dpo(), tables(tmp_path / "data", PAIRS)))
    reference = load_policy(TINY, device=torch.device("cpu"), dtype="float32", seed=derive(SEED, "initial weights"))
    template = Template(tiny_tokenizer(), "auto")
    for split, rows in (("train", PAIRS[:7]), ("test", PAIRS[7:])):
        kept = load_file(tmp_path / f"run/reference/{split}/logprobs.safetensors")
        records = tables(tmp_path / "data", PAIRS).preferences(split, template)
        for i in range(len(rows)):
            for side, response in enumerate(records[i].responses):
                alone = sequences(template, [records[i].prompt], [response])
                expected = policy_forward(reference, alone).sequence_logprobs[0]
                assert_close(kept[str(side)][i], expected.detach(), atol=1e-4, rtol=1e-5)


def test_at_its_start_a_policy_that_is_the_reference_has_no_reward_and_one_bit_of_loss(tmp_path):
    lines = carry_out(tmp_path / "run", stage(dpo(), tables(tmp_path / "data", PAIRS)))
    assert lines[0]["implicit_reward/chosen"] == pytest.approx(0, abs=1e-4)
    assert lines[0]["loss/pairwise"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["loss/pairwise"] < 0.6
    assert lines[-1]["implicit_reward/chosen"] > lines[-1]["implicit_reward/rejected"]
    assert {"eval/test/loss/pairwise", "eval/test/accuracy"} <= lines[-1].keys()


@pytest.mark.parametrize(
    "name",
    [pytest.param("dpo", marks=pytest.mark.slow), pytest.param("pop", marks=pytest.mark.slow), "pop_ema", "dual"],
)
def test_a_stopped_run_continues_as_if_it_had_not_been_and_asks_the_reference_once(name, tmp_path, monkeypatch):
    data = tables(tmp_path / "data", rows_for(name))
    whole = carry_out(tmp_path / "whole", stage(METHODS[name](), data))
    assert len(whole) == 6
    log = Run.log

    def stop(run: Run, step: int, metrics: dict[str, float]) -> None:
        if step == 4:  # the last checkpoint is of step 2
            raise RuntimeError("stopped")
        log(run, step, metrics)

    monkeypatch.setattr(Run, "log", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        carry_out(tmp_path / "broken", stage(METHODS[name](), data))
    monkeypatch.undo()
    monkeypatch.setattr("rlhf_lab.stages.train_offline.load_frozen", lambda *_, **__: pytest.fail("asked again"))
    assert carry_out(tmp_path / "broken", stage(METHODS[name](), data)) == whole
    weights = [(tmp_path / run / "policy/model.safetensors").read_bytes() for run in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_the_weaker_pair_gives_a_margin_and_no_gradient(tmp_path):
    data = tables(tmp_path / "data", QUADRUPLES)
    template = Template(tiny_tokenizer(), "auto")
    records = data.quadruples("train", template)
    zeros = tuple(torch.zeros(len(records)) for _ in range(4))
    batch = quadruple_batch(template, records).beside(zeros)
    model = load_policy(TINY, device=torch.device("cpu"), dtype="float32", seed=1)
    training = stage(pop(0.0), data)
    taught = training._guided(model, batch)
    assert not taught.margin.requires_grad
    for i, record in enumerate(records):
        sums = [
            policy_forward(model, sequences(template, [record.weak.prompt], [response])).sequence_logprobs.item()
            for response in record.weak.responses
        ]
        assert taught.margin[i].item() == pytest.approx(sums[0] - sums[1], abs=1e-3)
    assert torch.equal(taught.chosen.tokens, batch.strong.chosen.tokens)
    assert len(taught.texts) == 2  # what is learnt from holds the stronger pairs only


def test_the_guide_is_the_average_and_not_the_policy_that_learns(tmp_path):
    lines: dict[str, list[dict[str, float]]] = {}
    for name in ("pop", "pop_ema"):
        training = stage(METHODS[name](), tables(tmp_path / "data", QUADRUPLES))
        training.learner.keywords["lr"]["policy"] = 1e-5  # small, so that margins are linear in the weights
        lines[name] = carry_out(tmp_path / name, training)
    assert lines["pop"][0] == lines["pop_ema"][0]  # one step on margins of 0, the policy being the reference
    second = {name: each[1]["margin"] for name, each in lines.items()}
    assert second["pop_ema"] == pytest.approx(0.2 * second["pop"], rel=0.05)  # a fifth of the way


def test_equal_responses_are_refused_or_dropped_and_counted(tmp_path):
    same = {"prompt": "how do i mix", "chosen": "the bread", "rejected": "the bread"}
    data = tables(tmp_path / "data", [same, *PAIRS])
    template = Template(tiny_tokenizer(), "auto")
    with pytest.raises(ValueError, match=r"1 with equal responses \(first: row 0\), of 7 rows"):
        data.preferences("train", template)
    data.bad_rows = "drop"
    assert len(data.preferences("train", template)) == 6
    assert "dropped 1 of 7 rows: 1 with equal responses" in data.notes[0]


def test_says_which_margins_and_scores_the_data_lack(tmp_path):
    data = tables(tmp_path / "data", PAIRS)
    margin = Margin(constant=0.0, scale=1.0, unit="reward")
    with pytest.raises(ValueError, match=r"has none; say which column holds them with dataset.columns.margin"):
        carry_out(tmp_path / "dpo", stage(dpo(margin=margin), data))
    with pytest.raises(ValueError, match="has none; say which"):
        carry_out(tmp_path / "simpo", stage(SimPO(beta=1.0, margin=margin, length="answer"), data))
    modpo = MODPO(beta=0.1, weight=0.5, others={"humour": 0.5})
    with pytest.raises(ValueError, match=r"the score 'humour', but the pairs of .* have \[\]; .*stage=score_table"):
        carry_out(tmp_path / "modpo", stage(modpo, data))
    scored = tables(
        tmp_path / "scored", [{**row, "score_humour_chosen": 1.0, "score_humour_rejected": 0.5} for row in PAIRS]
    )
    assert carry_out(tmp_path / "modpo_scored", stage(modpo, scored))[0]["margin"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({"margin": 0.7, "score_chosen": 3.0, "score_rejected": 1.0}, 0.7),
        ({"score_chosen": 3.0, "score_rejected": 1.0}, 2.0),
        ({}, 0.0),
    ],
)
def test_a_margin_is_a_column_or_the_difference_of_scores(columns, margin, tmp_path):
    data = tables(tmp_path / "data", [{**row, **columns} for row in PAIRS])
    records = data.preferences("train", Template(tiny_tokenizer(), "auto"))
    assert {record.margin for record in records} == {margin}
    assert all(record.gaps == {} for record in records)


def test_scores_by_side_are_turned_with_the_label(tmp_path):
    def row(i: int) -> dict[str, Any]:
        return {"prompt": f"how {words(i, 3)}", "response_0": "mix", "response_1": "bake", "better": i % 2}

    scored = [{**row(i), "score_a_0": 1.0, "score_a_1": 4.0, "score_0": 2.0, "score_1": 2.5} for i in range(10)]
    records = tables(tmp_path / "data", scored).preferences("train", Template(tiny_tokenizer(), "auto"))
    assert [dict(record.gaps) for record in records] == [{"a": 3.0 if i % 2 else -3.0} for i in range(7)]
    assert [record.margin for record in records] == [0.5 if i % 2 else -0.5 for i in range(7)]
