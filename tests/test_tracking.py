"""W&B as a mirror: offline it writes into the run directory, keeps its id, and holds no key."""

import json
from pathlib import Path

import pytest

from rlhf_lab.tracking import WandbTracker

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
    assert ids[0] == ids[1]
    written = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert written
    assert set(written) == {f"run-{ids[0]}.wandb"}
    stored = everything(tmp_path)
    assert b"objective/kl" in stored
    assert KEY.encode() not in stored
    assert b"s3cr3t-v4lue" not in stored
