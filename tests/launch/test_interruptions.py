"""Every method and every kind of run, interrupted and continued, ends as one that was left in peace."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import parquet

from rlhf_lab import stopping
from rlhf_lab.engine.accounting import CLOCKED
from rlhf_lab.launch.compose import ROOT, Plan
from rlhf_lab.launch.execute import RunFailed, execute
from rlhf_lab.run import Run, is_finished
from rlhf_lab.stopping import SIGNALS, Stopped
from tests.marking import at_release

pytestmark = pytest.mark.slow

# held-out responses to one split are most of the time of a run; "two_costs" has two
TRAINED = {
    "TrainOnline": [
        "stage.steps=5",
        "stage.checkpoint_every=2",
        "stage.evaluate_every=4",
        "dataset.eval_splits=[test]",
    ],
    "TrainOffline": [
        *("stage.epochs=3", "stage.checkpoint_every=2", "stage.evaluate_every=4"),
        "evaluation_dataset.eval_splits=[test]",
    ],
    "RiC": ["stage.checkpoint_every=2"],
}
IN_PIECES = {
    "stage.prompts_per_shard": "4",
    "stage.rows_per_shard": "8",
    "stage.pairs_per_shard": "32",
    "stage.grid": "3",
}
METHODS = sorted({path.stem for path in (ROOT / "conf/algorithm").glob("*.yaml")} - {"best_of_n", "soup"})  # in pieces
# what runs of PPO-Lagrangian log, and those that do not sample, whatever reads it
CONTRACT = {
    *("objective/kl", "objective/scores", "objective/rlhf_reward", "objective/entropy", "policy/approxkl_avg"),
    *("policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg", "val/ratio"),
    *("val/num_eos_tokens", "rewards/helpful/mean", "rewards/helpful/std", "ensemble/helpful/mean"),
    *("ensemble/helpful/std", "ensemble/helpful/min", "ensemble/helpful/penalty", "ensemble/helpful/disagreement"),
    *("cost/cost/mean", "cost/cost/frac_violating", "lagrange/cost/lambda", "lagrange/cost/violation"),
    *("lagrange/cost/limit", "gold/helpfulness/mean", "completions/mean_length", "completions/truncated_ratio"),
    *("lr", "episode"),
    *(f"{what}/{phase}" for what in ("time", "time/share", "memory") for phase in ("rollout", "scoring", "update")),
    *("time/evaluation", "memory/evaluation", "memory/peak", "throughput/step"),
    *("throughput/rollout", "throughput/scoring", "throughput/update"),
}
OFFLINE_CONTRACT = {
    *(f"{what}/{phase}" for what in ("time", "time/share", "memory") for phase in ("update", "evaluation")),
    *("memory/peak", "throughput/update", "throughput/step", "lr", "episode"),
}
# settings with a state of their own, which no method has by default
SETTINGS = {
    "pid": ["algorithm=ppo_lag", "dual=pid", "kl=adaptive", "constraint.cost.delay=1"],
    "two_costs": [
        *("algorithm=ppo_lag", "constraint=two_costs", "reward=ensemble_mean"),
        "dataset.eval_splits=[test,ood_items]",
    ],
    "bootstrap": ["algorithm=ci_lag", "bound=bootstrap", "kl=adaptive"],
    "chi2": ["algorithm=grpo", "kl=chi2"],
    "in_loss": ["algorithm=rloo", "kl=in_loss", "learner.epochs=2"],
    "schedule": ["algorithm=ppo", "kl=adaptive", "learner.schedule=cosine", "learner.warmup=2", "learner.epochs=2"],
    "ptx": ["algorithm=ppo_lag", "+dataset@stage.demonstrations=tiny_help_demonstrations", "stage.ptx_coef=1.0"],
    "average": ["algorithm=dpo_pop", "algorithm.ema_decay=0.9"],
    "packed": ["algorithm=sft", "stage.pack_tokens=64"],
    "measured": ["algorithm=dpo_margin", "stage.evaluate_every=2"],
    "shared_critic": ["algorithm=ppo_lag", "model.critic=shared"],
}
KINDS = {
    "annotate": ["stage=annotate"],
    "rollout_pairs": ["experiments=tiny_help/told_pairs"],
    "judge_pairs": ["experiments=tiny_help/judged_preferences"],
    "rank": ["stage=rank", "stage.ranked_by=helpfulness"],
    "score_table": ["stage=score_table", "dataset=tiny_help_preferences", "reward=single"],
    "best_of_n": ["algorithm=best_of_n", "stage.samples_per_prompt=4"],
    "ric": ["algorithm=ric_online"],
    "soup": ["algorithm=soup"],
}


def metrics(run: Path) -> list[dict]:
    """The lines of a run's log, but for the time that they took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKED)} for line in lines]


def left_behind(run: Path) -> dict[str, object]:
    """Everything that a run measured or made, but for its own name in tables."""
    found = [path for kind in ("samples", "data", "policy", "scorer") for path in (run / kind).rglob("*")]
    return {str(path.relative_to(run)): content(path) for path in sorted(found) if path.is_file()}


