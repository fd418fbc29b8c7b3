"""Every configuration file composes and is one that its run accepts; what is typed wins over what a group chose."""

import re
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate

from rlhf_lab.launch.check import locate
from rlhf_lab.launch.compose import ROOT
from rlhf_lab.launch.execute import preflight

FILES = sorted([*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "experiments").rglob("*.yaml")])
# nothing to be composed, what only a folder of a run can say, or what needs a package of its own
NOT_ALONE = {
    "constraint=none",
    "judge=none",
    "conditions=rewards_in_context",
    "stage=benchmarks",
    "stage=generalisation",
    "rollout=vllm",
}
# public data sets, but for two: tests/data/test_sources.py composes each of them
SOURCES = {
    f"dataset={path.stem}"
    for path in (ROOT / "conf/dataset").glob("*.yaml")
    if not path.stem.startswith(("table", "tiny_help", "hh_rlhf_processed", "tldr_length"))
}
OPTIONS = sorted({f"{path.parent.name}={path.stem}" for path in (ROOT / "conf").glob("*/*.yaml")} - NOT_ALONE - SOURCES)
EXPERIMENTS = sorted(
    f"experiments={path.relative_to(ROOT / 'experiments').with_suffix('')}"
    for path in (ROOT / "experiments").rglob("*.yaml")
)
SCORERS = ["scorers.reward_models=[a/b,a/b,a/b,a/b,a/b]", "scorers.cost_models=[a/b]"]
JUDGING = ["stage=judge_pairs", "dataset=tiny_help_told_pairs", "stage.criteria=[helpful]"]
TELLING = ["stage=rollout_pairs", "conditions=preferences"]
# what an option needs beside it: what only the person can say, or the kind of run that reads it
BESIDE = {
    "model=hf": ["model.base=embedded:tiny", *SCORERS],
    **{f"model=qwen2_5_{name}": SCORERS for name in ("1_5b", "7b_lora", "7b_lora_nf4")},
    "dataset=table": ["dataset.path=a/b"],
    "stage=train_offline": ["algorithm=sft"],
    "stage=train_preferences": ["algorithm=dpo"],
    "stage=score_table": ["dataset=tiny_help_preferences"],
    "stage=quadruples": ["dataset=tiny_help_scored"],
    "stage=join": ["experiments=tiny_help/conditioned_preferences"],
    "stage=ric": ["algorithm=ric"],
    "stage=judge_pairs": [*JUDGING, "judge=simulated"],
    "stage=pair_up": ["stage.generations=${artifact:tiny_help/generations}"],
    "dataset=tiny_help_multitask": ["algorithm=multitask_sft"],
    **{f"preferences={path.stem}": TELLING for path in (ROOT / "conf/preferences").glob("*.yaml")},
    "conditions=preferences": ["algorithm=pmorl"],
    "conditions=tiny_help": ["algorithm=pmorl"],
    "conditions=personalized_soups": ["stage=evaluate"],
    "objective=preferred": ["algorithm=pmorl"],
    **{f"objective={name}": ["reward=two"] for name in ("chebyshev", "morlhf", "worst_case")},
    **{f"evaluation_dataset={path.stem}": ["algorithm=dpo"] for path in (ROOT / "conf/evaluation_dataset").glob("*")},
    "reward=implicit": ["scorers.preference_policy=a/b", "stage=evaluate_scorers"],
    "stage=fit_judge": ["stage.verdicts=a/b"],
    "stage=human_ratings": ["stage.key=a/b", "stage.ratings=[a/b]"],
    "contestants=default": ["stage=arena"],
    "judge=gold": JUDGING,
    "judge=simulated": JUDGING,
    "judge=reward_model": JUDGING,
    "judge=openai": [*JUDGING, "judge.endpoint.api_key_env=null"],
    "bound=hoeffding": ["bound.low=-10", "bound.high=10"],
    "bound=empirical_bernstein": ["bound.low=-10", "bound.high=10"],
    "bound=clopper_pearson": ["constraint.cost.limit=0.1", "constraint.cost.margin=0"],
}
PREFERENCE_METHODS = ("dpo", "dpo_margin", "simpo", "modpo", "dpo_pop", "dpo_pop_dual", "simpo_pop")


def target_lines(path: Path) -> list[str]:
    return re.findall(r"_target_:\s*([\w.]+)", path.read_text())


