"""The killer kills where it is told to, and what a kill leaves is called by its name."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.chaos.doom import AtFirst, AtOperation, AtTime, forget_library, sit

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

PROGRAM = """
import os, pathlib, subprocess, sys
pathlib.Path("elsewhere").write_text("not counted")
subprocess.run([sys.executable, "-c", "open('runs/child', 'w').write('not counted')"])
os.mkdir("runs/new")
with open("runs/new/.a.tmp", "w") as file:
    file.write("x" * 100)
    file.flush()
    os.fsync(file.fileno())
os.replace("runs/new/.a.tmp", "runs/new/a")
os.remove("runs/old")
"""
OPERATIONS = ["mkdir new", "open new/.a.tmp", "write new/.a.tmp", "fsync new/.a.tmp", "rename new/a", "unlink old"]


def started(folder: Path, moment: AtFirst | AtOperation | AtTime | None):
    (folder / "runs").mkdir()
    (folder / "runs/old").write_text("old")
    return sit(folder, [sys.executable, "-c", PROGRAM], moment)


@pytest.fixture(scope="module", autouse=True)
def _clean():
    yield
    forget_library()


def test_what_a_process_does_to_the_files_is_counted_and_nothing_else(tmp_path: Path):
    sitting = started(tmp_path, None)
    assert sitting.code == 0
    assert sitting.operations == OPERATIONS
    assert (tmp_path / "runs/child").read_text() == "not counted"


@pytest.mark.parametrize("place", range(len(OPERATIONS)))
@pytest.mark.parametrize("half", [True, False])
def test_a_kill_comes_at_its_operation_and_leaves_what_was_done_by_then(place: int, half: bool, tmp_path: Path):
    sitting = started(tmp_path, AtOperation(place=place, half=half))
    assert sitting.killed
    assert sitting.operations == OPERATIONS[: place + 1]
    done = place + (not half)  # operations that have their effect
    runs = tmp_path / "runs"
    assert (runs / "new").exists() == (done >= 1)
    assert (runs / "new/.a.tmp").exists() == (2 <= done < 5)
    assert (runs / "new/a").exists() == (done >= 5)
    assert (runs / "old").exists() == (done < 6)
    if (runs / "new/.a.tmp").exists():
        written = 100 if done >= 3 else 50 if place == 2 else 0
        assert (runs / "new/.a.tmp").read_text() == "x" * written


def test_a_kill_comes_at_its_time_or_never_to_what_was_faster(tmp_path: Path):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/runs").mkdir()
    assert sit(tmp_path / "slow", ["sleep", "60"], AtTime(seconds=0.2)).killed
    (tmp_path / "fast").mkdir()
    assert started(tmp_path / "fast", AtTime(seconds=60)).code == 0


def test_a_kill_comes_at_the_first_operation_that_is_like_the_pattern(tmp_path: Path):
    sitting = started(tmp_path, AtFirst(like="* new/.?.tmp", half=False))
    assert sitting.operations == OPERATIONS[:2]
    assert (tmp_path / "runs/new/.a.tmp").read_text() == ""
    assert sitting.killed
    (tmp_path / "never").mkdir()
    assert started(tmp_path / "never", AtFirst(like="rmdir *", half=True)).code == 0
