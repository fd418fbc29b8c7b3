"""What a command would start: from real plans, and runs that were done before; nothing may be written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rlhf_lab.launch.calibration import Calibration, Measured, kind
from rlhf_lab.launch.compose import Plan, in_order
from rlhf_lab.launch.forecast import show
from rlhf_lab.launch.history import Estimate
from rlhf_lab.launch.multirun import Launching
from rlhf_lab.launch.outlook import EarlierRuns, described, forecast
from rlhf_lab.launch.trial import NotTried, Trial, shortened, units_of
from rlhf_lab.launch.weights import UnknownWeights, least_memory_mib, parameters

SECONDS = {"SFT": 100.0, "Annotate": 40.0, "RewardModel": 10.0, "CostModel": 20.0, "PPOLagrangian": 50.0}


class Known:
    """Everything takes what is said of its method; what is not named is unknown."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def estimate(self, plan: Plan) -> Estimate | None:
        method = described(plan.config)["method"]
        if method not in self.seconds:
            return None
        taken = self.seconds[method]
        return Estimate(
            seconds=taken, least=taken, most=taken,
            memory_mib=700, device_memory_mib=0, trust="measured", source=f"a {method}",
        )  # fmt: skip


@pytest.fixture
def plans(plan_of, untouched) -> list[Plan]:
    """Two seeds of the main job; nothing is there."""
    return [plan_of("algorithm=ppo_lag", "reward=ensemble_uwo", f"seed={k}", f"runs_dir={untouched}") for k in (0, 1)]


def finish(plan: Plan) -> None:
    plan.directory.mkdir(parents=True)
    (plan.directory / "status.json").write_text(json.dumps({"state": "finished"}))


def test_artifacts_are_counted_once_and_runs_wait_for_them(plans):
    seen = forecast(plans, Known(**SECONDS))
    assert [one.plan.config["name"].rpartition("/")[2] for one in seen.artifacts] == [
        *("sft", "preferences", *(f"reward_model_s{k}" for k in range(5)), "cost_model_s0")
    ]
    assert {one.runs for one in seen.artifacts} == {2}
    assert [len(round_) for round_ in seen.rounds] == [1, 1, 6, 2]
    assert seen.device_seconds == 100 + 40 + 5 * 10 + 20 + 2 * 50
    assert seen.wall_seconds(1) == seen.device_seconds
    assert seen.wall_seconds(99) == 100 + 40 + 20 + 50
    assert seen.unknown == 0


def test_what_is_unknown_is_counted_and_not_made_up(plans):
    known = {key: value for key, value in SECONDS.items() if key != "RewardModel"}
    seen = forecast(plans, Known(**known))
    assert seen.unknown == 5
    assert seen.device_seconds == 100 + 40 + 20 + 2 * 50


def test_what_is_finished_takes_nothing_and_what_goes_on_takes_the_rest(plan_of, tmp_path):
    plan = plan_of("algorithm=ppo_lag", "reward=single", f"runs_dir={tmp_path}")
    needs = list(in_order(plan))
    for needed in needs[:2]:
        finish(needed)
    (plan.directory / "checkpoints/step_000020").mkdir(parents=True)
    seen = forecast([plan], Known(**SECONDS))
    assert [one.standing for one in seen.artifacts] == ["finished", "finished", "new", "new"]
    assert (seen.runs[0].standing, seen.runs[0].step) == ("continued", 20)
    assert seen.runs[0].seconds == pytest.approx(50 * 60 / 80)
    assert seen.device_seconds == pytest.approx(10 + 20 + 50 * 60 / 80)


def test_processes_multiply_the_work_and_not_the_time(plans):
    two = [replace(plan, num_processes=2, needs=()) for plan in plans]
    seen = forecast(two, Known(**SECONDS))
    assert seen.device_seconds == 200
    assert seen.wall_seconds(2) == 50


