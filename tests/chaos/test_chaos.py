"""A few kills of each family; `python -m tests.chaos` does many."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.doom import forget_library
from tests.chaos.families import FAMILIES
from tests.chaos.harness import Trial

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runs directory in which the artifacts gather that one family built and the next may take over."""
    yield tmp_path_factory.mktemp("shelf") / "runs"
    forget_library()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(family: str, shelf: Path, tmp_path: Path):
    trial = Trial(tmp_path / "trial", FAMILIES[family], artifacts=shelf if shelf.exists() else None, say=print)
    shutil.copytree(trial.whole.runs, shelf, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    # at file operations: a clock would mostly find the process importing
    chain = trial.chain(1, seed=0, most=2, from_nothing=False, timed=lambda _: False)
    assert chain.kills
    assert chain.losses == []
    assert [kill.faults for kill in chain.kills] == [[] for _ in chain.kills]
