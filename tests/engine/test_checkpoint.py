"""Checkpoints come back exactly, are refused when damaged, and appear whole or not at all."""

import errno
import inspect
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lab.engine import checkpoint
from rlhf_lab.engine.checkpoint import (
    DamagedCheckpoint,
    append_line,
    checkpoints,
    load_tree,
    publish,
    save_tree,
    sha256,
    write_atomically,
)

TREE: dict[str, Any] = {
    "weights": {"a.weight": torch.randn(3, 4, dtype=torch.float64), "half": torch.randn(5).bfloat16()},
    "optimiser": {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}, 1: {"step": torch.tensor(4.0)}},
        "param_groups": [{"lr": 1e-5, "betas": [0.9, 0.95], "fused": None, "amsgrad": False, "params": [0, 1]}],
    },
    "view": torch.arange(12).reshape(3, 4).T,
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "nothing": {},
    "log_lambda": 0.1 + 0.2,
    "infinite": float("-inf"),
    "large": 2**62 + 1,
    "name": "λ/σ",
    "window": [1, [2.5, None], torch.tensor(7)],
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_tree_comes_back_exactly(tmp_path: Path):
    save_tree(tmp_path / "step_1", TREE)
    assert same(load_tree(tmp_path / "step_1"), TREE)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
    save_tree(tmp_path / "plain", {"only": "numbers", "n": 1})
    assert load_tree(tmp_path / "plain") == {"only": "numbers", "n": 1}


