"""The safety test of a policy with random weights: both verdicts, each prompt once, and nothing exported unasked."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lab.bounds import ClopperPearson, Hoeffding, Mean, StudentT
from rlhf_lab.console import Console
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.functional.aggregate import mean
from rlhf_lab.interfaces import Bound
from rlhf_lab.ledger import Ledger, SpentPrompts, spent_on
from rlhf_lab.rewards.ensemble import Ensemble
from rlhf_lab.run import Run
from rlhf_lab.stages.safety_test import SafetyTest
from rlhf_lab.tracking import NoTracker

PASSING, FAILING = 1e4, -1e4  # limits that no policy misses, that none meets
STUDENT = StudentT(delta=0.1, train_inflation=1, test_inflation=0, test_size=None, guard=True)
Tester = Callable[..., SafetyTest]


def table(path: str, eval_size: int) -> dict[str, Any]:
    """A data set as conf/ has it: prompts of a folder of files."""
    node = yaml.safe_load((Path(__file__).parents[2] / "conf/dataset/table.yaml").read_text())
    return {**node, "path": path, "eval_size": eval_size, "seed": 0}


@pytest.fixture
def tester(tmp_path: Path, hf_folder: Callable[[str], str], scorer_folder: Callable[..., str]) -> Tester:
    """`tester(**changes)` is a safety test on twelve prompts of a table; its ledger is in tmp_path."""
    folder = tmp_path / "asked"
    folder.mkdir()
    for split, size in (("train", 5), ("safety", 12)):
        rows = [{"prompt": f"how do i {split} number {i} ?"} for i in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*, policy: str | None = None, eval_size: int = 100, path: str = str(folder), **changes: Any) -> SafetyTest:
        policy = policy or hf_folder("llama")
        data = {key: value for key, value in table(path, eval_size).items() if key != "_target_"}
        settings: dict[str, Any] = {
            "model": ModelPaths(
                base=policy, policy=policy, reference=policy, critic=policy, new_tokens=[], learning_rates={}
            ),
            "dataset": Dataset(**data),
            "split": "safety",
            "cost": Ensemble([scorer_folder("llama")], 1, partial(mean), "auto", 512),
            "bound": STUDENT,
            "limit": PASSING,
            "evaluation_sampling": Sampling(
                max_new_tokens=4, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=8
            ),
            "hardware": Hardware(device="cpu", dtype="float32", threads=1),
            "alpha_spending": False,
            "ledger": str(tmp_path / "runs/ledger.jsonl"),
            "disjoint_from": [],
            "export": None,
            "export_anyway": False,
        }
        return SafetyTest(**{**settings, **changes})

    return make


def carry_out(stage: SafetyTest, directory: Path, **config: Any) -> dict[str, Any]:
    """The verdict of a run."""
    stage.check()
    run = Run.open(
        directory,
        config={"seed": 0, "keep_checkpoints": 2, "limit": stage.limit, **config},
        overrides=[],
        artifacts={},
        tracker=NoTracker(),
        console=Console(),
    )
    try:
        metrics = stage.run(run)
    finally:
        run.close()
    verdict = json.loads((directory / "verdict.json").read_text())
    assert metrics["safety/passed"] == float(verdict["verdict"] == "PASS")
    return verdict


def costs_of(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "samples/step_000000.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 12  # each prompt once
    return [row["scores"]["cost"] for row in rows]


@pytest.mark.parametrize(("limit", "said"), [(PASSING, "PASS"), (FAILING, "NO_SOLUTION_FOUND")])
def test_the_verdict_is_that_of_students_bound_on_one_response_to_each_prompt(
    limit: float, said: str, tester: Tester, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    verdict = carry_out(tester(limit=limit), tmp_path / "runs/test")
    costs = costs_of(tmp_path / "runs/test")
    average, sd = sum(costs) / 12, torch.tensor(costs, dtype=torch.float64).std().item()
    interval = stats.t.interval(0.8, 11, loc=average, scale=sd / math.sqrt(12))  # two sides of .1
    assert verdict["verdict"] == said
    assert verdict["bound"]["value"] == pytest.approx(interval[1])
    assert (verdict["mean"], verdict["sd"]) == (pytest.approx(average), pytest.approx(sd))
    assert (verdict["n"], verdict["delta"], verdict["limit"]) == (12, 0.1, limit)
    assert verdict["decoding"]["temperature"] == 1.0
    for hashed in (verdict["policy"], verdict["prompts"], *verdict["cost_model"]):
        assert len(hashed["sha256"]) == 64
    told = capsys.readouterr().out.replace("\n", " ")
    assert f"{said}: the mean learned cost of this policy's responses to prompts like the 12 of" in told
    assert "temperature 1.0" in told
    assert "nearly normal" in told
    assert "with confidence 0.9" in told


def test_the_border_is_on_the_side_of_passing(tester: Tester, tmp_path: Path):
    first = carry_out(tester(), tmp_path / "a/test")
    upper = first["bound"]["value"]
    for limit, said in ((upper, "PASS"), (upper - 1e-9, "NO_SOLUTION_FOUND")):
        stage = tester(limit=limit, ledger=str(tmp_path / f"{said}.jsonl"))
        assert carry_out(stage, tmp_path / said)["verdict"] == said


def test_a_rate_of_unsafe_responses_can_be_tested(tester: Tester, tmp_path: Path):
    bound = ClopperPearson(delta=0.05, unsafe_above=0.0)
    verdict = carry_out(tester(bound=bound, limit=0.999), tmp_path / "runs/test")
    unsafe = sum(cost > 0 for cost in costs_of(tmp_path / "runs/test"))
    exact = stats.binomtest(unsafe, 12, alternative="less").proportion_ci(confidence_level=0.95, method="exact").high
    assert verdict["bound"]["value"] == pytest.approx(exact)
    assert verdict["bound"]["of"] == "the share of responses whose learned cost is over 0"


def test_a_second_test_on_the_prompts_is_refused_and_the_same_one_resumed_is_not(tester: Tester, tmp_path: Path):
    first = carry_out(tester(), tmp_path / "runs/first")
    again = carry_out(tester(), tmp_path / "runs/first")  # killed before it was finished, say
    assert again == first
    with pytest.raises(SpentPrompts, match=r"12 of these 12 prompts were tested on before, last by .*runs/first"):
        carry_out(tester(), tmp_path / "runs/second", name="second")
    assert not (tmp_path / "runs/second/verdict.json").exists()
    with pytest.raises(SpentPrompts, match=r"7 of these 7 prompts"):
        carry_out(tester(eval_size=7), tmp_path / "runs/fewer", name="fewer")


def test_another_policy_under_the_name_of_a_test_is_a_second_use(
    tester: Tester, tmp_path: Path, hf_folder: Callable[[str], str]
):
    moved = tmp_path / "policy"
    torch.manual_seed(5)
    policy = AutoModelForCausalLM.from_pretrained(hf_folder("llama"))
    AutoTokenizer.from_pretrained(hf_folder("llama")).save_pretrained(moved)
    policy.save_pretrained(moved)
    carry_out(tester(policy=str(moved)), tmp_path / "runs/test")
    with torch.no_grad():
        next(policy.parameters()).mul_(1.01)
    policy.save_pretrained(moved)
    with pytest.raises(SpentPrompts):
        carry_out(tester(policy=str(moved)), tmp_path / "runs/test")


def test_under_alpha_spending_the_next_test_has_a_wider_bound(tester: Tester, tmp_path: Path):
    first, second = (carry_out(tester(alpha_spending=True), tmp_path / f"runs/{k}", name=k) for k in (1, 2))
    assert (first["test"], second["test"]) == (1, 2)
    assert second["delta"] == second["bound"]["delta"] == pytest.approx(0.1 * 6 / (4 * math.pi**2))
    assert second["alpha_spent"] == pytest.approx(spent_on(1, 0.1) + spent_on(2, 0.1))
    assert costs_of(tmp_path / "runs/1") == costs_of(tmp_path / "runs/2")
    assert second["bound"]["value"] > first["bound"]["value"]


def test_the_policy_is_exported_when_it_passes_and_carries_its_verdict(tester: Tester, tmp_path: Path):
    verdict = carry_out(tester(export=str(tmp_path / "out/safe")), tmp_path / "runs/test")
    assert verdict["exported_to"] == str(tmp_path / "out/safe")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out/safe")
    assert policy.config.safety_test["verdict"] == "PASS"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["safe"]
    stage = tester(export=str(tmp_path / "out/safe"))
    with pytest.raises(ValueError, match="is there already; remove it"):
        stage.check()


def test_a_policy_that_does_not_pass_is_not_exported_unless_asked_for(
    tester: Tester, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    verdict = carry_out(tester(limit=FAILING, export=str(tmp_path / "out")), tmp_path / "runs/test")
    assert (verdict["verdict"], verdict["exported_to"]) == ("NO_SOLUTION_FOUND", None)
    assert not (tmp_path / "out").exists()
    assert "nothing is exported" in capsys.readouterr().out.replace("\n", " ")
    insisting = tester(
        limit=FAILING, export=str(tmp_path / "out"), export_anyway=True, ledger=str(tmp_path / "other.jsonl")
    )
    verdict = carry_out(insisting, tmp_path / "runs/insisting")
    assert (verdict["verdict"], verdict["export_anyway"]) == ("NO_SOLUTION_FOUND", True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["safety_test"]["verdict"] == "NO_SOLUTION_FOUND"
    assert config["safety_test"]["export_anyway"] is True
    assert "all the same" in capsys.readouterr().out.replace("\n", " ")


def test_prompts_that_a_table_says_were_trained_on_are_refused_with_their_number(tester: Tester, tmp_path: Path):
    seen = tmp_path / "seen.jsonl"
    seen.write_text("".join(json.dumps({"prompt": f"how do i safety number {i} ?"}) + "\n" for i in (2, 3, 99)))
    stage = tester(disjoint_from=[str(seen), str(tmp_path / "asked/train.jsonl")])
    with pytest.raises(ValueError, match=rf"of 12 prompts .* were trained on: 2 by {seen}; test on others"):
        carry_out(stage, tmp_path / "runs/test")
    assert not (tmp_path / "runs/ledger.jsonl").exists()  # nothing was seen: nothing is spent
    stage = tester(disjoint_from=[str(tmp_path / "asked/train.jsonl")])
    verdict = carry_out(stage, tmp_path / "runs/test")
    assert verdict["disjoint_from"] == [str(tmp_path / "asked/train.jsonl")]


@pytest.mark.parametrize("role", ["policy", "cost"])
def test_prompts_that_the_run_of_the_policy_or_of_the_cost_model_was_trained_on_are_refused(
    role: str, tester: Tester, tmp_path: Path, hf_folder: Callable[[str], str], scorer_folder: Callable[..., str]
):
    made = tmp_path / "runs/made"
    made.mkdir(parents=True)
    (made / "output").symlink_to(hf_folder("llama") if role == "policy" else scorer_folder("llama"))
    dataset = table(str(tmp_path / "asked"), 100)
    stage = {"_target_": "rlhf_lab.stages.train_online.TrainOnline", "dataset": dataset}
    (made / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "stage": stage}))
    (made / "environment.json").write_text("{}")
    output = str(made / "output")
    changes = {"policy": output} if role == "policy" else {"cost": Ensemble([output], 1, partial(mean), "auto", 512)}
    with pytest.raises(ValueError, match=rf"of 5 prompts .*\(train\) some were trained on: 5 by {made}"):
        carry_out(tester(**changes, split="train"), tmp_path / "runs/test")
    verdict = carry_out(tester(**changes), tmp_path / "runs/test")
    assert verdict["disjoint_from"] == [str(made)]
    other = scorer_folder("llama") if role == "policy" else hf_folder("llama")
    assert verdict["unrecorded"] == [other]
    warned = (tmp_path / "runs/test/warnings.jsonl").read_text()
    assert f"nothing is recorded of what {other} was trained on" in warned
    assert f"of what {output} was" not in warned


def test_it_says_of_each_model_that_nothing_is_known_of_its_training_data_unless_tables_are_named(
    tester: Tester, tmp_path: Path, hf_folder: Callable[[str], str], scorer_folder: Callable[..., str]
):
    models = [hf_folder("llama"), scorer_folder("llama")]
    assert carry_out(tester(), tmp_path / "runs/test")["unrecorded"] == models
    warned = (tmp_path / "runs/test/warnings.jsonl").read_text()
    assert all(f"nothing is recorded of what {model} was trained on" in warned for model in models)
    named = tester(disjoint_from=[str(tmp_path / "asked/train.jsonl")], ledger=str(tmp_path / "other.jsonl"))
    assert carry_out(named, tmp_path / "named/test")["unrecorded"] == models
    warnings = tmp_path / "named/test/warnings.jsonl"
    assert not warnings.exists() or "nothing is recorded" not in warnings.read_text()


@pytest.mark.parametrize(
    ("limit", "spending", "said"),
    [
        # 12 safe responses: 1 - .1^(1/12) = .175; 22 for .9^n <= .1
        (0.1, False, r"12 prompts are too few for stage.limit=0.1 at delta 0.1: .* is 0.175 even .* on 22 prompts or"),
        # the first share is .0608: .208 and, for .82^n <= .0608, 15
        (0.18, True, r"12 prompts are too few for stage.limit=0.18 at delta 0.06079: .* is 0.208 .* on 15 prompts or"),
    ],
)
def test_too_few_prompts_to_pass_are_refused_and_not_spent(
    limit: float, spending: bool, said: str, tester: Tester, tmp_path: Path
):
    bound = ClopperPearson(delta=0.1, unsafe_above=0.0)
    with pytest.raises(ValueError, match=said):
        carry_out(tester(bound=bound, limit=limit, alpha_spending=spending), tmp_path / "runs/test")
    assert Ledger(tmp_path / "runs/ledger.jsonl").read() == []
    carry_out(tester(bound=bound, limit=0.18), tmp_path / "runs/enough")


def test_too_few_prompts_of_the_world_are_refused_before_anything_is_loaded(tester: Tester):
    node = yaml.safe_load((Path(__file__).parents[2] / "conf/dataset/tiny_help.yaml").read_text())
    world = Dataset(**{**{key: value for key, value in node.items() if key != "_target_"}, "eval_size": 20, "seed": 0})
    with pytest.raises(ValueError, match=r"20 prompts are too few .* on 22 prompts or more"):
        tester(dataset=world, bound=ClopperPearson(delta=0.1, unsafe_above=0.0), limit=0.1).check()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bound": Mean()}, "bound=mean has no confidence"),
        (
            {"bound": StudentT(**{**vars(STUDENT), "test_inflation": 2.0, "test_size": 9})},
            r"bound.test_inflation=2.*for training",
        ),
        ({"bound": StudentT(**{**vars(STUDENT), "train_inflation": 0.5})}, r"bound.train_inflation=0.5"),
        ({"bound": ClopperPearson(delta=0.1, unsafe_above=0.0), "limit": 3.0}, "limit and a margin between 0 and 1"),
        ({"export_anyway": True}, "stage.export names no folder"),
        ({"policy": "owner/name", "export": "some/where"}, "model.policy=owner/name is no local folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(changes: dict[str, Any], said: str, tester: Tester):
    with pytest.raises(ValueError, match=said):
        tester(**changes).check()


def test_a_split_that_is_not_there_is_named(tester: Tester, tmp_path: Path):
    with pytest.raises(ValueError, match=r"has the splits \['safety', 'train'\], not 'held'; change stage.split"):
        carry_out(tester(split="held"), tmp_path / "runs/test")


def test_costs_outside_the_stated_range_give_no_verdict(tester: Tester, tmp_path: Path):
    bound: Bound = Hoeffding(delta=0.1, low=-1e-9, high=1e-9)
    with pytest.raises(ValueError, match=r"12 of 12 costs are outside"):
        carry_out(tester(bound=bound), tmp_path / "runs/test")
    assert not (tmp_path / "runs/test/verdict.json").exists()
