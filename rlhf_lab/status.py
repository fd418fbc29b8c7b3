"""Where a run stands: status.json, which is whole at every moment and tells who works on it and how far it is."""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf_lab.console import SHOWN
from rlhf_lab.engine import high_water
from rlhf_lab.engine.checkpoint import write_atomically

State = Literal["running", "stopped", "failed", "finished"]
SECONDS_BETWEEN_WRITES = 2.0
LONGEST_ERROR = 400


def read_status(directory: Path) -> dict[str, Any]:
    """What status.json says; nothing if there is none, or if the machine died while it was written."""
    try:
        stored = json.loads((directory / "status.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return stored if isinstance(stored, dict) else {}


def first_line(error: BaseException) -> str:
    """An error on one line: its kind, and the first line of what it says."""
    said = (str(error).splitlines() or [""])[0][:LONGEST_ERROR]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class Status:
    """The status of a run, as the process writes it that works on the run now.

    The file has: state; started and updated (local time); seconds, worked on it in all sittings; peak_memory_mib of
    this sitting, of several ranks the one that held most; process and host, of this one; sittings, how many processes
    have worked on it; progress; and error or reason, the first line of why it failed or stopped. On a GPU also
    peak_device_memory_mib, what torch held there at most.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "status.json"
        before = read_status(directory)
        self._begun = self._written = time.monotonic()
        self._started: str = before.get("started", time.strftime("%F %T"))
        self._earlier: float = before.get("seconds", 0.0)
        self._sittings: int = before.get("sittings", 0) + 1
        self._progress: dict[str, Any] = before.get("progress", {})
        self._held = (0.0, 0.0)

    def held(self, main: float, devices: float) -> None:
        """Heed what any rank held at most, in MiB."""
        self._held = high_water.highest([self._held, (main, devices)])

    def _spelled(self, state: State, more: Mapping[str, Any]) -> str:
        main, devices = high_water.highest([self._held, high_water.since_begin()])
        status = {
            "state": state,
            "started": self._started,
            "updated": time.strftime("%F %T"),
            "seconds": round(self._earlier + time.monotonic() - self._begun, 1),
            "peak_memory_mib": round(main),
            **({"peak_device_memory_mib": round(devices)} if devices else {}),
            "process": os.getpid(),
            "host": socket.gethostname(),
            "sittings": self._sittings,
            "progress": self._progress,
            **more,
        }
        return json.dumps(status, indent=1)

    def write(self, state: State, **more: Any) -> None:
        """Say how the run stands, flushed to disk."""
        write_atomically(self._file, self._spelled(state, more))
        self._written = time.monotonic()

    def write_last(self, state: State, **more: Any) -> None:
        """Say how the run ended; over the old text where a full disk has no room for a second one, if that can be."""
        try:
            self.write(state, **more)
        except OSError:
            with contextlib.suppress(OSError), self._file.open("r+b", buffering=0) as file:
                file.write(self._spelled(state, more).encode())
                file.truncate()

    def progress(self, what: str, step: int, steps: int, per_second: float, latest: Mapping[str, float]) -> None:
        """`step` of `steps` are done; now and then this is written, unflushed, since a later one will follow.

        Args:
            latest: metrics of the last step, of which those are kept that a person asks for first.
        """
        values = {short: latest[name] for name, short in SHOWN.items() if name in latest}
        self._progress = {"what": what, "step": step, "steps": steps, "per_second": round(per_second, 4)}
        self._progress |= {short: value if math.isfinite(value) else str(value) for short, value in values.items()}
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            write_atomically(self._file, self._spelled("running", {}), flush=False)
            self._written = time.monotonic()

    def reached(self, step: int) -> None:
        """The step that is saved, where the loop ends before it is counted."""
        if self._progress:
            self._progress["step"] = step
