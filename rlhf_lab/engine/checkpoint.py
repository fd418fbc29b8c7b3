"""Nested states on disk: tensors as safetensors, the rest as JSON, both hashed, both there or neither.

A checkpoint is a folder that appears under its name in one rename, after its files are on the disk. What is damaged
is said loudly and never loaded in part. No pickles.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

TENSORS, TREE, HASHES = "tensors.safetensors", "tree.json", "sha256.json"
_REFERENCE, _INTEGER_KEYS = "$tensor", "$int_keys"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are missing or do not match their hashes."""


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str, flush: bool = True) -> None:
    """Write a text file that is whole or not there: temporary name, flush to disk, rename.

    Without the flush it is whole after the death of this process, but perhaps not after that of the machine.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append a line, flushed to disk; if the disk does not take it all, none of it stays.

    A process that is killed meanwhile may leave a part of a long line, without its end; the next line takes its place.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    before = os.fstat(descriptor).st_size
    try:
        if before and os.pread(descriptor, 1, before - 1) != b"\n":
            before = path.read_bytes().rfind(b"\n") + 1
            os.ftruncate(descriptor, before)
        waiting = memoryview(f"{line}\n".encode())
        while waiting:
            waiting = waiting[os.write(descriptor, waiting) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, before)
        raise
    finally:
        os.close(descriptor)


def seal(folder: Path) -> None:
    """Leave the hashes of a folder's files beside them."""
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / HASHES).write_text(json.dumps(hashes))


def check_seal(folder: Path) -> None:
    """See that a folder's files are those that were sealed.

    Raises:
        DamagedCheckpoint: one is missing, cannot be read, or has other bytes; or there is no seal.
    """
    try:
        hashes = json.loads((folder / HASHES).read_text())
        found = {name: sha256(folder / name) for name in hashes}
    except (OSError, ValueError) as error:  # ValueError: not JSON, not even text
        raise DamagedCheckpoint(f"{folder} is incomplete: {error}") from error
    if not hashes or hashes != found:
        raise DamagedCheckpoint(f"the files of {folder} do not match the hashes that were saved with them")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name: files and folder flushed to disk, then one rename.

    A folder that has the name already goes last, when nothing can fail any more but the machine; never is half of it
    there.
    """
    for entry in temporary.rglob("*"):
        if entry.is_file():
            _flush(entry)
    _flush(temporary)
    remove(final, lambda: os.replace(temporary, final))
    _flush(final.parent)


def remove(folder: Path, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Remove a folder, if it is there, so that its name has all of it or none: renamed first, then emptied.

    Args:
        meanwhile: what is done between the two, e.g. to give the name to another folder.
    """
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        with contextlib.suppress(FileNotFoundError):  # by another process that does the same
            os.replace(folder, doomed)
    meanwhile()
    shutil.rmtree(doomed, ignore_errors=True)


def _detach(tree: Any, tensors: dict[str, torch.Tensor], path: str) -> Any:
    """The tree with every tensor replaced by a reference; the tensors go into `tensors`."""
    if isinstance(tree, torch.Tensor):
        tensors[path] = tree.detach().cpu().contiguous()
        return {_REFERENCE: path}
    if isinstance(tree, dict):
        kind = {type(key) for key in tree}
        if not kind <= {str} and not kind <= {int}:
            raise TypeError(f"checkpoint keys at {path!r} are {kind}; they must be all strings or all integers")
        entries = {str(key): _detach(value, tensors, f"{path}/{key}") for key, value in tree.items()}
        return {_INTEGER_KEYS: entries} if kind == {int} else entries
    if isinstance(tree, list | tuple):
        return [_detach(value, tensors, f"{path}/{i}") for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"checkpoint cannot hold a {type(tree).__name__} (at {path!r})")


def _attach(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, dict):
        if _REFERENCE in tree:
            return tensors[tree[_REFERENCE]]
        if _INTEGER_KEYS in tree:
            return {int(key): _attach(value, tensors) for key, value in tree[_INTEGER_KEYS].items()}
        return {key: _attach(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_attach(value, tensors) for value in tree]
    return tree


def save_tree(folder: Path, tree: dict[str, Any]) -> None:
    """Save nested dicts and lists of tensors, numbers, strings and None as the folder `folder`, atomically.

    Tuples come back as lists. A folder of that name is replaced.

    Raises:
        TypeError: the tree holds anything else.
        OSError: the disk is full or read-only; the name is then not taken.
    """
    tensors: dict[str, torch.Tensor] = {}
    spelled = json.dumps(_detach(tree, tensors, ""))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / TENSORS)
        (temporary / TREE).write_text(spelled)
        seal(temporary)
        publish(temporary, folder)
    except SafetensorError as error:  # which is what a full disk is to safetensors
        raise OSError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_tree(folder: Path) -> dict[str, Any]:
    """What `save_tree` saved.

    Raises:
        DamagedCheckpoint: a file is missing, or its bytes are not those that were saved.
    """
    check_seal(folder)
    return _attach(json.loads((folder / TREE).read_text()), load_file(folder / TENSORS))


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """(step, path) of the checkpoints `step_N` in `folder`, the latest first."""
    found = [(path.name.removeprefix("step_"), path) for path in folder.glob("step_*") if path.is_dir()]
    yield from sorted(((int(step), path) for step, path in found if step.isdecimal()), reverse=True)


def load_newest(folder: Path, warn: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
    """(step, tree) of the latest sound checkpoint in `folder`, or None if there is none at all.

    A damaged one is said, and removed once an older one is found sound, lest it counts among those that are kept.

    Raises:
        DamagedCheckpoint: there are checkpoints, and every one is damaged.
    """
    damaged: list[tuple[Path, DamagedCheckpoint]] = []
    for step, path in checkpoints(folder):
        try:
            tree = load_tree(path)
        except DamagedCheckpoint as error:
            warn(f"damaged checkpoint, trying the one before it: {error}")
            damaged.append((path, error))
            continue
        for other, _ in damaged:
            remove(other)
        return step, tree
    if damaged:
        raise damaged[0][1]
    return None
