"""A sweep from what was typed: its points, its name, and the points that cannot run."""

import itertools
from pathlib import Path

import pytest
from hydra.errors import HydraException

from rlhf_lab.launch.compose import ROOT, register_resolvers
from rlhf_lab.launch.main import is_sweep
from rlhf_lab.launch.multirun import ImpossiblePoints, check_points, plan_points, sweep_name
from rlhf_lab.launch.start import start_sweep
from rlhf_lab.run import RunRefused


@pytest.fixture(autouse=True)
def _resolvers() -> None:
    register_resolvers()


def places(runs: Path) -> list[str]:
    return [f"runs_dir={runs}", f"sweeps_dir={runs.parent / 'sweeps'}"]


def test_every_point_of_the_product_is_planned_once_in_a_directory_of_its_own(untouched: Path):
    plans, how = plan_points(["algorithm=ppo,rloo", "reward=single,two", "seed=range(3)", *places(untouched)])
    drawn = [(p.directory.name.split("-")[0], p.directory.name.split("-")[1], p.config["seed"]) for p in plans]
    assert drawn == list(itertools.product(["ppo", "rloo"], ["single", "two"], [0, 1, 2]))
    assert {plan.directory.parent for plan in plans} == {how.root}
    assert how.root.parent == untouched.parent / "sweeps"


def test_a_point_is_what_the_same_words_without_a_sweep_are(untouched: Path, plan_of):
    plans, _ = plan_points(["algorithm=ppo,rloo", "algorithm.kl_coef=0.1,0.2", "reward=single", *places(untouched)])
    alone = plan_of("algorithm=rloo", "algorithm.kl_coef=0.1", "reward=single", *places(untouched))
    assert plans[2].config == alone.config
    assert [need.directory for need in plans[2].needs] == [need.directory for need in alone.needs]


def test_what_is_common_need_only_fit_what_is_swept(untouched: Path):
    typed = ["algorithm=dpo,simpo", "algorithm.beta=0.1", *places(untouched)]  # ppo_lag, the default, has no beta
    plans, _ = plan_points(typed)
    assert [plan.config["algorithm"]["beta"] for plan in plans] == [0.1, 0.1]


def test_a_glob_is_every_option_that_it_matches(untouched: Path):
    plans, _ = plan_points(["algorithm=glob(dpo_*)", *places(untouched)])
    options = sorted(file.stem for file in (ROOT / "conf/algorithm").glob("dpo_*.yaml"))
    assert [plan.overrides[0] for plan in plans] == [f"algorithm={option}" for option in options]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("algorithm=glob(nothing*)", "there is no such value of algorithm"),
        ("learner.lr=interval(0,1)", "an interval has no list of values"),
        ("~tracker", "every run reads tracker"),
    ],
)
def test_what_makes_no_points_is_refused(typed: str, said: str, untouched: Path):
    with pytest.raises(ValueError, match=said):
        plan_points(["reward=single", typed, *places(untouched)])


def test_a_mistake_that_all_points_share_is_said_once(untouched: Path):
    with pytest.raises(HydraException, match="nonsense"):
        plan_points(["algorithm=ppo,rloo", "nonsense=1", *places(untouched)])


def test_a_comma_within_a_list_is_not_a_sweep(untouched: Path):
    plans, _ = plan_points(["algorithm=rloo", "reward=single", "learner.betas=[0.8,0.9]", *places(untouched)])
    assert [plan.config["learner"]["betas"] for plan in plans] == [[0.8, 0.9]]


def test_all_impossible_points_are_named_and_none_is_planned(untouched: Path):
    with pytest.raises(ImpossiblePoints) as refused:
        plan_points(["algorithm=ppo,pppo", "algorithm.kl_coef=0.1,-3", "reward=single", *places(untouched)])
    lines = str(refused.value).splitlines()
    assert sum("algorithm=pppo" in line for line in lines) == 2
    assert sum("algorithm=ppo " in line and "algorithm.kl_coef=-3" in line for line in lines) == 1
    assert not any("algorithm=ppo " in line and "kl_coef=0.1" in line for line in lines)
    assert lines[-1] == "3 of 4 points cannot run; nothing was started"


def test_what_only_some_points_can_read_is_refused_for_the_others(untouched: Path):
    with pytest.raises(ImpossiblePoints, match=r"algorithm=dpo.*kl_coef.*\n1 of 2 points"):
        plan_points(["algorithm=ppo,dpo", "reward=single", "algorithm.kl_coef=0.1", *places(untouched)])


def test_a_path_that_is_not_there_is_refused_for_its_point_before_anything_starts(untouched: Path):
    plans, _ = plan_points(["algorithm=ppo", "reward=single", "model.policy=nowhere,neither", *places(untouched)])
    with pytest.raises(ImpossiblePoints, match=r"model.policy=nowhere.*\n.*neither.*\n2 of 2 points"):
        check_points(plans)
    assert not untouched.exists()


def test_parts_that_do_not_fit_together_are_refused_for_their_point(untouched: Path):
    plans, _ = plan_points(["algorithm=ppo_lag", "reward=two", "constraint=none,mean_cost", *places(untouched)])
    with pytest.raises(ImpossiblePoints, match=r"constraint=none .*ppo_lag needs a constraint.*\n1 of 2 points"):
        check_points(plans)


def test_what_could_not_be_frozen_is_refused_by_a_forecast_too(untouched: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(RunRefused, match="two runs of the sweep would share"):
        start_sweep(["algorithm=sft", "debug=smoke", "seed=0,1", "name=same", "plan=true", *places(untouched)])
    assert "nothing is started" not in capsys.readouterr().out


def test_one_sweep_has_one_executor(untouched: Path):
    with pytest.raises(ImpossiblePoints, match="one executor"):
        plan_points(["algorithm=ppo", "reward=single", "plan=true,false", *places(untouched)])


def test_the_name_says_what_varies_and_is_that_of_the_same_command(untouched: Path):
    typed = ["algorithm=ppo,rloo", "reward=single", "algorithm.kl_coef=0.1,0.2", *places(untouched)]

    def name(*arguments: str) -> str:
        return plan_points(arguments)[1].root.name

    assert name(*typed).startswith("algorithm-kl_coef-")
    assert name(*typed) == name(*reversed(typed), "plan=true", "executor=here")
    assert name(*typed) != name(*typed, "seed=1")
    assert name(*typed, "sweep=mine") == "mine"
    assert sweep_name([]) == sweep_name(["plan=true"])


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("-m seed=0,1", True),
        ("seed=0,1 --multirun", True),
        ("seed=0", False),
        ("-m seed=0,1 hydra/launcher=submitit_slurm", False),
        ("-m hydra/sweeper=optuna", False),
        ("-m seed=0,1 --cfg job", False),
    ],
)
def test_other_launchers_and_sweepers_of_hydra_are_left_to_hydra(typed: str, ours: bool):
    assert is_sweep(typed.split()) is ours


def test_a_metric_for_a_sweeper_is_refused_where_there_is_none(untouched: Path):
    with pytest.raises(ValueError, match=r"returns=eval/x is for a sweeper .*hydra/sweeper=optuna"):
        start_sweep(["algorithm=sft", "seed=0,1", "returns=eval/x", *places(untouched)])
