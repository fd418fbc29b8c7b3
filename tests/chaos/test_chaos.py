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


MAIN, *OTHERS = FAMILIES


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """The main job, whose artifacts the other families take over."""
    trial = Trial(tmp_path_factory.mktemp("main_job"), FAMILIES[MAIN], artifacts=None, say=print)
    assert trial.control() == []
    yield trial
    forget_library()


def assert_nothing_lost(chain: Chain, kills: int) -> None:
    assert chain.losses == []
    assert [kill.faults for kill in chain.kills] == [[]] * kills


# `python -m tests.chaos` kills all of them, twenty times each
@pytest.mark.long
@pytest.mark.parametrize("family", OTHERS)
def test_a_run_that_is_killed_in_its_writes_ends_as_the_undisturbed_one(family: str, main_job: Trial, tmp_path: Path):
    trial = Trial(tmp_path, FAMILIES[family], artifacts=main_job.whole.runs, say=print)
    if any(" run/" not in operation for operation in trial.whole.sitting.operations):  # it needed other artifacts too
        assert trial.control() == []
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


def test_a_run_that_is_killed_where_it_hurts_most_ends_as_the_undisturbed_one(main_job: Trial):
    assert_nothing_lost(main_job.chain(0, AWKWARD, from_nothing=False), len(AWKWARD))
