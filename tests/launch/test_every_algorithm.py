"""Every algorithm runs out of the box on the embedded task, and starts from nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_lab.launch.compose import ROOT, Plan
from rlhf_lab.launch.execute import execute
from rlhf_lab.run import is_finished

ALGORITHMS = sorted(path.stem for path in (ROOT / "conf/algorithm").glob("*.yaml"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_composes_alone(algorithm: str, plan_of: Callable[..., Plan], untouched: Path):
    plan = plan_of(f"algorithm={algorithm}", f"runs_dir={untouched}")
    assert plan.config["name"].split("-")[0] == algorithm
    assert "???" not in json.dumps(plan.config["stage"])


@pytest.mark.slow
@pytest.mark.usefixtures("without_reports")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs_alone(algorithm: str, plan_of: Callable[..., Plan], smoke_runs: Path):
    plan = plan_of(f"algorithm={algorithm}", "debug=smoke", f"runs_dir={smoke_runs}", f"name=alone/{algorithm}")
    execute(plan)
    assert is_finished(plan.directory)
    assert (plan.directory / "metrics.jsonl").read_text()
    assert plan.output.exists()
