"""An ensemble is its members, kept, and one function of them; the gold source is its function."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.models import Calibration, load_policy, new_scorer, save_model
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.functional.aggregate import lower_confidence, mean, uncertainty_weighted, worst_case
from rlhf_lab.interfaces import Aggregate
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.ensemble import Ensemble, GaussianEnsemble
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.rewards.scalar_model import ScalarModel
from rlhf_lab.types import Rollout

CPU = Hardware(device="cpu", dtype="float32", threads=1)
Folder = Callable[..., str]


@pytest.fixture(scope="module")
def written(hf_folder: Folder) -> tuple[Rollout, Template]:
    folder = hf_folder("gpt2")
    template = Template(load_tokenizer(folder), "auto")
    model = load_policy(folder, device=torch.device("cpu"), dtype="float32", seed=0)
    settings = Sampling(max_new_tokens=6, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=64)
    prompts = prompt_batch(template, [Prompt.from_text(text) for text in ("a joke", "is it safe ?")])
    return Generator(model, template, settings).generate(prompts, 3, seed=0), template


def members_of(scorer_folder: Folder) -> list[str]:
    """Other architectures, other tokenizers, other seeds."""
    return [scorer_folder("llama", 0), scorer_folder("llama", 1), scorer_folder("gpt2", 2, 40)]


@pytest.mark.parametrize(
    ("aggregate", "slow"),
    [
        (mean, lambda m: sum(m) / 3),
        (worst_case, min),
        (partial(uncertainty_weighted, weight=0.5, ddof=0),
         lambda m: sum(m) / 3 - 0.5 * sum((x - sum(m) / 3) ** 2 for x in m) / 3),
        (partial(uncertainty_weighted, weight=0.5, ddof=1),
         lambda m: sum(m) / 3 - 0.5 * sum((x - sum(m) / 3) ** 2 for x in m) / 2),
    ],
)  # fmt: skip
def test_members_are_kept_and_the_score_is_the_aggregate_of_them(
    aggregate: Aggregate, slow: Callable[[list[float]], float], written: tuple[Rollout, Template], scorer_folder: Folder
):
    rollout, template = written
    paths = members_of(scorer_folder)
    score = Ensemble(paths, 3, aggregate, "auto", 200).load(CPU, template).score(rollout)
    for k, path in enumerate(paths):
        alone = ScalarModel(path, "auto", 200).load(CPU, template).score(rollout).value
        assert_close(score.members[:, k], alone, atol=1e-6, rtol=1e-6)
    assert score.members.std(1).min() > 1e-3
    expected = torch.tensor([slow(row) for row in score.members.tolist()])
    assert_close(score.value, expected, atol=1e-5, rtol=1e-5)


def test_an_ensemble_of_one_is_its_member(written: tuple[Rollout, Template], scorer_folder: Folder):
    rollout, template = written
    path = scorer_folder("qwen2")
    alone = ScalarModel(path, "auto", 200).load(CPU, template).score(rollout)
    for aggregate in (mean, worst_case, partial(uncertainty_weighted, weight=9.0, ddof=0)):
        score = Ensemble([path], 1, aggregate, "auto", 200).load(CPU, template).score(rollout)
        assert torch.equal(score.value, alone.value)
        assert torch.equal(score.members, alone.members)


def test_a_number_of_members_that_was_not_said_is_refused():
    with pytest.raises(ValueError, match=r"reward_ensemble.k=5, but 2 members are named; set k to their number"):
        Ensemble(["a", "b"], 5, mean, "auto", 100)


def test_a_variance_of_one_member_is_refused_before_anything_is_loaded():
    with pytest.raises(
        ValueError, match=r"ddof=1 needs more than 1 members, found 1; set reward_ensemble.aggregate.ddof=0"
    ):
        Ensemble(["a"], 1, partial(uncertainty_weighted, weight=0.5, ddof=1), "auto", 100)


def test_every_member_is_checked(tmp_path: Path, scorer_folder: Folder):
    missing = str(tmp_path / "seed_1")
    ensemble = Ensemble([scorer_folder("llama"), missing], 2, mean, "auto", 100)
    with pytest.raises(ValueError, match="seed_1: no such folder"):
        ensemble.check()
    ensemble.check(promised=[missing])


def test_gold_is_its_function_of_request_and_response(written: tuple[Rollout, Template]):
    rollout, template = written
    source = Gold(lambda request, response: len(request) * 1000.0 + len(response))
    source.check()
    score = source.load(CPU, template).score(rollout)
    requests = ["a joke"] * 3 + ["is it safe ?"] * 3
    expected = [len(q) * 1000.0 + len(r) for q, r in zip(requests, rollout.responses, strict=True)]
    assert score.value.tolist() == expected
    assert score.members.tolist() == [[x] for x in expected]


def test_members_in_different_units_are_refused(
    written: tuple[Rollout, Template], scorer_folder: Folder, tmp_path: Path
):
    _, template = written
    raw = scorer_folder("llama", 0)
    shutil.copytree(raw, tmp_path / "calibrated")
    config = json.loads((tmp_path / "calibrated/config.json").read_text())
    config["score_calibration"] = {"scale": 2.0, "shift": 1.0, "method": "standardised", "fitted_on": "pairs:test"}
    (tmp_path / "calibrated/config.json").write_text(json.dumps(config))
    ensemble = Ensemble([raw, str(tmp_path / "calibrated")], 2, mean, "auto", 200)
    with pytest.raises(ValueError, match="calibrated differently"):
        ensemble.load(CPU, template)


@pytest.fixture(scope="module")
def gaussian_folder(hf_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """seed -> a model that says mean and log-variance, calibrated to twice its raw scores plus 1."""

    def make(seed: int) -> str:
        folder = tmp_path_factory.mktemp("gaussian")
        outputs = ("mean", "log_variance")
        model = new_scorer(hf_folder("gpt2"), device=torch.device("cpu"), dtype="float32", seed=seed, outputs=outputs)
        save_model(folder, model.eval(), load_tokenizer(hf_folder("gpt2")), Calibration(2.0, 1.0, "gold", "here"))
        return str(folder)

    return make


def test_members_that_say_how_sure_they_are(written: tuple[Rollout, Template], gaussian_folder: Callable[[int], str]):
    rollout, template = written
    paths = [gaussian_folder(seed) for seed in (0, 1)]
    aggregate = partial(lower_confidence, weight=0.5)
    score = GaussianEnsemble(paths, 2, aggregate, "auto", 200).load(CPU, template).score(rollout)
    [variances] = score.variances
    for k, path in enumerate(paths):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
        for i in range(len(rollout)):
            row = rollout.sequences.tokens[i][rollout.sequences.attention_mask[i]]
            with torch.no_grad():
                mean_of, log_variance = model.score(model.transformer(row[None]).last_hidden_state)[0, -1].tolist()
            assert score.members[i, k].item() == pytest.approx(2 * mean_of + 1, abs=1e-4)
            assert variances[i, k].item() == pytest.approx(4 * math.exp(log_variance), rel=1e-3)
    for value, mus, own in zip(score.value.tolist(), score.members.tolist(), variances.tolist(), strict=True):
        spread = (mus[0] - mus[1]) ** 2 / 4
        assert value == pytest.approx(sum(mus) / 2 - 0.5 * math.sqrt(sum(own) / 2 + spread), rel=1e-4)
    means = Ensemble(paths, 2, mean, "auto", 200).load(CPU, template).score(rollout)  # or their means alone
    assert_close(means.members, score.members)


def test_a_member_that_does_not_say_how_sure_it_is_is_refused(written: tuple[Rollout, Template], scorer_folder: Folder):
    ensemble = GaussianEnsemble([scorer_folder("llama")], 1, partial(lower_confidence, weight=0.5), "auto", 200)
    with pytest.raises(ValueError, match=r"does not say how sure it is; .*algorithm=probit_reward_model"):
        ensemble.load(CPU, written[1])
