"""The studies' scripts: every command that they give composes, for one seed and for several, and reads what is made."""

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

STUDIES = (
    "personalized_soups",
    "rewards_in_context",
    "safe_rlhf",
    "generalisation_diversity",
    "reward_ensembles",
)
# stands for python: writes down what it is asked, and does nothing
STAND_IN = f"""#!{sys.executable} -S
import json, os, sys
print(json.dumps(sys.argv[1:]), file=open(os.environ["ASKED"], "a"))
"""


def commands(study: str, folder: Path, runs: Path, *seeds: int) -> list[list[str]]:
    """The arguments of each `python launch.py` that a study runs, as its shell expands them."""
    (folder / "bin").mkdir(parents=True)
    stand_in = folder / "bin/python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
        "ASKED": str(folder / "asked"),
        "RUNS_DIR": str(runs),
        "SWEEPS_DIR": str(runs / "sweeps"),
    }
    script = ROOT / "experiments" / study / "run.sh"
    subprocess.run(["bash", str(script), *map(str, seeds)], env=environment, check=True, capture_output=True)
    asked = [json.loads(line) for line in (folder / "asked").read_text().splitlines()]
    assert all(each[0] == "launch.py" for each in asked)
    return [each[1:] for each in asked]


def point(words: list[str], end: int) -> list[str]:
    """The first or the last point of a sweep; a command that is none, as it is."""
    if "-m" not in words:
        return words
    typed = [word.partition("=") for word in words if word != "-m"]
    return [f"{key}={value if '[' in value else value.split(',')[end]}" for key, _, value in typed]


def read_by(words: list[str], runs: Path) -> Iterator[str]:
    """The paths below `runs` that a command names, but for where it puts its own."""
    for word in words:
        key, _, value = word.partition("=")
        if key not in ("runs_dir", "sweeps_dir"):
            parts = value.strip("[]{}").replace(": ", ",").split(",")
            yield from (part for part in parts if part.startswith(str(runs)))


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_every_command_composes(study: str, tmp_path: Path, untouched: Path, plan_of: Callable[..., Plan]):
    for words in commands(study, tmp_path, untouched, 0):
        for each in {tuple(point(words, end)) for end in (0, -1)}:
            plan = plan_of(*each)
            assert plan.config["stage"]["_target_"].startswith("rlhf_lab.stages."), shlex.join(each)


@pytest.mark.parametrize("study", STUDIES)
def test_each_command_reads_what_an_earlier_one_made(study: str, tmp_path: Path):
    runs, made = tmp_path / "runs", set[str]()
    for words in commands(study, tmp_path, runs, 0, 1):
        for place in read_by(words, runs):
            if not place.startswith(f"{runs}/tiny_help/"):  # artifacts, which whoever reads them has made
                assert any(place == there or place.startswith(f"{there}/") for there in made), shlex.join(words)
        for word in words:
            key, _, value = word.partition("=")
            if key in ("name", "sweep"):
                made.add(str(runs / "sweeps" / value if key == "sweep" else runs / value))


@pytest.mark.parametrize("study", STUDIES)
def test_everything_is_drawn_anew_for_each_seed(study: str, tmp_path: Path):
    asked = commands(study, tmp_path, tmp_path / "runs", 0, 7)
    anew = [words for words in asked if "artifact_seed=7" in words]
    assert len(anew) == sum("artifact_seed=0" in words for words in asked) > 1
    assert all("seed=7" in words and not any("_s0" in word for word in words) for words in anew)
    names = [word for words in asked for word in words if word.startswith(("name=", "sweep="))]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_study_runs_from_its_first_command_to_its_last(
    tmp_path: Path, smoke_runs: Path, plan_of: Callable[..., Plan], without_reports: None
):
    for words in commands("generalisation_diversity", tmp_path, smoke_runs, 0):
        execute(plan_of("debug=smoke", *words))
    found = json.loads((smoke_runs / "generalisation_diversity/generalisation_s0/generalisation.json").read_text())
    assert {row["split"] for row in found["rows"]} == {"test", "ood_domain", "ood_template", "ood_items"}
