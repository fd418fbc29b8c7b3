"""A few kills of each family; `python -m tests.chaos` does many."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.doom import AtFirst, forget_library
from tests.chaos.families import FAMILIES
from tests.chaos.harness import Chain, Trial

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runs directory in which the artifacts gather that one family built and the next may take over."""
    yield tmp_path_factory.mktemp("shelf") / "runs"
    forget_library()


def beside(shelf: Path, folder: Path, family: str) -> Trial:
    """A trial that takes its artifacts from the shelf, and leaves there what it had to build."""
    trial = Trial(folder / "trial", FAMILIES[family], artifacts=shelf if shelf.exists() else None, say=print)
    shutil.copytree(trial.whole.runs, shelf, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    if any(" run/" not in operation for operation in trial.whole.sitting.operations):
        assert trial.control() == []
    return trial


def assert_nothing_lost(chain: Chain, kills: int) -> None:
    assert chain.losses == []
    assert [kill.faults for kill in chain.kills] == [[]] * kills


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_is_killed_in_its_writes_ends_as_the_undisturbed_one(family: str, shelf: Path, tmp_path: Path):
    trial = beside(shelf, tmp_path, family)
    moment = trial.alone.moment(random.Random(family), timed=False)  # a clock would mostly find it importing
    assert_nothing_lost(trial.chain(0, [moment], from_nothing=False), 1)


# where half of something has its name, or what comes after the last step is not yet there
AWKWARD = (
    AtFirst(like="write run/warnings.jsonl", half=True),
    AtFirst(like="write run/warnings.jsonl", half=False),
    AtFirst(like="write run/metrics.jsonl", half=True),
    AtFirst(like="unlink* run/checkpoints/*", half=False),
    AtFirst(like="rename run/policy", half=False),
    AtFirst(like="open run/plots/.*", half=False),
    AtFirst(like="unlink* run/.checkpoints.*", half=False),
)


def test_a_run_that_is_killed_where_it_hurts_most_ends_as_the_undisturbed_one(shelf: Path, tmp_path: Path):
    trial = beside(shelf, tmp_path, "main job")
    assert_nothing_lost(trial.chain(0, AWKWARD, from_nothing=False), len(AWKWARD))
