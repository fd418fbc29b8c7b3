"""W&B as a mirror: offline it writes into the run directory, keeps its id, and holds no key."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from rlhf_lab.tracking import WandbTracker

ROOT = Path(__file__).resolve().parents[1]
KEY = "0123456789abcdef0123456789abcdef01234567"


def everything(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def test_online_without_a_key_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"WANDB_API_KEY.*tracker.mode=offline"):
        WandbTracker("p", "online").start(tmp_path, {"name": "x"})
    assert list(tmp_path.iterdir()) == []


def test_offline_run_is_written_and_continued_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MY_SECRET", "s3cr3t-v4lue")
    ids = []
    for step in (0, 1):
        tracker = WandbTracker("p", "offline")
        tracker.start(tmp_path, {"name": "x", "seed": 0})
        tracker.log(step, {"objective/kl": 0.5, "episode": float(step)})
        tracker.finish("finished")
        ids.append(json.loads((tmp_path / "tracker.json").read_text())["id"])
        time.sleep(1.1)  # W&B names a sitting by its second
    assert ids[0] == ids[1]
    written = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert written
    assert set(written) == {f"run-{ids[0]}.wandb"}
    stored = everything(tmp_path)
    assert b"objective/kl" in stored
    assert KEY.encode() not in stored
    assert b"s3cr3t-v4lue" not in stored


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from rlhf_lab.tracking import WandbTracker
directory, end = Path(sys.argv[1]), sys.argv[5]
kept, first, last = map(int, sys.argv[2:5])
tracker = WandbTracker("p", "offline")
tracker.start(directory, {"name": "x", "seed": 0})
for step in (*range(kept + 1), *range(first, last + 1)):
    tracker.log(step, {"loss": step / 8, "episode": float(step)})
if end == "killed":
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish(end)
"""


def sitting(directory: Path, kept: int, first: int, last: int, end: str) -> int:
    """A process that logs the steps `first` to `last`, and before them again those up to `kept`."""
    typed = [sys.executable, "-c", PROGRAM, str(directory), *map(str, (kept, first, last)), end]
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # not this process's W&B
    answer = subprocess.run(typed, cwd=ROOT, env=own, capture_output=True, text=True, timeout=120, check=False)
    print(answer.stderr)
    return answer.returncode


BLOCK = 32768


def pieces(content: bytes) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log format after a header of seven bytes; one cut short is left out."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:  # what is left of a block is filled up
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        if not kind:
            return
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or the last part of one
            yield whole
            whole = b""


def records(directory: Path) -> Iterator[Any]:
    """What W&B wrote, sitting after sitting."""
    wandb_internal_pb2: Any = import_module("wandb.proto.wandb_internal_pb2")

    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for piece in pieces(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(piece)
            yield record


def ending(directory: Path) -> list[int]:
    """The exit codes that W&B was told."""
    return [r.exit.exit_code for r in records(directory) if r.WhichOneof("record_type") == "exit"]


def test_after_a_kill_the_same_wandb_run_goes_on_with_every_step_once(tmp_path):
    pytest.importorskip("wandb")
    assert sitting(tmp_path, -1, 0, 5, "killed") == -signal.SIGKILL
    known = json.loads((tmp_path / "tracker.json").read_text())["id"]
    time.sleep(1.1)  # W&B names a sitting by its second
    assert sitting(tmp_path, 2, 3, 4, "failed") == 0  # from a checkpoint after 2, to a failure after 4
    assert ending(tmp_path) == [1]
    time.sleep(1.1)
    assert sitting(tmp_path, 2, 3, 7, "finished") == 0
    written = list(records(tmp_path))
    assert {record.run.run_id for record in written if record.run.run_id} == {known}
    steps = [record.history.step.num for record in written if record.WhichOneof("record_type") == "history"]
    assert steps == list(range(8))
    assert ending(tmp_path) == [0]


def test_a_run_that_stops_to_go_on_elsewhere_is_preempting(tmp_path):
    pytest.importorskip("wandb")
    assert sitting(tmp_path, -1, 0, 1, "stopped") == 0
    kinds = [record.WhichOneof("record_type") for record in records(tmp_path)]
    assert "preempting" in kinds