def content(path: Path) -> object:
    if path.suffix != ".parquet" or "run" not in parquet.read_schema(path).names:
        return path.read_bytes()
    return parquet.read_table(path).drop_columns("run").to_pylist()


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.fixture
def listening() -> Iterator[None]:
    """This process hears requests to stop, as a worker does."""
    before = [signal.getsignal(number) for number in SIGNALS]
    stopping.listen()
    yield
    stopping.forget()
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def interrupted(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail after the line of step 3, which a checkpoint after 2 does not know; then be asked to stop during step 4."""
    log = Run.log

    def fail(run: Run, step: int, values: dict[str, float]) -> None:
        log(run, step, values)
        if run.directory == plan.directory and step == 3:
            raise RuntimeError("interrupted")

    def ask(run: Run, step: int, values: dict[str, float]) -> None:
        log(run, step, values)
        if run.directory == plan.directory and step == 3:
            os.kill(os.getpid(), signal.SIGUSR2)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", fail)
        with pytest.raises(RunFailed, match="interrupted"):
            execute(plan)
        assert status(plan.directory)["state"] == "failed"
        patched.setattr(Run, "log", ask)
        with pytest.raises(Stopped, match="SIGUSR2"):
            execute(plan)
    stopping.forget()
    assert status(plan.directory)["state"] == "stopped"
    assert status(plan.directory)["progress"]["step"] == 3
    assert (plan.directory / "checkpoints/step_000003").is_dir()


def check(name: str, typed: list[str], plan_of, smoke_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run that was left in peace, which the other one equals; what does not learn step by step has no other."""
    stage = plan_of(*typed, "debug=smoke").config["stage"]
    kind = stage["_target_"].rpartition(".")[2]
    taken = {t.split("=")[0] for t in typed}
    if kind == "TrainOffline" and stage["measure"] is None:  # value models are not sampled from
        taken |= {"evaluation_dataset.eval_splits"}
    others = [setting for setting in TRAINED.get(kind, []) if setting.split("=")[0] not in taken]
    typed = ["debug=smoke", *others, *typed, f"runs_dir={smoke_runs}"]
    whole, broken = (plan_of(*typed, f"name=interruptions_{name}_{how}") for how in ("whole", "broken"))
    execute(whole)
    assert is_finished(whole.directory)
    if kind not in TRAINED:
        return whole.directory
    interrupted(broken, monkeypatch)
    execute(broken)
    assert is_finished(broken.directory)
    assert status(broken.directory)["sittings"] == 3
    assert metrics(whole.directory)[-1]["step"] >= 4
    assert metrics(broken.directory) == metrics(whole.directory)
    assert left_behind(broken.directory) == left_behind(whole.directory)
    assert left_behind(whole.directory)
    return whole.directory


# one of each kind of run; the others are of these kinds
@pytest.mark.parametrize("method", at_release(METHODS, unless=("sft", "reward_model", "ppo_lag", "ric_online")))
def test_every_method_runs_and_continues_as_if_it_had_not_been_interrupted(
    method, plan_of, smoke_runs, without_reports, listening, monkeypatch
):
    run = check(method, [f"algorithm={method}"], plan_of, smoke_runs, monkeypatch)
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]).keys()
    if method == "ppo_lag":
        assert CONTRACT - logged == set()
    if method in ("sft", "dpo", "ric"):
        assert OFFLINE_CONTRACT - logged == set()


@pytest.mark.parametrize("name", at_release(SETTINGS, unless=("two_costs", "average", "packed", "shared_critic")))
def test_what_has_a_state_of_its_own_continues_too(name, plan_of, smoke_runs, without_reports, listening, monkeypatch):
    if name == "shared_critic":  # the engine reads its values on the way, so nobody asks for them
        monkeypatch.setattr("rlhf_lab.engine.score.critic_values", None)
    check(name, SETTINGS[name], plan_of, smoke_runs, monkeypatch)


@pytest.mark.parametrize("kind", at_release(KINDS, unless=("annotate", "judge_pairs", "score_table", "best_of_n")))
def test_work_in_pieces_stops_between_two_and_continues_with_the_next(
    kind, plan_of, smoke_runs, without_reports, listening, monkeypatch
):
    """A request is heard while the second piece is made; the first two are then there and not made again."""
    known = plan_of(*KINDS[kind], "debug=smoke").config["stage"]
    cuts = [f"{key}={value}" for key, value in IN_PIECES.items() if key.removeprefix("stage.") in known]
    typed = ["debug=smoke", *cuts, *KINDS[kind], f"runs_dir={smoke_runs}"]
    whole, broken = (plan_of(*typed, f"name=pieces_{kind}_{how}") for how in ("whole", "broken"))
    execute(whole)
    made: list[Path] = []
    make = Run.make

    def ask(run: Run, relative: str, fill) -> None:
        make(run, relative, fill)
        if run.directory == broken.directory and relative.startswith(("shards/", "lattice/")):
            made.append(run.directory / relative)
            if len(made) == 2:
                (run.directory / "stop").touch()

    monkeypatch.setattr(Run, "make", ask)
    with pytest.raises(Stopped, match="the file"):
        execute(broken)
    assert len(made) == 2
    assert status(broken.directory)["state"] == "stopped"
    assert not (broken.directory / "stop").exists()
    before = {place: place.stat().st_mtime_ns for place in made}
    execute(broken)
    assert len(made) > 3
    assert len(set(made)) == len(made)
    assert {place: place.stat().st_mtime_ns for place in before} == before
    assert metrics(broken.directory) == metrics(whole.directory)
    assert left_behind(broken.directory) == left_behind(whole.directory)
