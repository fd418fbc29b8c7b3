"""Every algorithm composes by itself on the embedded task, under its own name and with nothing left to be said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_lab.launch.compose import ROOT, Plan

ALGORITHMS = sorted(path.stem for path in (ROOT / "conf/algorithm").glob("*.yaml"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_composes_alone(algorithm: str, plan_of: Callable[..., Plan], untouched: Path):
    plan = plan_of(f"algorithm={algorithm}", f"runs_dir={untouched}")
    assert plan.config["name"].split("-")[0] == algorithm
    assert "???" not in json.dumps(plan.config["stage"])