@pytest.mark.parametrize("option", [*OPTIONS, *EXPERIMENTS])
def test_every_option_composes_into_a_run_that_can_be_built(option, plan_of, untouched):
    plan = plan_of(option, *BESIDE.get(option, []), f"runs_dir={untouched}")
    assert "${" not in yaml.safe_dump(plan.config)
    assert type(instantiate(plan.config["stage"])).__name__ == plan.config["stage"]["_target_"].rpartition(".")[2]
    if option != "stage=human_ratings":  # which reads the filled sheets before it begins
        preflight(plan)
    assert not untouched.exists()


@pytest.mark.parametrize("algorithm", PREFERENCE_METHODS)
def test_a_method_on_preferences_is_measured_on_fresh_prompts_of_the_world_or_on_its_own_data(
    algorithm, plan_of, untouched
):
    beside = [f"algorithm={algorithm}", f"runs_dir={untouched}"]
    measured = plan_of(*beside).config["stage"]["measure"]
    assert measured["dataset"]["path"] == "embedded:tiny_help"
    assert measured["rewards"] == {}
    own = plan_of(*beside, "dataset=table", "dataset.path=a/b").config["stage"]
    assert own["measure"]["dataset"] == own["dataset"]
    world = plan_of("algorithm=ppo", f"runs_dir={untouched}").config["stage"]["dataset"]
    assert measured["dataset"].keys() == world.keys()
    # the very prompts that the online methods are measured on; the world has no columns
    assert all(measured["dataset"][key] == world[key] for key in world.keys() - {"columns"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_package_directive_is_the_first_line_and_targets_exist(path):
    for number, line in enumerate(path.read_text().splitlines()):
        assert number == 0 or "@package" not in line
    for target in target_lines(path):
        assert callable(locate(target))


@pytest.mark.parametrize(
    ("algorithm", "stage"),
    [
        ("ppo", "TrainOnline"),
        ("ppo_lag", "TrainOnline"),
        ("sft", "TrainOffline"),
        ("reward_model", "TrainOffline"),
        ("cost_model", "TrainOffline"),
        *((name, "TrainOffline") for name in PREFERENCE_METHODS),
    ],
)
def test_algorithm_alone_picks_its_stage(algorithm, stage, plan_of):
    assert plan_of(f"algorithm={algorithm}").config["stage"]["_target_"].endswith(f".{stage}")


def test_algorithm_picks_whether_there_are_constraints(plan_of):
    assert "cost" in plan_of("algorithm=ppo_lag").config["algorithm"]["constraints"]
    assert "constraints" not in plan_of("algorithm=ppo").config["algorithm"]
    with pytest.raises(Exception, match="ppo_lag needs a constraint"):
        preflight(plan_of("algorithm=ppo_lag", "constraint=none"))


def test_reward_picks_its_ensemble_and_the_command_line_wins(plan_of):
    def ensemble(*typed: str) -> tuple[str, int, int]:
        helpful = plan_of(*typed).config["reward"]["sources"]["helpful"]
        return helpful["aggregate"]["_target_"].rpartition(".")[2], helpful["k"], len(helpful["members"])

    assert ensemble("reward=ensemble_uwo") == ("uncertainty_weighted", 5, 5)
    assert ensemble("reward=ensemble_wco") == ("worst_case", 5, 5)
    assert ensemble("reward=ensemble_mean") == ("mean", 5, 5)
    assert ensemble("reward=single") == ("mean", 1, 1)
    assert ensemble("reward=ensemble_uwo", "reward_ensemble=wco") == ("worst_case", 5, 5)
    assert ensemble("reward=ensemble_uwo", "reward_ensemble.k=3") == ("uncertainty_weighted", 3, 3)


def test_constraint_picks_its_bound_and_the_command_line_wins(plan_of):
    def parts(*typed: str) -> dict[str, tuple[str, str]]:
        constraints = plan_of(*typed).config["stage"]["algorithm"]["constraints"]
        return {
            name: tuple(one[part]["_target_"].rpartition(".")[2] for part in ("bound", "dual"))
            for name, one in constraints.items()
        }

    assert parts() == {"cost": ("Mean", "LogAscent")}
    assert parts("constraint=ci_cost") == {"cost": ("StudentT", "LogAscent")}
    assert parts("constraint=ci_cost", "bound=bootstrap", "dual=pid") == {"cost": ("Bootstrap", "PID")}
    assert parts("bound=student_t", "dual=fixed") == {"cost": ("StudentT", "FixedPrice")}
    assert parts("constraint=two_costs") == {"cost": ("Mean", "LogAscent"), "length": ("Mean", "LogAscent")}


def test_a_second_constraint_brings_the_score_that_it_reads(plan_of):
    stage = plan_of("constraint=two_costs", "reward=single").config["stage"]
    assert stage["rewards"].keys() == {"helpful", "cost", "length"}
    assert stage["costs"] == ["cost", "length"]


def test_a_bound_that_nothing_reads_is_refused(plan_of):
    with pytest.raises(ValueError, match="bound=student_t: this kind of run does not read bound"):
        plan_of("algorithm=ppo", "bound=student_t")


def test_default_run_needs_its_artifacts_in_an_order_in_which_they_can_be_built(plan_of):
    from rlhf_lab.launch.execute import in_order

    names = [str(needed.directory) for needed in in_order(plan_of("runs_dir=r"))]
    assert names == [
        "r/tiny_help/a0/sft",
        "r/tiny_help/a0/preferences",
        *(f"r/tiny_help/a0/reward_model_s{seed}" for seed in range(5)),
        "r/tiny_help/a0/cost_model_s0",
    ]


def test_artifacts_follow_the_artifact_seed_the_place_and_the_hardware(plan_of):
    plan = plan_of("artifact_seed=3", "seed=8", "runs_dir='my runs'", "hardware.threads=2", "reward_ensemble.k=2")
    assert plan.directory.name.startswith("ppo_lag-ensemble_uwo-s8-a3")
    assert {needed.config["artifact_seed"] for needed in plan.needs} == {3}
    assert {needed.config["hardware"]["threads"] for needed in plan.needs} == {2}
    assert {needed.directory.parents[2].name for needed in plan.needs} == {"my runs"} or {
        str(needed.directory.parents[1]) for needed in plan.needs
    } == {"my runs/tiny_help"}


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ([], "ppo_lag-ensemble_uwo-s0"),
        (["algorithm=ppo_lag", "reward=ensemble_uwo"], "ppo_lag-ensemble_uwo-s0"),
        (["reward=single", "seed=2", "algorithm=ppo"], "ppo-single-s2"),
        (["tracker=wandb", "hardware.threads=2", "artifacts=refuse", "runs_dir=x"], "ppo_lag-ensemble_uwo-s0"),
        (["algorithm.kl_coef=0.1"], "ppo_lag-ensemble_uwo-s0-algorithm.kl_coef=0.1"),
        (["seed=1", "kl=adaptive", "algorithm.clip=0.1"], "ppo_lag-ensemble_uwo-s1-algorithm.clip=0.1,kl=adaptive"),
        (["algorithm=sft"], "sft-s0"),
        (["stage=evaluate"], "evaluate-ensemble_uwo-s0"),
        (["experiments=tiny_help/reward_model", "seed=3"], "tiny_help/a0/reward_model_s3"),
        (["name=mine"], "mine"),
    ],
)
def test_default_name_says_what_was_chosen(typed, name, plan_of):
    assert plan_of(*typed).config["name"] == name


def test_long_names_are_digests_that_differ_when_the_command_does(plan_of):
    def name(steps: int) -> str:
        return plan_of(f"stage.steps={steps}", "learner.max_grad_norm=2.0", "algorithm.reward_clip=51.0").config["name"]

    assert len(name(5)) < 60
    assert name(5) != name(6)


def test_smoke_caps_what_was_not_typed(plan_of):
    plan = plan_of("debug=smoke", "stage.steps=7")
    stage = plan.config["stage"]
    assert (stage["steps"], stage["prompts_per_step"], stage["learner"]["minibatch_size"]) == (7, 8, 8)
    assert plan.config["runs_dir"] == "runs/smoke"
    assert all(needed.config["shrink"] for needed in plan.needs)
    assert plan_of("stage.steps=7").config["stage"]["prompts_per_step"] == 64


def test_smoke_leaves_small_values_alone(plan_of):
    assert plan_of("debug=smoke", "reward=single").config["reward"]["sources"]["helpful"]["k"] == 1
