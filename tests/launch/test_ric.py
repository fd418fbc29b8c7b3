"""Rewards-in-Context on the command line: what it refuses and leaves, and that a stop anywhere changes nothing."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from pyarrow import parquet

from rlhf_lab.data.reward_conditions import RewardContext, RewardNotation
from rlhf_lab.engine.accounting import CLOCKED
from rlhf_lab.launch.execute import RunFailed, execute, preflight
from rlhf_lab.records import Prompt
from rlhf_lab.stages.ric import Scored

TOLD = ("helpful", "humour")
# responses of the smoke policy rarely end, and would all be left out
ONLINE = ["debug=smoke", "algorithm=ric_online", "stage.cleaning.unfinished=true", "stage.prompts_per_shard=24"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["stage.told=[helpful,kind]"], ["stage.told=['helpful', 'kind']", "'humour'", "reward.sources.kind"]),
        (["stage.told=[helpful,helpful]"], ["name each reward once"]),
        (["stage.told=[]"], ["at least one"]),
        (["reward.costs=[cost,kost]"], ["['kost']", "'humour'", "for which higher is worse"]),
        (["stage.range_quantiles=[0.9,0.1]"], ["stage.range_quantiles=[0.9, 0.1]", "below"]),
        (["stage.range_quantiles=[0,1.5]"], ["range_quantiles=1.5", "less than or equal to 1"]),
        (["stage.target_map=l3"], ["stage.target_map='l3'", "'linf', 'l2', 'linear' or 'quantile'"]),
        (["stage.notation.step=0"], ["stage.notation.step=0", "greater than 0"]),
        (["stage.keep_rule=most"], ["stage.keep_rule='most'", "'any' or 'all'"]),
        (["stage.cleaning.drop_if.dots='*'"], ["cleaning.drop_if.dots='*' is no regular expression"]),
        (["learner.minibatch_size=8"], ["learner.minibatch_size=8", "stage.batch_size"]),
        (["stage.demonstrations=null", "stage.preferences=null"], ["nothing to learn from", "@stage.demonstrations"]),
        (["stage.preferences.path=embedded:tiny_help", "stage.preferences.train_size=9"], ["the world draws no pairs"]),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(typed, said, plan_of, untouched):
    with pytest.raises((ValueError, HydraException)) as caught:
        preflight(plan_of("algorithm=ric_online", *typed, f"runs_dir={untouched}"))
    message = f"{caught.value} {caught.value.__cause__}"
    assert all(part in message for part in said), message
    assert not untouched.exists()


def test_a_cost_whose_source_is_left_out_is_no_mistake(plan_of, untouched):
    preflight(plan_of("algorithm=ric_online", "reward.sources.cost=null", f"runs_dir={untouched}"))


def test_a_response_is_learnt_under_its_own_rewards():
    raw = torch.tensor([[1.0, -3.0], [3.0, -2.0], [2.1, -2.6]], dtype=torch.float64)
    prompts = [Prompt.from_text(text) for text in ("a ?", "b ?", "c ?")]
    context = RewardContext(
        names=TOLD,
        notation=RewardNotation(style="numbers", step=0.5, largest=5.0),
        mean=torch.tensor([2.0, -2.0], dtype=torch.float64),
        sd=torch.tensor([0.5, 2.0], dtype=torch.float64),
        scale=torch.tensor([[-1.0, -1.0], [1.0, 1.0]]),
        method="linf",
    )
    lessons = Scored(prompts, ["x", "y", "z"], raw).select(torch.tensor([2, 0])).lessons(context)
    assert [(lesson.prompt.plain, lesson.response) for lesson in lessons] == [(prompts[2], "z"), (prompts[0], "x")]
    told = [lesson.prompt.condition for lesson in lessons]
    assert told == ["<rm1_score> 0.0 <rm2_score> -0.5", "<rm1_score> -2.0 <rm2_score> -0.5"]


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKED)} for line in lines]


def rows(run: Path, name: str) -> list[dict]:
    return parquet.read_table(run / f"data/{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def whole(plan_of, smoke_runs) -> Path:
    """One run of two iterations that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_lab.launch.execute.draw_report", lambda directory: None)
        execute(plan_of(*ONLINE, f"runs_dir={smoke_runs}", "name=ric_whole"))
    return smoke_runs / "ric_whole"


@pytest.mark.slow
def test_offline_responses_are_told_their_own_rewards(whole):
    context = RewardContext.load(whole / "policy")
    offline = rows(whole, "offline")
    for k, name in enumerate(TOLD):
        raw = [row[f"raw_{name}"] for row in offline]
        assert context.mean[k].item() == pytest.approx(statistics.fmean(raw))
        assert context.sd[k].item() == pytest.approx(statistics.pstdev(raw))
        for row in offline:
            expected = (row[f"raw_{name}"] - statistics.fmean(raw)) / statistics.pstdev(raw)
            assert row[f"obtained_{name}"] == pytest.approx(expected, abs=1e-9)
    words = json.loads((whole / "policy/tokenizer.json").read_text())["added_tokens"]
    assert {word["content"] for word in words} >= set(context.notation.new_tokens(TOLD))


