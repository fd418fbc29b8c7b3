"""Runs that begin where others end: rejection-sampled SFT on the best of n, soups of policies of one reward each."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_lab.data.tables import read_table
from rlhf_lab.launch.check import BadConfig
from rlhf_lab.launch.compose import in_order
from rlhf_lab.launch.execute import execute, preflight


def needed(plan) -> list[str]:
    return [one.directory.name for one in in_order(plan)]


def test_rejection_sft_starts_from_the_policy_that_was_sampled(plan_of, untouched):
    plan = plan_of("algorithm=rejection_sft", f"runs_dir={untouched}")
    preflight(plan)
    assert needed(plan)[-1] == "best_of_n_train"
    table = Path(plan.config["stage"]["dataset"]["path"])
    [made] = [one for one in in_order(plan) if one.directory.name == "best_of_n_train"]
    assert table == made.output / "best.parquet"
    assert plan.config["stage"]["model"]["policy"] == made.config["stage"]["model"]["policy"]


def test_a_soup_needs_no_artifacts_of_its_own_when_policies_are_named(plan_of, untouched):
    plan = plan_of("algorithm=soup", f"runs_dir={untouched}")
    preflight(plan)
    assert {"ppo_helpful", "ppo_humour"} < set(needed(plan))
    named = plan_of("algorithm=soup", "stage.policies=[/a,/b]", f"runs_dir={untouched}")
    assert {"ppo_helpful", "ppo_humour"}.isdisjoint(needed(named))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["stage.weights=[0.5,0.6]"], r"stage.weights=\[0.5, 0.6\] add up to 1.1; they must add up to 1"),
        (["stage.weights=[1]"], r"stage.weights has 1 entries for 2 stage.policies"),
        (["stage.policies=[/nope/a,/nope/b]"], r"stage.policies: no such folder: /nope/a"),
    ],
)
def test_soups_that_cannot_be_made_are_refused_before_anything_is_built(plan_of, untouched, typed, said):
    with pytest.raises(ValueError, match=said):
        preflight(plan_of("algorithm=soup", *typed, f"runs_dir={untouched}"))
    assert not untouched.exists()


@pytest.mark.parametrize("typed", ["stage.weights=[1.5,-0.5]", "stage.space=products", "stage.grid=0"])
def test_soups_are_typed(plan_of, untouched, typed):
    with pytest.raises(BadConfig, match=typed.split("=")[0]):
        plan_of("algorithm=soup", typed, f"runs_dir={untouched}")


@pytest.mark.slow
def test_the_best_of_n_is_learnt_from(plan_of, smoke_runs, without_reports):
    plan = plan_of("debug=smoke", "algorithm=rejection_sft", f"runs_dir={smoke_runs}")
    metrics = execute(plan)
    assert metrics["eval/test/loss/nll"] > 0
    rows = read_table(Path(plan.config["stage"]["dataset"]["path"]))
    assert len(rows) <= 64
    assert {row["split"] for row in rows} == {"train"}
    before, after = (load_file(Path(p) / "model.safetensors") for p in (plan.config["model"]["policy"], plan.output))
    moved = [(after[name] - before[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 0.1  # from the policy that was sampled, not from random weights


@pytest.mark.slow
def test_a_soup_of_two_trained_policies_is_measured_on_the_whole_lattice(plan_of, smoke_runs, without_reports):
    plan = plan_of("debug=smoke", "algorithm=soup", "stage.grid=2", f"runs_dir={smoke_runs}")
    execute(plan)
    lines = [json.loads(line) for line in (plan.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["soup/weight/0"] for line in lines] == [0, 0.5, 1, 0.5]
    assert [line["soup/weight/1"] for line in lines] == [1, 0.5, 0, 0.5]
    assert {k: v for k, v in lines[1].items() if k != "step"} == {k: v for k, v in lines[3].items() if k != "step"}
    assert lines[0]["eval/test/rewards/humour/mean"] != lines[2]["eval/test/rewards/humour/mean"]
