"""Every command of the README and of the pages beside it composes, and everything they name is there."""

import re
import shlex
from collections.abc import Callable

import pytest

from rlhf_lab.launch.asking import OPTIONS, asked
from rlhf_lab.launch.compose import ROOT, Plan
from rlhf_lab.launch.main import with_own_data

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)]
LINES = [line.split(" #")[0].strip().split("&& ")[-1] for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if "launch.py" in line]
TABLED = [
    command
    for line in README.splitlines()
    if line.startswith("| ") and line.count(" | ") >= 3
    for command in re.findall(r"`([^`]*=[^`]*)`", line.split(" | ")[3])
]
# what a person has to name beside them
BESIDE = {"stage=safety_test": ["model.policy=embedded:tiny"]}
VERBS = [command for command in COMMANDS if shlex.split(command)[2].split("=")[0] in OPTIONS]


def filled(word: str) -> str:
    """What a person types for a word: a path where the README says <…>, one point of a sweep."""
    word = re.sub(r"<[^>]*>", "some/path", word)
    return word if "[" in word else word.split(",")[0]


def test_the_readme_has_commands_to_check():
    assert len(COMMANDS) > 10
    assert "python launch.py algorithm=ppo_lag reward=ensemble_uwo" in COMMANDS


@pytest.mark.parametrize("command", dict.fromkeys(c for c in COMMANDS if "--help" not in c and c not in VERBS))
def test_each_command_composes(command: str, plan_of: Callable[..., Plan]):
    words = [filled(word) for word in shlex.split(command)[2:] if word != "-m"]
    plan = plan_of(*with_own_data(words))
    assert plan.config["stage"]["_target_"].startswith("rlhf_lab.stages.")


def test_every_verb_is_shown_and_is_one():
    shown = [asked([filled(word) for word in shlex.split(command)[2:]]) for command in VERBS]
    assert {wish.verb for wish in shown if wish is not None} == set(OPTIONS)


@pytest.mark.parametrize("command", TABLED)
def test_each_command_of_the_map_composes(command: str, plan_of: Callable[..., Plan]):
    assert plan_of(*shlex.split(command), *BESIDE.get(command, []))


def test_the_map_names_every_algorithm():
    there = {path.stem for path in (ROOT / "conf/algorithm").glob("*.yaml")}
    assert {word.removeprefix("algorithm=") for command in TABLED for word in command.split()} >= there


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"`([\w/{}.,]+\.(?:py|toml))`", README)
    assert named
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "rlhf_lab" / name).exists(), name


def test_every_picture_and_page_is_there():
    for page, text in PAGES.items():
        for target in re.findall(r"\[[^]]*]\((?!https)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
