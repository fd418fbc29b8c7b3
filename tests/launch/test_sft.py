"""What SFT can be told on the command line: packed rows, every turn, several tastes."""

import json

import pytest

from rlhf_lab.launch.execute import execute, preflight


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["algorithm=reward_model", "stage.pack_tokens=128"], r"stage\.pack_tokens=128 .* reads preferences"),
        (["algorithm=dpo", "stage.turns=all"], r"stage\.turns=all .* reads preferences"),
        (["algorithm=sft", "stage.turns=first"], r"stage\.turns='first': .*'last' or 'all'"),
        (["algorithm=sft", "stage.pack_tokens=-1"], r"stage\.pack_tokens=-1: .*greater than or equal to 0"),
        (["algorithm=reward_model", "dataset=tiny_help_multitask"], "demonstrations, but preferences are needed"),
    ],
)
def test_what_makes_no_sense_is_refused(typed, said, plan_of, untouched):
    with pytest.raises(ValueError, match=said):
        preflight(plan_of(*typed, f"runs_dir={untouched}"))
    assert not untouched.exists()


@pytest.mark.slow
def test_packed_rows_train_the_same_policy(plan_of, smoke_runs, without_reports):
    losses = {}
    for tokens in (0, 100):
        plan = plan_of(
            "debug=smoke", "algorithm=sft", "stage.epochs=3", f"stage.pack_tokens={tokens}", f"runs_dir={smoke_runs}"
        )
        execute(plan)
        lines = [json.loads(line) for line in (plan.directory / "metrics.jsonl").read_text().splitlines()]
        losses[tokens] = [line["loss/nll"] for line in lines] + [lines[-1]["eval/sft_test/loss/nll"]]
    assert losses[100] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][-2] < losses[0][0] - 0.1


@pytest.mark.slow
def test_multitask_is_measured_under_each_taste(plan_of, smoke_runs, without_reports):
    plan = plan_of("debug=smoke", "algorithm=multitask_sft", f"runs_dir={smoke_runs}")
    last = execute(plan)
    for taste in ("helpful", "humour", "helpful+humour"):
        assert f"eval/test:{taste}/gold/humour/mean" in last
    assert last["eval/test:humour/kl"] != 0
