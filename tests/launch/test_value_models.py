"""Value models run on the embedded task without naming a data set, and on a person's own when it is named."""

import pytest

OUT_OF_THE_BOX = {
    "reward_model": "preferences",
    "probit_reward_model": "preferences",
    "ranking_model": "rankings",
    "cost_model": "preferences",
    "cost_model_bt": "preferences",
    "conditioned_reward_model": "conditioned_preferences",
}


@pytest.mark.parametrize("algorithm", OUT_OF_THE_BOX)
def test_a_value_model_brings_its_pairs_unless_others_are_named(plan_of, algorithm):
    plan = plan_of(f"algorithm={algorithm}", "runs_dir=r")
    assert plan.config["dataset"]["path"] == f"r/tiny_help/a0/{OUT_OF_THE_BOX[algorithm]}/data"
    assert plan.config["output"] == "scorer"
    own = plan_of(f"algorithm={algorithm}", "model=hf", "model.base=x", "dataset=table", "dataset.path=y")
    assert own.config["dataset"]["path"] == "y"
    assert own.config["model"]["policy"] == "x"
    assert own.needs == ()


def test_a_model_told_what_counts_learns_the_words_for_it(plan_of):
    plan = plan_of("algorithm=conditioned_reward_model")
    assert plan.config["model"]["new_tokens"] == ["<helpful>", "<humour>"]
    [needed] = [needed for needed in plan.needs if needed.directory.name == "conditioned_preferences"]
    registry = plan_of("conditions=tiny_help").config["conditions"]["registry"]
    assert needed.config["stage"]["conditions"] == registry["policy"] == registry["reward_model"]
    assert {needed.directory.name for needed in needed.needs} == {"preferences", "humour_preferences"}


def test_only_the_models_that_a_reward_refers_to_are_built(plan_of):
    def built(*typed):
        return {needed.directory.name.rpartition("_s")[0] for needed in plan_of("algorithm=ppo", *typed).needs} - {""}

    assert built("reward=single") == {"reward_model", "cost_model"}
    assert built("reward=ensemble_probit_lcb") == {"probit_reward_model", "cost_model"}
    assert built("reward=two") == {"reward_model", "humour_model", "cost_model"}


@pytest.mark.slow
def test_an_ensemble_of_models_that_say_how_sure_they_are_trains_a_policy(plan_of, smoke_runs, without_reports):
    from rlhf_lab.launch.execute import execute

    metrics = execute(
        plan_of("debug=smoke", "algorithm=ppo", "reward=ensemble_probit_lcb", f"runs_dir={smoke_runs}", "name=probit")
    )
    assert metrics["ensemble/helpful/disagreement"] > 0
