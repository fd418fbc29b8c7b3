"""One run, one directory: what was asked, where and with what it ran, what it measured, and where it stands."""

import contextlib
import fcntl
import json
import math
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

from rlhf_lab.console import Console
from rlhf_lab.engine.checkpoint import (
    DamagedCheckpoint,
    checkpoints,
    load_tree,
    publish,
    save_tree,
    sha256,
    write_atomically,
)
from rlhf_lab.interfaces import Tracker
from rlhf_lab.types import Metrics

KEPT_CHECKPOINTS = 2
# settings that change nothing that a run measures
INCIDENTAL = ("tracker", "artifacts", "hardware.threads", "stage.hardware.threads")
PREAMBLE = {
    *(".lock", "config.yaml", "overrides.yaml", "environment.json", "status.json", "error.txt", "warnings.jsonl"),
    *("tracker.json", "wandb"),
}
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "hydra-core", "omegaconf", "numpy", "safetensors")


class RunRefused(ValueError):
    """The run directory cannot be used for this run; the message says why and what to do."""


def difference(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Lines `key: before -> after` for every leaf in which two nested configurations differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from difference(before.get(key, "absent"), after.get(key, "absent"), f"{path}.{key}" if path else key)
    elif before != after:
        yield f"{path}: {before!r} -> {after!r}"


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def input_hashes(folder: Path) -> dict[str, str]:
    """file -> digest of the weights and data in a folder that a run reads."""
    return {
        str(file.relative_to(folder)): sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.suffix in {".safetensors", ".parquet"} and "checkpoints" not in file.parts
    }


def code_state() -> dict[str, Any]:
    """The commit of this code, and how its files differ from that."""
    dirty = _git("diff", "HEAD")
    return {"sha": _git("rev-parse", "HEAD"), "dirty": bool(dirty), "diff": dirty}


def environment(artifacts: Mapping[str, Path]) -> dict[str, Any]:
    """Where and with what code a run runs; never the environment variables.

    `artifacts` maps a name to the folder that the run reads; each is listed with the hashes of its weights and data.
    """
    hashed = {name: {"path": str(path), "sha256": input_hashes(path)} for name, path in artifacts.items()}
    return {
        "git": code_state(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": " ".join(sys.argv),
        "artifacts": hashed,
    }


class Run:
    """An open run directory, held by one process.

    Metrics of a step are appended when the step is done. After a crash the run continues from its latest sound
    checkpoint, and what was logged after that checkpoint is taken back, so every step stands in the log once.
    """

    def __init__(self, directory: Path, *, seed: int, tracker: Tracker, console: Console, lock: FileIO) -> None:
        self.directory, self.seed, self.tracker, self.console = directory, seed, tracker, console
        self._lock = lock
        self._started = time.time()
        self.last: Metrics = {}
        self._warned: list[str] = []  # lines of warnings.jsonl from this process

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        config: dict[str, Any],
        overrides: list[str],
        artifacts: Mapping[str, Path],
        tracker: Tracker,
        console: Console,
    ) -> "Run":
        """Take the directory for this configuration, new or to be continued.

        Raises:
            RunRefused: it belongs to another configuration, another process holds it, or it cannot be written.
        """
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
        run = cls(directory, seed=int(config["seed"]), tracker=tracker, console=console, lock=lock)
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n".encode())
            for folder in (".", "checkpoints", "samples", "shards"):
                for half_written in (directory / folder).glob(".*.tmp"):  # by a process that was killed
                    shutil.rmtree(half_written) if half_written.is_dir() else half_written.unlink()
            frozen = directory / "config.yaml"
            if frozen.exists():
                changed = [
                    line
                    for line in difference(yaml.safe_load(frozen.read_text()), config)
                    if not line.startswith(INCIDENTAL)
                ]
                if changed:
                    raise RunRefused(
                        f"{directory} holds a run with another configuration ({'; '.join(changed[:8])}); "
                        "give this run another name with name=, or remove that directory"
                    )
            else:
                write_atomically(directory / "overrides.yaml", yaml.safe_dump(overrides))
                write_atomically(frozen, yaml.safe_dump(config, sort_keys=False))
            if run.finished:
                return run
            write_atomically(directory / "environment.json", json.dumps(environment(artifacts), indent=1))
            run._status("running")
        except OSError as error:
            run.close()
            raise RunRefused(
                f"cannot write to {directory}: {error.strerror}; free space, or choose another place with runs_dir="
            ) from error
        except BaseException:
            run.close()
            raise
        return run

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def finished(self) -> bool:
        return is_finished(self.directory)

    def close(self) -> None:
        """Let go of the directory."""
        self._lock.close()

    def _status(self, state: str, **more: Any) -> None:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status = {
            "state": state,
            "started": time.strftime("%F %T", time.localtime(self._started)),
            "updated": time.strftime("%F %T"),
            "seconds": round(time.time() - self._started, 1),
            "peak_memory_mib": round(kilobytes / 1024),
            "process": os.getpid(),
            **more,
        }
        write_atomically(self.directory / "status.json", json.dumps(status, indent=1))

    def finish(self, metrics: Metrics) -> None:
        """Everything is written: only now does the run count as finished."""
        self._status("finished", metrics=metrics)

    def drop_checkpoints(self) -> None:
        """A finished run needs none."""
        shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)

    def note_failure(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """As the end of a `with` block: why the run stopped, the traceback in error.txt, if the disk still takes it."""
        if error is None:
            (self.directory / "error.txt").unlink(missing_ok=True)
            return
        with contextlib.suppress(OSError):
            self._status("failed", error=f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):
            write_atomically(self.directory / "error.txt", "".join(traceback.format_exception(error)))

    def withdraw(self) -> None:
        """Remove a directory in which nothing was measured or made, so that the mended command finds its name free."""
        made = {path.name for path in self.directory.iterdir() if path.is_dir() or path.stat().st_size}
        if made <= PREAMBLE:
            shutil.rmtree(self.directory)

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one step's metrics to metrics.jsonl, flushed to disk, and pass them to the tracker."""
        self.last = metrics
        line = json.dumps({"step": step, **{key: _plain(value) for key, value in metrics.items()}})
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.tracker.log(step, metrics)

    def warn(self, step: int, message: str) -> None:
        """One loud line on the console, and in warnings.jsonl."""
        self.console.warn(f"step {step}: {message}")
        line = json.dumps({"step": step, "message": message})
        self._warned.append(line)
        with (self.directory / "warnings.jsonl").open("a") as file:
            file.write(line + "\n")

    def write_rows(self, relative: str, rows: list[dict[str, Any]]) -> None:
        """Write a table of samples as JSON lines, whole or not at all."""
        path = self.directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Checkpoint the state after `step`; older ones beyond the last two go once it is safe."""
        folder = self.directory / "checkpoints"
        save_tree(folder / f"step_{step:06d}", state)
        for _, old in list(checkpoints(folder))[KEPT_CHECKPOINTS:]:
            shutil.rmtree(old)

    def resume(self) -> tuple[int, dict[str, Any]] | None:
        """The latest sound checkpoint as (step, state), or None at the beginning of a run.

        A damaged checkpoint is said loudly and the one before it taken. What metrics.jsonl, warnings.jsonl and
        samples/ hold of later steps is taken back, since those steps will be done again.

        Raises:
            RunRefused: there are checkpoints, and every one is damaged.
        """
        damaged: list[str] = []
        for step, path in checkpoints(self.directory / "checkpoints"):
            try:
                state = load_tree(path)
            except DamagedCheckpoint as error:
                self.console.warn(f"damaged checkpoint, trying the one before it: {error}")
                damaged.append(str(error))
                continue
            self._take_back(step)
            self.console.say(f"resuming after step {step} from {path}")
            return step, state
        if damaged:
            raise RunRefused(
                f"no sound checkpoint is left in {self.directory / 'checkpoints'} ({damaged[0]}); "
                "remove that folder to start the run again from its beginning"
            )
        self._take_back(-1)
        return None

    def _take_back(self, step: int) -> None:
        for name in ("metrics.jsonl", "warnings.jsonl"):
            path = self.directory / name
            if path.exists():
                # what was said of the data just now, before resuming, stays, and stands there once
                new = self._warned if name == "warnings.jsonl" else []
                kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step and line not in new]
                write_atomically(path, "".join(line + "\n" for line in [*kept, *new]))
                if name == "metrics.jsonl" and kept:
                    self.last = {key: float(value) for key, value in json.loads(kept[-1]).items() if key != "step"}
        for table in (self.directory / "samples").glob("step_*.jsonl"):
            if int(table.stem.removeprefix("step_")) > step:
                table.unlink()

    @contextlib.contextmanager
    def folder(self, relative: str) -> Iterator[Path]:
        """A folder to fill; it takes its name only when the block ends well."""
        final = self.directory / relative
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if final.exists():
                shutil.rmtree(final)
            publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_finished(directory: Path) -> bool:
    """Whether the run in `directory` wrote everything that it set out to write."""
    status = directory / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "finished"


def _plain(value: float) -> float | str:
    """JSON has no NaN: spell what is not finite."""
    return value if math.isfinite(value) else str(value)


def _step_of(line: str) -> float:
    """The step of a JSON line; a line cut short by a crash belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