@pytest.mark.parametrize("executor", ["Here", "Slurm"])
def test_the_table_says_all_and_nothing_is_written(executor, plans, tmp_path, untouched, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    settings = {"_target_": f"rlhf_lab.launch.executors.{executor}", "at_once": 1, "gres": "gpu:1", "account": None}
    if executor == "Here":
        del settings["at_once"], settings["gres"]
    how = Launching(root=tmp_path / "s", runs_dir=untouched, sweeps_dir=tmp_path, executor=settings, plan=True)
    show(plans, how)
    said = capsys.readouterr().out
    assert all(one.directory.name in said for one in (*plans, *in_order(*plans)))
    assert "PPOLagrangian" in said
    assert "helpful (5, uncertainty_weighted), cost" in said
    assert "80 × 64" in said
    assert "time of 10 of 10: unknown; plan=calibrate measures" in said
    assert ("array 4: 2 jobs, 1 at a time, after array 3: runs" in said) == (executor == "Slurm")
    assert list(tmp_path.iterdir()) == []
    assert not untouched.exists()


def test_an_earlier_run_of_another_seed_is_found_below_the_places(plan_of, tmp_path):
    done, plan = (plan_of("algorithm=rloo", "reward=single", f"seed={k}", f"runs_dir={tmp_path}") for k in (0, 1))
    done.directory.mkdir(parents=True)
    (done.directory / "config.yaml").write_text(yaml.safe_dump(done.config))
    (done.directory / "environment.json").write_text('{"host": "h"}')
    (done.directory / "status.json").write_text(
        json.dumps({"state": "finished", "seconds": 33.0, "peak_memory_mib": 500})
    )
    found = EarlierRuns.below([tmp_path]).estimate(plan)
    assert found is not None
    assert (found.seconds, found.memory_mib, found.trust) == (33.0, 500, "measured")


def test_parameters_are_those_of_the_loaded_model(hf_folder, tmp_path):
    folder = hf_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    counted = sum({tensor.data_ptr(): tensor.numel() for tensor in model.parameters()}.values())
    assert parameters(str(folder), {}) == counted
    with pytest.raises(UnknownWeights):
        parameters(str(tmp_path / "nothing"), {})


def test_the_floor_of_memory_is_what_weights_gradients_and_moments_take(plans):
    from rlhf_lab.engine.tiny import tiny_policy

    policy = tiny_policy(0)
    size = sum(tensor.numel() * tensor.element_size() for tensor in policy.parameters()) / 2**20
    trained = torch.optim.AdamW(policy.parameters())
    policy(torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    trained.step()
    moments = [value for state in trained.state.values() for value in state.values() if value.ndim]
    held = size + sum(p.grad.numel() * 4 for p in policy.parameters() if p.grad is not None) / 2**20
    held += sum(tensor.numel() * tensor.element_size() for tensor in moments) / 2**20
    promised = {str(one.output): one for one in in_order(*plans)}
    sft, annotate = list(in_order(*plans))[:2]
    assert least_memory_mib(sft, promised) == pytest.approx(held)
    assert least_memory_mib(annotate, promised) == pytest.approx(size)
    # policy and critic learn; the reference and six scorers, which share the policy's trunk, do not
    assert least_memory_mib(plans[0], promised) == pytest.approx(2 * held + 7 * size)


def test_a_trial_is_of_the_same_kind_as_the_run_and_of_no_other_method(plan_of, untouched):
    def planned(*words: str) -> Plan:
        return plan_of(*words, f"runs_dir={untouched}")

    run = planned("algorithm=rloo", "reward=single")
    assert kind(run) == kind(planned("algorithm=rloo", "reward=single", "seed=5", "stage.steps=7"))
    assert kind(run) == kind(planned("algorithm=rloo", "reward=single", "algorithm.kl_coef=0.3"))
    assert kind(run) != kind(planned("algorithm=rloo", "reward=ensemble_uwo"))
    short, _ = shortened(run.config["stage"], 3)
    assert units_of(short) == 3
    assert short["prompts_per_step"] == run.config["stage"]["prompts_per_step"]


def test_a_calibrated_run_takes_its_steps_and_its_evaluations(plan_of, untouched):
    plan = plan_of("algorithm=rloo", "reward=single", f"runs_dir={untouched}")  # 80 steps, measured at 20, 40, 60 too
    trial = Trial(begin=10, units=3, unit=2, evaluation=5, memory_mib=600, device_memory_mib=0)
    known = Calibration({kind(plan): Measured(trial=trial, of="x", host="h", when="then", load=0.5)})
    found = known.before(Known(), [plan]).estimate(plan)
    assert found is not None
    assert (found.seconds, found.trust) == (10 + 77 * 2 + 3 * 5, "calibrated")
    # what was measured whole is better, and said first
    assert known.before(Known(RLOO=99), [plan]).estimate(plan) == Known(RLOO=99).estimate(plan)


def test_what_is_in_no_proportion_to_anything_is_not_tried(plan_of, untouched):
    with pytest.raises(NotTried, match="no steps that could be tried"):
        units_of(plan_of("algorithm=ric", f"runs_dir={untouched}").config["stage"])
    unsized = plan_of("experiments=tiny_help/reward_model", f"runs_dir={untouched}").config["stage"]
    with pytest.raises(NotTried, match=r"set dataset.train_size"):
        units_of(unsized)


def test_calibrations_are_kept(tmp_path: Path):
    trial = Trial(begin=1, units=3, unit=2, evaluation=5, memory_mib=600, device_memory_mib=0)
    known = Calibration({"digest": Measured(trial=trial, of="x", host="h", when="then", load=0.5)})
    known.write(tmp_path)
    assert Calibration.read(tmp_path) == known
    assert Calibration.read(tmp_path / "nothing") == Calibration({})
