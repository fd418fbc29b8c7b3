"""Every command of the README composes, and everything it names is there."""

import re
import shlex
from pathlib import Path

import pytest

from rlhf_lab.launch.compose import ROOT, plan_experiment, register_resolvers

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip().split("&& ")[-1]
    for block in BLOCKS
    for line in block.splitlines()
    if "launch.py" in line
]


@pytest.fixture(autouse=True)
def _composing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_LAB_ROOT", str(ROOT))
    register_resolvers()


def test_the_readme_has_commands_to_check():
    assert len(COMMANDS) > 10
    assert "python launch.py algorithm=ppo_lag reward=ensemble_uwo" in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--help" not in c])
def test_each_command_composes(command: str):
    words = [word for word in shlex.split(command)[2:] if word != "-m"]
    # a person puts a path where the README says <…>; a sweep's points compose one by one
    overrides = tuple(re.sub(r"<[^>]*>", "some/path", word).split(",")[0] if word.startswith("seed=") else
                      re.sub(r"<[^>]*>", "some/path", word) for word in words)  # fmt: skip
    plan = plan_experiment(overrides)
    assert plan.config["stage"]["_target_"].startswith("rlhf_lab.stages.")


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"`([\w/{}.,]+\.py)`", README)
    assert named
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "rlhf_lab" / name).exists(), name


def test_every_picture_is_there():
    for picture in re.findall(r"!\[[^]]*]\(([^)]+)\)", README):
        assert Path(ROOT / picture).stat().st_size > 10_000
