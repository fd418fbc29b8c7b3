"""`rollout=`: who reads it, what it refuses before anything is loaded, and a run that another engine samples for."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlhf_lab.engine.accounting import CLOCKED
from rlhf_lab.engine.tiny import tiny_tokenizer
from rlhf_lab.launch.check import BadConfig
from rlhf_lab.launch.compose import Plan
from rlhf_lab.launch.execute import RunFailed, execute, preflight
from rlhf_lab.run import Run

PAGED, VLLM = "rollout=continuous_batching", "rollout=vllm"


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


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "rollout.python=null, but this environment has no vLLM; install vLLM in an environment of its own"),
        (["rollout.python=/no/such/python"], "rollout.python=/no/such/python is no program that can be run"),
        (["hardware=ddp", "num_processes=2"], "rollout=vllm does not work with num_processes=2; use rollout=built_in"),
        (["model=tiny_lora"], "rollout=vllm does not work with model.peft=lora; use rollout=built_in"),
    ],
    ids=lambda words: str(words),
)
def test_vllm_is_refused_before_anything_is_built(typed, said, plan_of, untouched):
    plan = plan_of("algorithm=rloo", *typed, "reward=single", VLLM, f"runs_dir={untouched}")
    with pytest.raises(ValueError, match=re.escape(said)):
        preflight(plan)
    assert not untouched.exists()


@pytest.mark.parametrize("typed", ["dtype=float16", "gpu_memory_utilization=1.5", "start_timeout=0", "python=3"])
def test_settings_of_vllm_have_types_and_ranges(typed: str, plan_of: Callable[..., Plan]):
    with pytest.raises(BadConfig, match=re.escape(f"rollout.{typed.partition('=')[0]}=")):
        plan_of("algorithm=rloo", "reward=single", VLLM, f"rollout.{typed}")


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


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A policy and a value model with random weights, of the embedded tokenizer and heads that vLLM can read."""
    tokenizer: Any = tiny_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=192, initializer_range=0.08, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config.num_labels = 1
    found = {}
    for name, kind in [
        ("policy", transformers.LlamaForCausalLM),
        ("scorer", transformers.LlamaForSequenceClassification),
    ]:
        folder = tmp_path_factory.mktemp(name)
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = str(folder)
    return found


def own_models(folders: dict[str, str]) -> list[str]:
    return [
        *("reward=single", "debug=smoke", "model=hf", f"model.base={folders['policy']}", "stage.steps=4"),
        *("model.learning_rates.policy=1e-3", "stage.checkpoint_every=2", "stage.evaluate_every=3"),
        *("dataset.eval_splits=[test]", f"scorers.reward_models=[{folders['scorer']}]", "reward_ensemble.k=1"),
        f"scorers.cost_models=[{folders['scorer']}]",
    ]


def interrupted(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute a run that ends after step 3, which the checkpoint after 2 does not know, and again."""
    log = Run.log

    def fail(run: Run, step: int, values: dict[str, float]) -> None:
        log(run, step, values)
        if step == 3:
            raise RuntimeError("interrupted")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", fail)
        with pytest.raises(RunFailed, match="interrupted"):
            execute(plan)
    execute(plan)


def metrics(plan: Plan) -> list[dict]:
    lines = [json.loads(line) for line in (plan.directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKED)} for line in lines]


LIMITED = [
    *("sampling.temperature=0.8", "sampling.top_k=40", "sampling.top_p=0.9"),
    *("sampling.repetition_penalty=1.2", "sampling.min_new_tokens=3"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "most"),
    [
        (["algorithm=rloo", "learner.minibatch_size=0"], 1e-8),  # one update: the policy is the one that sampled
        (["algorithm=ppo", "learner.epochs=2"], math.inf),
    ],
    ids=["rloo", "ppo"],
)
def test_a_run_learns_from_restricted_samples_and_goes_on_as_if_it_had_not_been_interrupted(
    typed, most, plan_of: Callable[..., Plan], folders, tmp_path: Path, without_reports, monkeypatch
):
    shared = [*typed, *own_models(folders), *LIMITED, f"runs_dir={tmp_path}"]
    whole, broken = (plan_of(*shared, f"name={how}") for how in ("whole", "broken"))
    execute(whole)
    interrupted(broken, monkeypatch)
    found = [line for line in metrics(whole) if "rollout/mismatch_kl" in line]
    assert len(found) == 4
    for line in found:
        assert line["rollout/mismatch_logprob_max"] < 1e-4
        assert math.isfinite(line["loss/policy_avg"])
        assert line["policy/approxkl_avg"] < most
    assert found[0]["objective/kl"] == pytest.approx(0, abs=1e-4)  # the reference speaks of the same tokens
    assert found[-1]["objective/kl"] > 0.01
    assert metrics(broken) == metrics(whole)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(
    "RLHF_LAB_VLLM_PYTHON" not in os.environ, reason="needs vLLM: RLHF_LAB_VLLM_PYTHON names the Python that has it"
)
def test_a_run_learns_from_samples_of_vllm_and_goes_on_as_if_it_had_not_been_interrupted(
    plan_of: Callable[..., Plan], folders, tmp_path: Path, without_reports, monkeypatch: pytest.MonkeyPatch
):
    typed = [
        *("algorithm=rloo", *own_models(folders), VLLM, "rollout.kv_cache_gib=0.25", "rollout.enforce_eager=true"),
        *(f"rollout.python={os.environ['RLHF_LAB_VLLM_PYTHON']}", f"runs_dir={tmp_path}"),
    ]
    whole, broken = (plan_of(*typed, f"name={how}") for how in ("whole", "broken"))
    last = execute(whole)
    interrupted(broken, monkeypatch)
    found = [line for line in metrics(whole) if "rollout/mismatch_kl" in line]
    assert len(found) == 4
    for line in found:
        assert 0 <= line["rollout/mismatch_kl"] < 1e-8  # the weights that sampled are those of this step
        assert line["rollout/mismatch_logprob_max"] < 1e-4
        assert math.isfinite(line["loss/policy_avg"])
    assert found[0]["objective/kl"] < found[-1]["objective/kl"]
    assert "eval/test/gold/helpfulness/mean" in last
    assert metrics(broken) == metrics(whole)
