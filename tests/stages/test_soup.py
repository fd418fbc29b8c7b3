"""The ends of the lattice are the single policies, the soup that is written is the one that is measured."""

from math import comb
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from rlhf_lab.console import Console
from rlhf_lab.data.conditions import NoConditions
from rlhf_lab.data.tables import read_table
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.models import save_model
from rlhf_lab.engine.tiny import tiny_policy, tiny_tokenizer
from rlhf_lab.run import Run
from rlhf_lab.stages.evaluate import Evaluate
from rlhf_lab.stages.soup import Soup
from rlhf_lab.tracking import NoTracker


@pytest.fixture
def settings(world):
    """`settings(policy)` is what both stages take."""

    def make(policy="embedded:tiny"):
        tiny = "embedded:tiny"
        return {
            "model": ModelPaths(base=tiny, policy=policy, reference=tiny, critic="", learning_rates={}),
            "dataset": world(eval_splits=["test", "ood_items"], eval_size=6),
            "rewards": {},
            "evaluation_sampling": Sampling(
                max_new_tokens=10, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=64
            ),
            "hardware": Hardware(device="cpu", dtype="float32", threads=1),
            "tokens_at_once": 4096,
            "conditions": NoConditions(),
        }

    return make


@pytest.fixture
def policies(tmp_path):
    """Folders of three random policies."""
    folders = []
    for seed in range(3):
        folder = tmp_path / f"policy_{seed}"
        folder.mkdir()
        save_model(folder, tiny_policy(seed), tiny_tokenizer())
        folders.append(str(folder))
    return folders


@pytest.fixture
def carried_out(tmp_path):
    """`carried_out(stage, name)` is the run directory and the last metrics."""

    def carry_out(stage, name="soup") -> tuple[Path, dict[str, float]]:
        stage.check()
        run = Run.open(
            tmp_path / name,
            config={"seed": 0, "keep_checkpoints": 2},
            overrides=[],
            artifacts={},
            tracker=NoTracker(),
            console=Console(),
        )
        try:
            return tmp_path / name, stage.run(run)
        finally:
            run.close()

    return carry_out


def test_the_ends_of_the_lattice_measure_as_the_policies_alone(settings, policies, carried_out):
    stage = Soup(**settings(), policies=policies, weights=[0.5, 0.25, 0.25], space="weights", grid=2)
    directory, last = carried_out(stage)
    rows = read_table(directory / "data/lattice.parquet")
    assert len(rows) == 2 * comb(2 + 2, 2)
    for i, policy in enumerate(policies):
        alone, _ = Evaluate(**settings(policy)).bench(policy, 0).measure(policy)
        for row in rows:
            if row["weights"][i] == 1:
                for name in ("gold/helpfulness/mean", "gold/cost/ci95", "kl", "completions/mean_length"):
                    assert row[name] == alone[f"eval/{row['split']}/{name}"]
    assert len({row["kl"] for row in rows}) == len(rows)
    assert {name: last[name] for name in sorted(last) if name.startswith("soup/")} == {
        "soup/weight/0": 0.5,
        "soup/weight/1": 0.25,
        "soup/weight/2": 0.25,
    }


def test_the_policy_that_is_written_is_the_mixture_that_is_measured(settings, policies, carried_out):
    stage = Soup(**settings(), policies=policies[:2], weights=[0.3, 0.7], space="weights", grid=None)
    directory, last = carried_out(stage)
    one, other, mixed = (load_file(Path(f) / "model.safetensors") for f in (*policies[:2], directory / "policy"))
    for name, tensor in mixed.items():
        assert_close(tensor, 0.3 * one[name] + 0.7 * other[name])
    policy = str(directory / "policy")
    alone, _ = Evaluate(**settings(policy)).bench(policy, 0).measure(policy)
    assert {name: value for name, value in last.items() if name.startswith("eval/")} == alone
    assert not (directory / "data").exists()


def test_points_that_were_measured_before_a_kill_are_not_measured_again(settings, policies, carried_out):
    def stage():
        return Soup(**settings(), policies=policies[:2], weights=[0.5, 0.5], space="weights", grid=3)

    directory, last = carried_out(stage())
    table = (directory / "data/lattice.parquet").read_bytes()
    for file in (directory / "lattice/00002").iterdir():
        file.unlink()
    (directory / "lattice/00002").rmdir()
    (directory / "mixture").mkdir()
    kept = {path: path.stat().st_mtime_ns for path in directory.glob("lattice/*/metrics.parquet")}
    assert carried_out(stage()) == (directory, last)
    assert (directory / "data/lattice.parquet").read_bytes() == table
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(directory.glob("*mixture*"))


def test_what_cannot_be_mixed_is_refused_before_anything_is_loaded(settings, policies):
    def check(weights, others=policies[:2], promised=()):
        Soup(**settings(), policies=others, weights=weights, space="weights", grid=None).check(promised)

    check([0.5, 0.5])
    check([0.5, 0.5], [policies[0], "/to/come"], {"/to/come"})
    with pytest.raises(ValueError, match=r"stage.weights=\[0.5, 0.6\] add up to 1.1; they must add up to 1"):
        check([0.5, 0.6])
    with pytest.raises(ValueError, match="no such folder: /to/come"):
        check([0.5, 0.5], [policies[0], "/to/come"])
    tensors = load_file(Path(policies[1]) / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, Path(policies[1]) / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(64,\)"):
        check([0.5, 0.5])
