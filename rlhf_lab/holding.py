"""Holding a run's directory: one process at a time, and of several ranks the first alone."""

import fcntl
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from rlhf_lab.engine import ranks

Result = TypeVar("Result")


class RunRefused(ValueError):
    """The run directory cannot be used for this run; the message says why and what to do."""


def take(directory: Path) -> FileIO:
    """The lock of a run directory, which is made if it is not there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("ab+", buffering=0)  # a full disk must not fail its closing
    except OSError as error:
        raise RunRefused(
            f"cannot write to {directory}: {error.strerror}; choose another place with runs_dir="
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read().decode().strip() or "another process"
        raise RunRefused(
            f"{directory} is in use by {holder}; wait for it, or give this run a name of its own with name="
        ) from error
    return lock


def first_decides(decide: Callable[[], Result]) -> Result:
    """What the first rank finds, on every rank; or its refusal.

    Raises:
        RunRefused: on all ranks.
    """
    found: Any = None
    refusal = ""
    if ranks.is_first():
        try:
            found = decide()
        except RunRefused as error:
            if ranks.world() == 1:
                raise
            refusal = str(error)
    found, refusal = ranks.broadcast((found, refusal))
    if refusal:
        raise RunRefused(refusal)
    return found
