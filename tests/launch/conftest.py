"""The command line as a process, and a plan without one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict

from rlhf_lab.launch.compose import ROOT, Plan, plan_run, register_resolvers

os.environ["RLHF_LAB_ROOT"] = str(ROOT)

CommandLine = Callable[..., subprocess.CompletedProcess[str]]
Planner = Callable[..., Plan]


@pytest.fixture(scope="session")
def command_line() -> CommandLine:
    """`command_line(*arguments, **environment)` runs launch.py as a person does."""

    def run(*arguments: str, timeout: float = 200, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "launch.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def plan_of() -> Planner:
    """`plan_of(*arguments)` is the plan of a command line, made in this process."""
    register_resolvers()

    def plan(*arguments: str) -> Plan:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("config", overrides=list(arguments), return_hydra_config=True)
        choices = {str(k): str(v) for k, v in config.hydra.runtime.choices.items() if v is not None}
        with open_dict(config):
            del config.hydra
        return plan_run(config, arguments, choices)

    return plan


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory that nobody may make; the same for all tests, so that artifacts are planned once."""
    return tmp_path_factory.mktemp("untouched") / "runs"


@pytest.fixture(scope="session")
def smoke_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory that tests share, so that the artifacts of the embedded task are built in it once."""
    return tmp_path_factory.mktemp("smoke_runs")


@pytest.fixture
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, most of the time of a run of a few steps."""
    monkeypatch.setattr("rlhf_lab.launch.execute.draw_report", lambda directory: None)
