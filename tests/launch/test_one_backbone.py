"""The main job on one base: from nothing to an adapter that peft loads, that other runs read and go on with."""

import json
from typing import Any, cast

import peft
import pytest
import transformers


def test_the_models_of_a_run_are_adapters_of_one_kind(plan_of):
    plan = plan_of("algorithm=ppo_lag", "reward=ensemble_uwo", "model=tiny_lora_nf4", "runs_dir=r")
    made = {needed.directory.parent.name for needed in plan.needs if needed.config["output"] == "scorer"}
    assert made == {"lora_nf4"}
    assert {needed.config["model"]["quantise"] for needed in plan.needs if needed.config["output"] == "scorer"} == {
        "nf4"
    }
    typed = plan_of("algorithm=ppo", "reward=single", "model.peft=lora", "model.lora.rank=4", "runs_dir=r")
    assert typed.config["model"]["lora"]["rank"] == 4
    assert {needed.config["model"]["peft"] for needed in typed.needs if "model" in needed.config} == {None}


@pytest.mark.slow
def test_the_main_job_on_one_base_from_nothing(plan_of, smoke_runs, without_reports, capsys):
    from rlhf_lab.launch.execute import execute

    shared = ["debug=smoke", f"runs_dir={smoke_runs}", "model=tiny_lora", "reward=ensemble_uwo", "reward_ensemble.k=2"]
    execute(plan_of(*shared, "algorithm=ppo_lag", "name=on_one_base"))
    # policy, reference, critics, two reward models, a cost model
    assert "6 models are adapters and heads on one base" in " ".join(capsys.readouterr().out.split())
    folder = smoke_runs / "on_one_base/policy"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("sft/policy")
    learnt = cast(Any, peft.AutoPeftModelForCausalLM.from_pretrained(folder))
    assert any(p.abs().sum() > 0 for name, p in learnt.named_parameters() if "lora_B" in name)

    execute(plan_of(*shared, "stage=evaluate", f"model.policy={folder}", "name=read"))
    # goes on from an adapter, whose reference it is, and saves a whole model
    goes_on = [f"model.policy={folder}", "model.merge=true", "name=went_on"]
    execute(plan_of(*shared, "algorithm=ppo_lag", *goes_on))
    merged = smoke_runs / "went_on/policy"
    assert not (merged / "adapter_config.json").exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(merged).num_parameters() > 90_000
