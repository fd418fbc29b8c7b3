"""`rollout=`: who reads it, what it refuses before anything is loaded, and a run that another engine samples for."""

import json
import math

import pytest

from rlhf_lab.launch.execute import execute, preflight

PAGED = "rollout=continuous_batching"


@pytest.mark.parametrize("stage", ["annotate", "rank", "best_of_n", "diversity", "safety_test"])
def test_stages_that_sample_with_the_built_in_engine_alone_do_not_read_it(stage: str, plan_of):
    with pytest.raises(ValueError, match=f"{PAGED}: this kind of run does not read rollout; remove it"):
        plan_of(f"stage={stage}", PAGED)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["algorithm=rloo", "hardware=ddp", "num_processes=4"], "num_processes=4"),
        (["algorithm=rloo", "hardware=fsdp", "num_processes=1"], "hardware.distribution=fsdp"),
        (["algorithm=rloo", "model=tiny_lora"], "model.peft=lora"),
        (["algorithm=rloo", "evaluation_sampling.min_new_tokens=1"], "sampling.min_new_tokens=1"),
        (["stage=evaluate", "num_processes=2"], "num_processes=2"),
    ],
    ids=lambda words: str(words),
)
def test_continuous_batching_is_refused_before_anything_is_built(typed, said, plan_of, untouched):
    plan = plan_of(*typed, "reward=single", PAGED, f"runs_dir={untouched}")
    with pytest.raises(ValueError, match=f"rollout=continuous_batching does not work with {said}; use rollout=built"):
        preflight(plan)
    assert not untouched.exists()


@pytest.mark.slow
def test_a_run_learns_from_samples_of_continuous_batching(plan_of, smoke_runs, without_reports):
    shared = ["debug=smoke", f"runs_dir={smoke_runs}", "reward=single"]
    plan = plan_of(*shared, "algorithm=grpo", PAGED, "name=paged")
    last = execute(plan)
    lines = [json.loads(line) for line in (plan.directory / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "rollout/mismatch_kl" in line]
    assert len(found) == plan.config["stage"]["steps"]
    for line in found:
        assert 0 <= line["rollout/mismatch_kl"] < 1e-8  # float32 on one machine: rounding
        assert line["rollout/mismatch_ratio_max"] == pytest.approx(1, abs=1e-4)
        assert math.isfinite(line["loss/policy_avg"])
    assert "eval/test/gold/helpfulness/mean" in last
    read = execute(plan_of(*shared, "stage=evaluate", f"model.policy={plan.output}", PAGED, "name=paged_read"))
    assert "eval/test/gold/helpfulness/mean" in read