@pytest.mark.slow
def test_an_iteration_asks_for_the_most_of_all_rewards_but_one_and_keeps_what_reaches_its_quantile(whole):
    context = RewardContext.load(whole / "policy")
    most = context.notation.at_levels(context.scale[-1]).tolist()
    offline = {row["id"] for row in rows(whole, "offline")}
    facts = [line for line in metrics(whole) if "ric/kept" in line]
    for iteration, fact in enumerate(facts, start=1):
        made = rows(whole, f"iteration_{iteration:02d}")
        assert len(made) == fact["ric/generated"] == 64
        assert len({row["id"] for row in made}) == 64  # without replacement
        assert {row["id"] for row in made} <= offline
        for row in made:
            assert sum(row[f"goal_{name}"] == top for name, top in zip(TOLD, most, strict=True)) >= 1
        fit = [row for row in made if not row["dropped"]]
        assert all(math.isnan(row["raw_helpful"]) == bool(row["dropped"]) for row in made)
        kept = 0
        borders = {
            name: statistics.quantiles([r[f"raw_{name}"] for r in fit], n=10, method="inclusive") for name in TOLD
        }
        for row in fit:
            kept += any(row[f"raw_{name}"] >= borders[name][6] - 1e-9 for name in TOLD)  # the .7 quantile
        assert fact["ric/kept"] == kept
    assert facts[1]["ric/rows"] == facts[1]["ric/origin"] + facts[0]["ric/kept"] + facts[1]["ric/kept"]


@pytest.mark.slow
def test_every_trade_off_has_a_row_and_the_correlations_are_those_of_the_samples(whole):
    context = RewardContext.load(whole / "policy")
    grid = rows(whole, "preference_grid")
    assert [(row["phase"], row["weight_helpful"]) for row in grid] == [(p, w) for p in range(3) for w in (0, 0.5, 1)]
    last = metrics(whole)[-1]
    samples = [json.loads(line) for line in (whole / f"samples/step_{last['step']:06d}.jsonl").read_text().splitlines()]
    for k, name in enumerate(TOLD):
        wanted, got = [], []
        for row in (row for row in grid if row["phase"] == 2):
            split = f"test:helpful={row['weight_helpful']:.4g},humour={row['weight_humour']:.4g}"
            raw = [sample["scores"][name] for sample in samples if sample["split"] == split]
            told = [(value - context.mean[k].item()) / context.sd[k].item() for value in raw]
            assert row["responses"] == len(raw) == 16
            assert row[f"obtained_{name}"] == pytest.approx(statistics.fmean(told))
            assert row[f"rewards_{name}_mean"] == pytest.approx(statistics.fmean(raw), abs=1e-5)
            wanted += [row[f"desired_{name}"]] * len(raw)
            got += told
        assert last[f"eval/test/ric/{name}/correlation"] == pytest.approx(statistics.correlation(wanted, got), abs=1e-6)
    assert all(re.fullmatch(r"test:helpful=[\d.]+,humour=[\d.]+", sample["split"]) for sample in samples)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "calls"),
    [
        pytest.param("text_batch", 4, id="offline", marks=pytest.mark.long),
        pytest.param("text_batch", 7, id="first iteration", marks=pytest.mark.long),
        pytest.param("text_batch", 10, id="second iteration"),
        pytest.param("write_table", 10, id="scoring", marks=pytest.mark.long),
        pytest.param("write_table", 12, id="generating"),
    ],
)
def test_a_run_that_was_stopped_continues_as_if_it_had_not_been(
    part, calls, whole, plan_of, smoke_runs, without_reports, monkeypatch
):
    run = smoke_runs / f"ric_{part}_{calls}"
    plan = plan_of(*ONLINE, "stage.checkpoint_every=2", f"runs_dir={smoke_runs}", f"name={run.name}")
    done = 0

    def stopping(*arguments, **named):
        nonlocal done
        done += 1
        if done == calls:
            raise RuntimeError("stopped")
        return original(*arguments, **named)

    import rlhf_lab.stages.ric
    import rlhf_lab.stages.shards

    module = rlhf_lab.stages.shards if part == "write_table" else rlhf_lab.stages.ric
    original = getattr(module, part)
    monkeypatch.setattr(module, part, stopping)
    with pytest.raises(RunFailed):
        execute(plan)
    monkeypatch.setattr(module, part, original)
    execute(plan)
    assert metrics(run) == metrics(whole)
    for table in ("offline", "iteration_01", "iteration_02", "preference_grid"):
        assert (run / f"data/{table}.parquet").read_bytes() == (whole / f"data/{table}.parquet").read_bytes()
    weights = [(folder / "policy/model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]
