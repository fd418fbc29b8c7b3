"""What a person gets wrong is refused at once, in one line that names the key, the value and what is allowed."""

import json

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rlhf_lab.launch.compose import ROOT
from rlhf_lab.launch.execute import preflight
from rlhf_lab.launch.explain import explain
from rlhf_lab.launch.main import with_own_data


@pytest.fixture
def refusal(plan_of, untouched):
    """`refusal(*arguments)` is what a person reads, once it is sure that nothing was left behind."""

    def refuse(*arguments: str) -> str:
        try:
            preflight(plan_of(*with_own_data([*arguments, f"runs_dir={untouched}"])))
        except (HydraException, OmegaConfBaseException) as error:
            said = explain(error, arguments)
        except ValueError as error:
            said = str(error)
        else:
            raise AssertionError(f"{arguments} was accepted")
        assert not untouched.exists()
        assert "\n" not in said
        return said

    return refuse


def save_tiny(folder, weights: str | None, config: bool = True):
    folder.mkdir()
    if config:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if weights:
        (folder / weights).write_bytes(b"0")
    return folder


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["algorithm=pppo"], ["algorithm=pppo", "did you mean 'ppo'?", "reward_model"]),
        (["experiments=tiny_help/stf"], ["experiments=tiny_help/stf", "'tiny_help/sft'"]),
        (["algorithm.kl_cof=0.1"], ["algorithm.kl_cof", "'algorithm.kl_coef'"]),
        (["algorithm=ppo", "algorithm.lamda=0.9"], ["algorithm.lamda", "'algorithm.lam'"]),
        (["stge=evaluate"], ["stge", "'stage'"]),
        (["nonsense=1"], ["nonsense", "there are: algorithm, artifact_seed"]),
        (["+algorithm.gamma=1"], ["algorithm.gamma is there already"]),
        (["hardware=slurm_cpu", "executor.extra={nice: 5}"], ["executor.extra", "+executor.extra.<key>="]),
        (["~algorithm.gama"], ["algorithm.gama", "'algorithm.gamma'"]),
        (["+learner.lrr=1"], ["learner.lrr", "'lr'"]),
        (["reward_ensemble.aggregate.wieght=1"], ["aggregate.wieght", "aggregate.weight'"]),
        (["+reward_ensemble.aggregate.wieght=1"], ["aggregate.wieght", "'weight'"]),
        (["~algorithm.gamma"], ["algorithm.gamma is missing; set algorithm.gamma="]),
        (["algorithm.kl_coef=abc"], ["algorithm.kl_coef='abc'", "number"]),
        (["algorithm.kl_coef='0.1'"], ["algorithm.kl_coef='0.1'", "number"]),
        (["stage.steps=1.5"], ["stage.steps=1.5", "integer"]),
        (["algorithm.gamma=1.5"], ["algorithm.gamma=1.5", "less than or equal to 1"]),
        (["learner.lr.policy=-1"], ["learner.lr", "-1", "greater than"]),
        (["hardware.dtype=float31"], ["hardware.dtype='float31'", "'float32' or 'bfloat16'"]),
        (["kl.estimator=k4"], ["kl.estimator='k4'", "'k1'"]),
        (["algorithm.objective=5"], ["algorithm.objective=5", "Objective", "_target_"]),
        (["artifacts=maybe"], ["artifacts='maybe'", "'build' or 'refuse'"]),
        (["algorithm=sft", "sampling.temperature=2"], ["sampling.temperature=2", "does not read sampling"]),
        (["algorithm=sft", "reward=single"], ["reward=single", "does not read reward"]),
        (["stage=train_offline", "algorithm=ppo"], ["algorithm", "PPO", "OfflineAlgorithm", "reads"]),
        (["stage=train_online", "algorithm=sft"], ["algorithm", "SFT", "OnlineAlgorithm", "prepare"]),
        (["model=hf"], ["model.base is missing"]),
        (["dataset=table"], ["dataset.path is missing"]),
        (["algorithm.kl_coef=${learner.nope}"], ["${learner.nope}", "no learner.nope"]),
        (["algorithm=["], ["algorithm=[", "key=value"]),
        (["algorithm"], ["algorithm: not of the form key=value"]),
        (["algorithm=ppo,ppo_lag"], ["algorithm=ppo,ppo_lag", "-m"]),
        (["objective.weights.helpful=1,2"], ["-m", "'objective.weights.helpful=[1,2]'"]),
        (["model.policy=/nope/model"], ["model.policy=/nope/model", "no such folder", "hub id"]),
        (["dataset.path=/nope/data.jsonl"], ["dataset.path=/nope/data.jsonl", "no such file", "hub id"]),
        (["dataset.path=embedded:elsewhere"], ["embedded:elsewhere", "embedded:tiny_help"]),
        (["learner.minibatch_size=48"], ["64", "48", "divide"]),
        (["sampling.temperature=0"], ["temperature=0", "a temperature above 0"]),
        (["sampling.top_k=5", "rollout=continuous_batching"], ["sampling.top_k=5", "rollout=built_in, or top_k=0"]),
        (["+objective.weights.humour=1"], ["humour", "['cost', 'helpful']", "reward.sources.humour"]),
        (["~objective.weights.helpful"], ["objective.weights is empty", "objective.weights.helpful=1"]),
        (["constraint=none"], ["algorithm=ppo_lag needs a constraint", "algorithm=ppo"]),
        (["kl.placement=loss"], ["kl.placement=loss", "k1", "kl.estimator=k2"]),
        (["algorithm._target_=os.system"], ["os.system", "rlhf_lab"]),
        (["learner._target_=rlhf_lab.engine.learner.Lerner"], ["rlhf_lab.engine.learner.Lerner", "does not exist"]),
        (["reward_ensemble.members=[a/b]", "reward_ensemble.k=3"], ["reward_ensemble.k=3", "1 members"]),
        (["artifacts=refuse"], ["is not there", "build it with: python launch.py experiments=tiny_help/"]),
        (["stage.ptx_coef=0.5"], ["stage.ptx_coef=0.5", "stage.demonstrations"]),
        (["seed=one"], ["seed='one'", "integer"]),
        (["algorithm=sft", "learner.epochs=2"], ["learner.epochs=2", "stage.epochs"]),
        (["dataset.columns.promt=question"], ["dataset.columns.promt", "dataset.columns.prompt"]),
        (
            ["+dataset@stage.demonstrations=tiny_help_demonstrations"],
            ["stage.demonstrations are named", "stage.ptx_coef=0"],
        ),
        (["dataset.train_size=null"], ["dataset.train_size is null"]),
        (["stage.better_by=beauty", "stage=annotate"], ["stage.better_by=beauty", "['cost', 'helpfulness', 'humour']"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_named_with_what_is_allowed(typed, said, refusal):
    message = refusal(*typed)
    for part in said:
        assert part in message


def test_every_mistake_is_named_at_once(plan_of):
    with pytest.raises(ValueError, match=r"(?s)algorithm.gamma=2.*\n.*|learner.epochs=0") as refused:
        plan_of("algorithm.gamma=2", "learner.epochs=0", "+kl.spare=1")
    lines = str(refused.value).splitlines()
    assert sorted(line.split("=")[0].split(" ")[0] for line in lines) == [
        "algorithm.gamma",
        "kl.spare",
        "learner.epochs",
    ]


@pytest.mark.parametrize(
    ("weights", "config", "said"),
    [(None, False, "no config.json"), (None, True, "no *.safetensors"), ("pytorch_model.bin", True, "pickles")],
)
def test_model_folders_that_cannot_be_loaded_safely(weights, config, said, refusal, tmp_path):
    folder = save_tiny(tmp_path / "model", weights, config)
    message = refusal(f"model.policy={folder}")
    assert said in message
    assert f"model.policy={folder}" in message


def test_data_of_an_unknown_kind(refusal, tmp_path):
    (tmp_path / "data.txt").write_text("hello")
    assert ".jsonl, .json, .csv, .parquet, .arrow" in refusal(f"dataset.path={tmp_path / 'data.txt'}")
    (tmp_path / "empty").mkdir()
    assert "holds no file of the kinds" in refusal(f"dataset.path={tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("typed", "added"),
    [
        (["dataset.path=/d.jsonl"], ["dataset=table"]),
        (["seed=1", "dataset.path=owner/name"], ["dataset=table"]),
        (["dataset=pku_saferlhf", "dataset.path=/d"], []),
        (["experiments=tiny_help/sft", "dataset.path=/d"], []),
        (["dataset.path=embedded:tiny_help"], []),
        (["seed=1"], []),
    ],
)
def test_own_data_are_a_table_and_that_is_said(typed, added, capsys):
    assert with_own_data(typed) == [*added, *typed]
    assert ("dataset=table" in capsys.readouterr().out) == bool(added)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["algorithm.kl_cof=0.1"], "did you mean 'algorithm.kl_coef'?"),
        (["algorithm.gamma=1.5"], "algorithm.gamma=1.5: must be less than or equal to 1"),
        (["dataset.path=/nope.jsonl"], "no such file or folder"),
    ],
)
def test_the_command_line_refuses_in_one_line_and_leaves_nothing(typed, said, command_line, tmp_path):
    answer = command_line(*typed, f"runs_dir={tmp_path / 'runs'}")
    assert answer.returncode == 2
    assert said in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
    assert "Traceback" not in answer.stderr + answer.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_offers_the_options_and_cfg_job_shows_the_values(command_line):
    said = command_line("--help").stdout
    for group in ("algorithm", "reward"):
        options = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        assert f"{group}: {', '.join(options)}\n" in said
    assert "python launch.py algorithm=ppo_lag reward=ensemble_uwo" in said
    shown = command_line("algorithm=ppo", "seed=7", "--cfg", "job").stdout
    assert "seed: 7\n" in shown
    assert "rlhf_lab.algorithms.ppo.PPO" in shown
    assert "hydra:" not in shown


def test_nothing_is_offered_that_is_not_an_option():
    assert not list((ROOT / "conf").rglob("_*.yaml"))


def test_a_table_without_the_column_is_refused_before_anything_is_built(refusal, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"question": "why ?"}\n{"question": "how ?"}\n')
    said = refusal(f"dataset.path={tmp_path / 'asked.jsonl'}")
    assert "has the columns ['question']" in said
    assert "dataset.columns.prompt=<column>" in said
    said = refusal(
        "algorithm=cost_model", f"dataset.path={tmp_path / 'asked.jsonl'}", "dataset.columns.prompt=question"
    )
    assert "'response_0'" in said
