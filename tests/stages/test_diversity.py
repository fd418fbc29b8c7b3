"""The stage on tables written by hand: its numbers, its gains over the first table, and going on after being killed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlhf_lab.console import Console
from rlhf_lab.data.generations import write
from rlhf_lab.data.tables import read_table
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.evaluation.diversity import GramSettings
from rlhf_lab.evaluation.entailment import Entailment
from rlhf_lab.evaluation.response_sets import BestOf, LengthControl
from rlhf_lab.run import Run
from rlhf_lab.stages import diversity_models
from rlhf_lab.stages.diversity import Diversity
from rlhf_lab.tracking import NoTracker

SETTINGS = Path(__file__).resolve().parents[2] / "conf/stage/diversity.yaml"
HARDWARE = Hardware(device="cpu", dtype="float32", threads=1)


@pytest.fixture
def stage(tmp_path):
    """`stage(**changes)`: as configured, without tokens, on the tables `varied` and `same` of six prompts."""

    def text(name, p, k):
        return (
            f"first wash item{p} . then paint thing{k} and wall{k} . enjoy !" if name == "varied" else "no no no no ."
        )

    for name in ("varied", "same"):
        rows = (
            {"split": "test", "condition": "", "prompt_id": f"p{p}", "prompt": f"ask {p}", "sample": k,
             "response": text(name, p, k), "tokens": 4, "logprob": -2.0, "objective": float(k)}
            for p in range(6) for k in range(4)
        )  # fmt: skip
        write(tmp_path / f"{name}.parquet", rows, {"sampling": {"temperature": 1.0, "top_k": 50, "top_p": 1.0}})
    settings = yaml.safe_load(SETTINGS.read_text())
    del settings["_target_"]
    for name, kind in (("grams", GramSettings), ("nli", Entailment), ("length", LengthControl), ("best_of", BestOf)):
        settings[name] = kind(**{key: value for key, value in settings[name].items() if key != "_target_"})
    settings |= {
        "generations": {name: str(tmp_path / f"{name}.parquet") for name in ("varied", "same")},
        "tokenizer": None, "overall": 8, "hardware": HARDWARE, "bootstrap_draws": 50,
        "best_of": BestOf(n=2, by="objective"), "length": LengthControl(words=6, samples=2),
    }  # fmt: skip
    return lambda **changes: Diversity(**{**settings, **changes})


@pytest.fixture
def opened(tmp_path):
    def open_run(name="run"):
        return Run.open(
            tmp_path / name,
            config={"seed": 0, "keep_checkpoints": 1},
            overrides=[],
            artifacts={},
            tracker=NoTracker(),
            console=Console(),
        )

    return open_run


def test_what_is_said_of_varied_and_of_equal_responses(stage, opened):
    part = stage()
    part.check()
    with_run = opened()
    metrics = part.run(with_run)
    prefix = "diversity/test/per_input"
    assert math.isnan(metrics[f"{prefix}/same/distinct_words/mean"])
    assert metrics[f"{prefix}/same/distinct_words/excluded"] == 6  # of four words there are no five in a row
    assert metrics[f"{prefix}/same/self_bleu/mean"] == pytest.approx(1)
    assert metrics[f"{prefix}/same/ngram_cosine/mean"] == pytest.approx(0)
    assert metrics[f"{prefix}/varied/entropy/mean"] == pytest.approx(0.5)
    gain = metrics[f"{prefix}/same/ngram_cosine/gain/mean"]
    assert gain == pytest.approx(-metrics[f"{prefix}/varied/ngram_cosine/mean"])
    assert gain < 0
    assert f"{prefix}/varied/ngram_cosine/gain/mean" not in metrics
    assert metrics["diversity/test/per_input_at_6_words/same/ngram_cosine/excluded"] == 6  # none is long enough
    assert metrics["diversity/test/per_input_at_6_words/varied/ngram_cosine/excluded"] == 0
    rows = read_table(with_run.directory / "data/diversity.parquet")
    [row] = [r for r in rows if (r["table"], r["view"], r["measure"]) == ("varied", "overall", "self_bleu")]
    assert (row["prompts"], row["samples"], row["temperature"], row["top_k"]) == (6, 4, 1.0, 50)
    assert (with_run.directory / "data/diversity.csv").read_text().count("\n") == len(rows) + 1
    assert "top_k=50" in (with_run.directory / "warnings.jsonl").read_text()
    sets = read_table(with_run.directory / "data/per_input.parquet")
    mine = [s["self_bleu"] for s in sets if (s["table"], s["view"]) == ("varied", "per_input")]
    assert np.mean(mine) == pytest.approx(metrics[f"{prefix}/varied/self_bleu/mean"])


class FakeEncoder:
    """Every text at an angle of its own; counts what it is asked, and dies where it is told to."""

    asked: list[str] = []  # noqa: RUF012
    dies_at = 10**9
    longest = 6

    def __init__(self, path, device):
        pass

    def embed(self, texts, at_once):
        if len(self.asked) >= self.dies_at:
            raise KeyboardInterrupt
        self.asked.extend(texts)
        angles = np.array([sum(map(ord, text)) % 97 for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32), np.array([5] * len(texts))


def test_each_text_is_embedded_once_even_if_the_run_is_interrupted(stage, opened, monkeypatch):
    monkeypatch.setattr(diversity_models, "SentenceEncoder", FakeEncoder)
    monkeypatch.setattr(FakeEncoder, "asked", [])
    part = stage(sentence_model="somebody/some-model", texts_per_shard=7)
    whole = part.run(opened("whole"))
    distinct = len(FakeEncoder.asked)
    assert distinct == len(set(FakeEncoder.asked))
    FakeEncoder.asked.clear()
    monkeypatch.setattr(FakeEncoder, "dies_at", 14)
    broken = opened("broken")
    with pytest.raises(KeyboardInterrupt):
        part.run(broken)
    broken.close()
    monkeypatch.setattr(FakeEncoder, "dies_at", 10**9)
    assert json.dumps(part.run(opened("broken"))) == json.dumps(whole)  # as text: nan is equal to itself
    assert len(FakeEncoder.asked) == len(set(FakeEncoder.asked)) == distinct
    assert whole["diversity/test/per_input/same/sentence_bert/mean"] == pytest.approx(0, abs=1e-6)
    assert whole["diversity/test/per_input/varied/sentence_bert/mean"] > 0.1


class FakeClassifier:
    """A sentence entails itself and contradicts every other."""

    def __init__(self, settings, device):
        pass

    def probabilities(self, asked):
        return np.array([[0.0, 0, 1] if one == other else [1.0, 0, 0] for one, other in asked]), len(asked)


def test_equal_responses_entail_each_other(stage, opened, monkeypatch):
    monkeypatch.setattr(diversity_models, "EntailmentModel", FakeClassifier)
    part = stage()
    part.nli = replace(part.nli, path="somebody/mnli")
    metrics = part.run(opened())
    assert metrics["diversity/test/per_input/same/nli/mean"] == -2
    # of three sentences by three: "wash item" and "enjoy !" are alike, "paint" is not: 2 pairs of 9 entail each other
    assert metrics["diversity/test/per_input/varied/nli/mean"] == pytest.approx(2 * (7 - 2) / 9)
    assert metrics["diversity/test/across_inputs/same/nli/mean"] == -2


def test_what_cannot_be_measured_is_refused(stage):
    with pytest.raises(ValueError, match=r"stage.best_of.n=3 does not part the 4 samples .* choose a divisor"):
        stage(best_of=BestOf(n=3, by="objective")).check()
    with pytest.raises(ValueError, match=r"stage.best_of.by=score_x, but .* has the columns"):
        stage(best_of=BestOf(n=2, by="score_x")).check()
    with pytest.raises(ValueError, match=r"stage.splits names 'ood', but .* has \['test'\]"):
        stage(splits=["ood"]).check()
    with pytest.raises(ValueError, match="names no table"):
        stage(generations={}).check()
