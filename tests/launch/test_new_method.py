"""A new method is one file and one yaml: this adds one to a copy of the project and runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lab.launch.compose import ROOT

METHOD = '''\
"""REINFORCE against the mean reward of the batch."""

from dataclasses import dataclass
from typing import ClassVar

from rlhf_lab.interfaces import Objective
from rlhf_lab.types import Experience, Term


@dataclass(frozen=True, kw_only=True)
class BatchMean:
    """L = -(R - mean R) log pi(y | x)."""

    critics: ClassVar[tuple[str, ...]] = ()
    least_samples: ClassVar[int] = 1
    stateful: ClassVar[dict] = {}

    objective: Objective

    @property
    def streams(self):
        return self.objective.streams

    def prepare(self, scored):
        reward = self.objective(scored.columns, scored.rollout.prompts)
        advantages = (reward - reward.mean())[:, None] * scored.response_mask
        metrics = {"objective/scores": reward.mean().item()}
        return Experience(scored=scored, advantages=advantages, returns={}), metrics

    def loss(self, new, batch):
        return [Term("policy", -batch.advantages * new.logprobs, "token")]
'''
YAML = """\
# @package _global_
defaults:
  - override /stage: train_online
algorithm:
  _target_: rlhf_lab.algorithms.batch_mean.BatchMean
  objective: ${objective}
"""


def files(folder: Path) -> set[Path]:
    return {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_a_new_method_is_one_file_and_one_yaml(tmp_path: Path):
    copy = tmp_path / "project"
    for name in ("rlhf_lab", "conf", "experiments"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", copy)
    before = files(copy)
    (copy / "rlhf_lab/algorithms/batch_mean.py").write_text(METHOD)
    (copy / "conf/algorithm/batch_mean.yaml").write_text(YAML)
    assert len(files(copy) - before) == 2

    done = subprocess.run(
        [sys.executable, "launch.py", "algorithm=batch_mean", "reward=single", "debug=smoke", "name=new"],
        cwd=copy,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = copy / "runs/smoke/new"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert "objective/scores" in last
    assert "eval/test/gold/helpfulness/mean" in last
    assert (run / "report.html").exists()
    assert (run / "policy/model.safetensors").exists()
    named = (run / "config.yaml").read_text()
    assert "rlhf_lab.algorithms.batch_mean.BatchMean" in named
