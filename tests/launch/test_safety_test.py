"""The safety test from the command line: what it reads, what it builds, and how it refuses."""

import json

import pytest

from rlhf_lab.launch.compose import ROOT
from rlhf_lab.launch.execute import execute, in_order, preflight
from rlhf_lab.ledger import SpentPrompts


def test_it_reads_the_policy_and_the_cost_model_and_no_reward_model(plan_of, untouched):
    plan = plan_of("stage=safety_test", f"runs_dir={untouched}")
    names = [str(needed.directory.relative_to(untouched)) for needed in in_order(plan)]
    assert names == ["tiny_help/a0/sft", "tiny_help/a0/preferences", "tiny_help/a0/cost_model_s0"]
    stage = plan.config["stage"]
    assert stage["bound"]["_target_"].endswith(".StudentT")
    assert (stage["bound"]["train_inflation"], stage["bound"]["test_inflation"]) == (1, 0)
    assert stage["dataset"]["eval_size"] == 1000
    assert stage["ledger"] == f"{untouched}/safety_ledger.jsonl"
    typed = plan_of("stage=safety_test", "bound=bootstrap", "dataset.eval_size=50").config["stage"]
    assert (typed["bound"]["_target_"].rpartition(".")[2], typed["dataset"]["eval_size"]) == ("Bootstrap", 50)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["bound=mean"], "bound=mean has no confidence"),
        (["bound.test_inflation=1"], "set bound.test_size or bound.test_inflation=0"),
        (
            ["bound.test_inflation=1", "bound.test_size=100"],
            "a test has bound.train_inflation=1 bound.test_inflation=0",
        ),
        (["bound.delta=0.7"], "bound.delta=0.7: must be less than or equal to 0.5"),
        (["bound=hoeffding"], "bound.low is missing"),
        (["bound=clopper_pearson", "stage.limit=-1"], "limit and a margin between 0 and 1"),
        (["stage.split=safty"], "did you mean 'safety'?"),
        (["dataset.eval_size=20000"], "the split safety of TinyHelp gives 1 to 10000"),
        (["stage.export_anyway=true"], "stage.export names no folder"),
        ([f"stage.export={ROOT / 'conf'}"], "is there already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_tested_is_refused_before_anything_is_built(typed, said, plan_of, untouched):
    with pytest.raises(Exception) as refused:  # noqa: PT011 - Hydra wraps what a constructor says
        preflight(plan_of("stage=safety_test", *typed, f"runs_dir={untouched}"))
    assert said in f"{refused.value} {refused.value.__cause__}"
    assert not untouched.exists()


@pytest.mark.slow
def test_a_test_uses_its_prompts_up(plan_of, smoke_runs, without_reports):
    typed = ["stage=safety_test", "debug=smoke", f"runs_dir={smoke_runs}"]
    execute(plan_of(*typed, "name=tested"))
    verdict = json.loads((smoke_runs / "tested/verdict.json").read_text())
    assert verdict["n"] == 16
    built = ("cost_model_s0", "preferences", "sft")
    assert verdict["disjoint_from"] == sorted(str(smoke_runs / "tiny_help/a0" / name) for name in built)
    assert execute(plan_of(*typed, "name=tested")) == {}  # finished: the same command tests nothing again
    with pytest.raises(SpentPrompts, match="16 of these 16 prompts were tested on before"):
        execute(plan_of(*typed, "name=again", "stage.limit=100"))
    assert not (smoke_runs / "again").exists()
    with pytest.raises(SpentPrompts, match=r"these tests spent 0.1, "):  # the first test spared nothing
        execute(plan_of(*typed, "name=spending", "stage.alpha_spending=true"))


@pytest.mark.slow
def test_prompts_that_were_trained_on_are_refused_with_their_number(plan_of, smoke_runs, without_reports):
    typed = ["stage=safety_test", "debug=smoke", f"runs_dir={smoke_runs}", "name=seen"]
    with pytest.raises(ValueError, match=r"of 16 prompts .*\(preferences_test\) some were trained on: 16 by .*cost_m"):
        execute(plan_of(*typed, "stage.split=preferences_test"))
    assert not (smoke_runs / "seen").exists()