def test_an_optimiser_state_comes_back(tmp_path: Path):
    layer = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    save_tree(tmp_path / "step_1", optimiser.state_dict())
    found = load_tree(tmp_path / "step_1")
    assert list(found["state"]) == [0, 1]
    assert same(found["state"], optimiser.state_dict()["state"])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {1: 2, "b": 3}}, "all strings or all integers"),
        ({"a": {True: 2}}, "all strings or all integers"),
        ({"a": {(1, 2): 3}}, "all strings or all integers"),
        ({"a": [object()]}, r"cannot hold a object \(at '/a/0'\)"),
        ({"a": {1, 2}}, "cannot hold a set"),
    ],
)
def test_what_json_and_safetensors_cannot_hold_is_refused_before_anything_is_written(
    tree: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(TypeError, match=message):
        save_tree(tmp_path / "step_1", tree)
    assert not list(tmp_path.iterdir())


def test_there_is_no_pickle_in_a_checkpoint(tmp_path: Path):
    save_tree(tmp_path / "step_1", TREE)
    files = sorted(path.name for path in (tmp_path / "step_1").iterdir())
    assert files == ["sha256.json", "tensors.safetensors", "tree.json"]
    content = (tmp_path / "step_1" / "tensors.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["/weights/half"]["dtype"] == "BF16"
    json.loads((tmp_path / "step_1" / "tree.json").read_text())
    source = inspect.getsource(checkpoint)
    assert not [word for word in ("import pickle", "torch.load", "torch.save") if word in source]


@pytest.mark.parametrize("name", ["tensors.safetensors", "tree.json", "sha256.json"])
@pytest.mark.parametrize(
    "damage", ["first byte", "middle byte", "last byte", "not text", "cut", "emptied", "removed", "a list"]
)
def test_damage_is_noticed(name: str, damage: str, tmp_path: Path):
    save_tree(tmp_path / "step_1", {"a": torch.arange(10), "b": 1.5})
    path = tmp_path / "step_1" / name
    content = bytearray(path.read_bytes())
    place = {"first byte": 0, "middle byte": len(content) // 2, "last byte": len(content) - 1}
    if damage in place:
        content[place[damage]] ^= 1
        path.write_bytes(content)
    elif damage == "removed":
        path.unlink()
    else:
        changed = {"not text": b"\xff" + content, "cut": content[:-7], "emptied": b"", "a list": b"[]"}
        path.write_bytes(changed[damage])
    with pytest.raises(DamagedCheckpoint, match="step_1"):
        load_tree(tmp_path / "step_1")


def test_a_folder_that_is_not_there_is_damaged(tmp_path: Path):
    with pytest.raises(DamagedCheckpoint, match="step_9 is incomplete"):
        load_tree(tmp_path / "step_9")


@pytest.mark.parametrize("place", ["save_file", "sha256", "_flush"])
def test_an_exception_in_the_middle_leaves_the_previous_checkpoints(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_tree(tmp_path / "step_1", {"n": 1})
    save_tree(tmp_path / "step_2", {"n": 2})

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "the disk went away")

    monkeypatch.setattr(checkpoint, place, fail)
    for name in ("step_2", "step_3"):
        with pytest.raises(OSError, match="went away"):
            save_tree(tmp_path / name, {"n": 9})
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]
    assert [load_tree(path) for _, path in checkpoints(tmp_path)] == [{"n": 2}, {"n": 1}]


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path):
    save_tree(tmp_path / "step_1", {"n": 1, "x": torch.ones(3)})
    save_tree(tmp_path / "step_1", {"n": 2})
    assert load_tree(tmp_path / "step_1") == {"n": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    mounter = shutil.which("mount")
    if os.geteuid() != 0 or mounter is None:
        pytest.skip("only root may mount a small disk")
    command = [mounter, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a small disk be mounted")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(small_disk: Path):
    save_tree(small_disk / "step_1", {"x": torch.ones(1000)})
    with pytest.raises(OSError, match=r"(?i)space|size"):
        save_tree(small_disk / "step_2", {"x": torch.ones(1_000_000)})
    assert [path.name for path in small_disk.iterdir()] == ["step_1"]
    assert load_tree(small_disk / "step_1")["x"].sum() == 1000
    with pytest.raises(OSError, match=r"(?i)space|size"):
        write_atomically(small_disk / "status.json", "x" * 2_000_000)
    assert [path.name for path in small_disk.iterdir()] == ["step_1"]


def test_write_atomically_leaves_the_old_text_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "status.json"
    write_atomically(path, "old")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_publish_flushes_every_file_before_the_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    monkeypatch.setattr(checkpoint, "_flush", lambda path: events.append(path.name))
    rename = os.replace

    def note(a: Path, b: Path) -> None:
        events.append("rename")
        rename(a, b)

    monkeypatch.setattr(os, "replace", note)
    temporary = tmp_path / "temporary"
    (temporary / "inner").mkdir(parents=True)
    (temporary / "a").write_text("1")
    (temporary / "inner" / "b").write_text("2")
    publish(temporary, tmp_path / "final")
    at = events.index("rename")
    assert {"a", "b", "temporary"} <= set(events[:at])
    assert events[at + 1 :] == [tmp_path.name]
    assert (tmp_path / "final" / "inner" / "b").read_text() == "2"


def test_checkpoints_are_listed_latest_first(tmp_path: Path):
    for name in ("step_9", "step_10", "step_2", ".step_11.77.tmp", "policy"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_12").write_text("a file is no checkpoint")
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 9, 2]


def test_sha256_is_the_digest_that_other_tools_print(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


@pytest.mark.parametrize("torn", ["", '{"step": 2, "rew', "{"])
def test_a_line_that_was_cut_short_is_replaced_by_the_next(torn: str, tmp_path: Path):
    log = tmp_path / "log"
    for line in ("first", "second"):
        append_line(log, line)
    with log.open("a") as file:
        file.write(torn)
    append_line(log, "third")
    append_line(log, "fourth")
    assert log.read_text() == "first\nsecond\nthird\nfourth\n"


def test_a_line_that_was_cut_short_may_be_the_first(tmp_path: Path):
    (tmp_path / "log").write_text("fir")
    append_line(tmp_path / "log", "first")
    assert (tmp_path / "log").read_text() == "first\n"
