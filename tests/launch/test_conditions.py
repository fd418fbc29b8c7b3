"""Runs whose prompts say what counts: composed and refused when they do not add up; measured under each condition."""

import json

import pytest

from rlhf_lab.launch.execute import execute, preflight

MEASURED = {
    f"{split}:{condition}"
    for split in ("test", "ood_domain", "ood_template", "ood_items")
    for condition in ("helpful", "humour", "helpful+humour")
}


@pytest.mark.parametrize("algorithm", ["morlhf", "pmorl", "prompting"])
def test_methods_for_several_rewards_read_both(algorithm, plan_of, untouched):
    plan = plan_of(f"algorithm={algorithm}", f"runs_dir={untouched}")
    assert {"helpful", "humour", "cost"} == plan.config["reward"]["sources"].keys()
    assert any("humour_model" in str(needed.directory) for needed in plan.needs)
    preflight(plan)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["algorithm=pmorl", "conditions=none"], r"weighs \[\].*by the weights of each prompt.*conditions=tiny_help"),
        (["algorithm=pmorl", "reward=single"], r"are \['cost', 'helpful'\]; add reward.sources.humour"),
        (["algorithm=ppo", "conditions=tiny_help"], r"conditions weigh .* add reward.sources.humour"),
        (
            ["algorithm=ppo", "conditions=tiny_help", "reward=two"],
            r"these weights would do nothing; use objective=pref",
        ),
        (["algorithm=pmorl", "objective.streams=[humour]", "conditions.per_prompt=one"], r"weighs \['helpful'\]"),
        (["algorithm=rloo", "reward.costs=[cots]"], r"reward.costs names \['cots'\]"),
        (["algorithm=rloo", "stage.samples_per_prompt=1"], r"samples_per_prompt=1, but RLOO.*to 2 or more"),
        (["algorithm=grpo", "stage.samples_per_prompt=1", "stage.prompts_per_step=64"], "but GRPO compares"),
        (["algorithm=ppo", "kl.estimator=k3"], "kl.placement=reward with kl.estimator=k3"),
    ],
)
def test_what_does_not_add_up_is_refused_before_anything_is_loaded(typed, message, plan_of, untouched):
    with pytest.raises(Exception, match=message):
        preflight(plan_of(*typed, f"runs_dir={untouched}"))
    assert not untouched.exists()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["pmorl", "prompting"])
def test_a_conditioned_run_measures_every_split_under_every_condition(
    algorithm, plan_of, smoke_runs, without_reports, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    plan = plan_of("debug=smoke", f"algorithm={algorithm}", f"runs_dir={smoke_runs}")
    execute(plan)
    last = json.loads((plan.directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name.split("/")[1] for name in last if name.startswith("eval/")} == MEASURED
    rows = [json.loads(line) for line in next(iter((plan.directory / "samples").iterdir())).read_text().splitlines()]
    assert {row["split"] for row in rows} == MEASURED
