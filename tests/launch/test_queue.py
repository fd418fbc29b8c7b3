"""What SLURM's tools say, from programs of their names that print what SLURM 22.05 printed."""

import stat
from pathlib import Path

import pytest

from rlhf_lab.launch.queue import Queued, expanded, queued

SQUEUE = """\
7_0|RUNNING|None|node[1-2]
7_1|PENDING|Resources|
7_2|COMPLETED|None|node1
"""
SACCT = """\
7_0|RUNNING|0:0
7_3|FAILED|1:0
7_[4-5,7%3]|CANCELLED by 0|0:0
8|RUNNING|0:0
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is searched for programs, with squeue and sacct."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, printed in (("squeue", SQUEUE), ("sacct", SACCT)):
        program(tmp_path / name, f"/bin/cat <<'END'\n{printed}END\n")
    return tmp_path


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_jobs_of_the_queue_and_of_the_accounts(tools):
    found = queued(["7_0", "7_1", "7_2", "7_3", "7_5", "8"])
    assert found is not None
    assert found["7_0"] == Queued(state="RUNNING", reason="node[1-2]")  # the queue knows better than the accounts
    assert found["7_1"] == Queued(state="PENDING", reason="Resources")
    assert [found[job].is_live for job in ("7_0", "7_1", "7_2")] == [True, True, False]
    assert found["7_3"] == Queued(state="FAILED", reason="exit code 1")
    assert found["7_5"].state == found["7_7"].state == "CANCELLED"
    assert not found["8"].is_live  # the controller has forgotten it
    assert "7_6" not in found


def test_a_controller_that_knows_none_of_the_jobs(tools):
    program(tools / "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    found = queued(["7_3"])
    assert found is not None
    assert found["7_3"].state == "FAILED"


def test_without_a_cluster_nothing_is_known(tools):
    program(tools / "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1\n")
    assert queued(["7_0"]) is None
    (tools / "squeue").unlink()
    assert queued(["7_0"]) is None


def test_without_accounts_the_queue_is_enough(tools):
    program(tools / "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1\n")
    assert (queued(["7_0", "7_3"]) or {}).keys() == {"7_0", "7_1", "7_2"}
    assert queued([]) == {}


def test_ranges_of_an_array():
    assert expanded("7_[2-4,9%3]") == ["7_2", "7_3", "7_4", "7_9"]
    assert expanded("7_[0]") == ["7_0"]
    assert expanded("7_1") == ["7_1"]
