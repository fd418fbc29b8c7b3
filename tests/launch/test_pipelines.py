"""The studies' scripts: every command that they give composes, on one seed and on several, and reads what is made."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_lab.launch.compose import ROOT, Plan
from rlhf_lab.launch.execute import execute

SCRIPTS = [
    ROOT / "experiments" / study / "run.sh"
    for study in (
        "personalized_soups",
        "rewards_in_context",
        "safe_rlhf",
        "generalisation_diversity",
        "reward_ensembles",
    )
]
# stands for python: writes down what it is asked, and does nothing
STAND_IN = (
    f'#!{sys.executable}\nimport json, os, sys\nprint(json.dumps(sys.argv[1:]), file=open(os.environ["ASKED"], "a"))\n'
)


def commands(script: Path, folder: Path, *seeds: int) -> list[list[str]]:
    """The arguments of each `python launch.py` that a script runs, as its shell expands them."""
    (folder / "bin").mkdir()
    stand_in = folder / "bin/python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
        "ASKED": str(folder / "asked"),
        "RUNS_DIR": str(folder / "runs"),
        "SWEEPS_DIR": str(folder / "sweeps"),
    }
    subprocess.run(["bash", str(script), *map(str, seeds)], env=environment, check=True, capture_output=True)
    asked = [json.loads(line) for line in (folder / "asked").read_text().splitlines()]
    assert all(each[0] == "launch.py" for each in asked)
    return [each[1:] for each in asked]


def points(words: list[str]) -> Iterator[list[str]]:
    """The first and the last point of a sweep; a command that is none, as it is."""
    if "-m" not in words:
        yield words
        return
    for end in (0, -1):
        typed = [word.partition("=") for word in words if word != "-m"]
        yield [f"{key}={value if '[' in value else value.split(',')[end]}" for key, _, value in typed]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_every_command_of_a_study_composes(script: Path, tmp_path: Path, plan_of: Callable[..., Plan]):
    made: set[str] = set()
    for words in commands(script, tmp_path, 0):
        for each in points(words):
            plan = plan_of(*each)
            assert plan.config["stage"]["_target_"].startswith("rlhf_lab.stages."), shlex.join(each)
            made |= {str(needed.directory) for needed in (plan, *plan.needs)}
        made |= {f"{tmp_path}/sweeps/{word.removeprefix('sweep=')}" for word in words if word.startswith("sweep=")}
        for place in _read_by(words, tmp_path):  # of an earlier command, or an artifact of one
            assert any(place == there or place.startswith(f"{there}/") for there in made), shlex.join(words)


def _read_by(words: list[str], folder: Path) -> Iterator[str]:
    """The paths below `folder` that a command names, but for where it puts its own."""
    for word in words:
        key, _, value = word.partition("=")
        if key not in ("runs_dir", "sweeps_dir"):
            yield from (
                part for part in value.strip("[]{}").replace(": ", ",").split(",") if part.startswith(str(folder))
            )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_seeds_share_nothing_that_is_drawn(script: Path, tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = commands(script, tmp_path / "one", 0), commands(script, tmp_path / "two", 0, 7)
    drawn = [words for words in two if any(word == "artifact_seed=7" for word in words)]
    assert len(drawn) >= len(one) / 2
    assert all("seed=7" in words for words in drawn)
    names = [word for words in two for word in words if word.startswith(("name=", "sweep="))]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_study_runs_from_its_first_command_to_its_last(
    tmp_path: Path, plan_of: Callable[..., Plan], without_reports: None
):
    for words in commands(ROOT / "experiments/generalisation_diversity/run.sh", tmp_path, 0):
        execute(plan_of("debug=smoke", *words))
    assert json.loads((tmp_path / "runs/generalisation_diversity/generalisation_s0/generalisation.json").read_text())
