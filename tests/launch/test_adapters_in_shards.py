"""Whole runs of adapters whose base is cut over two processes, against the runs of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

from rlhf_lab.console import Console
from rlhf_lab.engine import ranks
from rlhf_lab.engine.backbone import alive_ones
from rlhf_lab.engine.checkpoint import load_tree
from rlhf_lab.engine.learner import Learner
from rlhf_lab.launch import execute
from rlhf_lab.launch.compose import Plan
from rlhf_lab.launch.execute import RunFailed
from rlhf_lab.run import Run
from tests.launch.test_distribution import SMOKE, TEN_STEPS, differences
from tests.launch.test_exactness import assert_same, metrics

pytestmark = pytest.mark.slow

LORA = ("model=tiny_lora", "keep_checkpoints=all", *SMOKE)
SHARDS = "hardware.distribution=fsdp"
METHODS = {
    "sft": ("algorithm=sft", "model.policy=${artifact:tiny_help/sft}", "stage.batch_size=7"),
    "dpo_margin": ("algorithm=dpo_margin", "stage.batch_size=6"),
    "rloo": ("algorithm=rloo", "stage.samples_per_prompt=3", "stage.checkpoint_every=3", *TEN_STEPS),
    # two members, a cost model and critics on the policy's base
    "ppo_lag": (
        *("algorithm=ppo_lag", "reward=ensemble_uwo", "reward_ensemble.k=2", "stage.samples_per_prompt=1"),
        *TEN_STEPS,
    ),
}
RECOMPUTED = {"rloo": ["hardware.gradient_checkpointing=true"]}  # of the runs in shards


def share() -> tuple[int, int]:
    """Numbers of the one base that was cut that are in this process, and that it has."""
    [model] = [backbone.model for _, backbone in alive_ones() if backbone.root is not None]
    copy = next(backbone.copy for _, backbone in alive_ones() if backbone.root is not None)
    assert copy is not None
    shards = [p for p in model.parameters() if isinstance(p, DTensor)]
    assert len(shards) == len(list(model.parameters()))
    here = sum(p.to_local().numel() for p in shards) + sum(p.numel() for p in copy.parameters())
    return here, sum(p.numel() for p in shards)


def work(plans: list[Plan], broken: Plan) -> list[tuple[int, int]]:
    """The runs in one of two processes, of which one fails after step 5 and again after 8; shares at checkpoints."""
    torch.set_num_threads(1)
    execute.draw_report = lambda directory: None
    ranks.start(torch.device("cpu"))
    shares: list[tuple[int, int]] = []
    state, log = Learner.state_dict, Run.log

    def watched(learner: Learner) -> dict[str, Any]:
        shares.append(share())
        return state(learner)

    Learner.state_dict = watched  # type: ignore[method-assign]
    for plan in plans:
        execute.carry_out(plan, Console())
    for last in (5, 8):

        def failing(run: Run, step: int, values: dict[str, float], last: int = last) -> None:
            log(run, step, values)
            if step == last:
                raise RuntimeError("interrupted")

        Run.log = failing  # type: ignore[method-assign]
        with pytest.raises(RunFailed, match="interrupted"):
            execute.carry_out(broken, Console())
    ranks.stop()
    return shares


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters_in_shards") / "runs"


@pytest.fixture(scope="module")
def alone(runs: Path, plan_of: Callable[..., Plan]) -> dict[str, Path]:
    """method -> the directory of its run in this process alone, on a whole base."""
    patched = pytest.MonkeyPatch()
    patched.setattr(execute, "draw_report", lambda directory: None)
    directories = {}
    for method, typed in METHODS.items():
        plan = plan_of(*typed, *LORA, f"runs_dir={runs}", f"name={method}-alone")
        execute.execute(plan)
        directories[method] = plan.directory
    patched.undo()
    return directories


@pytest.fixture(scope="module")
def sharded(alone: dict[str, Path], runs: Path, plan_of: Callable[..., Plan]) -> list[list[tuple[int, int]]]:
    """The runs of two processes beside them, and shares of each process."""
    plans = [
        plan_of(*METHODS[method], *LORA, SHARDS, *RECOMPUTED.get(method, []), f"runs_dir={runs}", f"name={name}")
        for name, method in {**dict(zip(METHODS, METHODS, strict=True)), "broken": "rloo"}.items()
    ]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    answers = elastic_launch(config, work)(plans[:-1], plans[-1])
    return [answers[rank] for rank in range(2)]


@pytest.mark.usefixtures("sharded")
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_on_half_a_base_each_learn_what_one_does(method: str, alone: dict[str, Path], runs: Path):
    apart = differences(runs / method, alone[method])
    assert len(metrics(runs / method)) >= 10
    print(f"{method}: all differ by at most {max(apart.values()):.1e}")
    assert max(apart.values()) < 5e-4, apart
    ours, theirs = (load_file(run / "policy/adapter_model.safetensors") for run in (runs / method, alone[method]))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-3)


def test_between_steps_each_process_has_half_of_the_base(sharded: list[list[tuple[int, int]]]):
    for shares in sharded:
        assert len(shares) >= 8
        for here, whole in shares:
            assert whole > 90_000
            assert here == pytest.approx(whole / 2, rel=0.02)


@pytest.mark.usefixtures("sharded")
def test_a_checkpoint_holds_adapters_and_heads_alone(runs: Path):
    modules = load_tree(max((runs / "ppo_lag/checkpoints").glob("step_*")))["modules"]
    assert modules.keys() == {"policy", "critic"}
    heads = {"heads.weight", "heads.bias"}
    assert heads < modules["critic"].keys()
    assert all(".lora_" in name for module in modules.values() for name in module.keys() - heads)


@pytest.mark.usefixtures("sharded")
def test_a_run_that_failed_twice_is_as_if_it_had_not_and_goes_on_in_one_process(
    alone: dict[str, Path], runs: Path, plan_of: Callable[..., Plan], without_reports: None
):
    assert_same(metrics(runs / "broken"), metrics(runs / "rloo")[:9])
    execute.execute(plan_of(*METHODS["rloo"], *LORA, f"runs_dir={runs}", "name=broken"))
    assert [line["step"] for line in metrics(runs / "broken")] == list(range(11))
    apart = differences(runs / "broken", alone["rloo"])
    assert max(apart.values()) < 5e-4, apart
