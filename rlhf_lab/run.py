"""One run, one directory: what was asked, where and with what it ran, what it measured, and where it stands."""

import contextlib
import json
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError

from rlhf_lab import stopping
from rlhf_lab.console import Console
from rlhf_lab.engine import high_water, ranks
from rlhf_lab.engine.checkpoint import (
    DamagedCheckpoint,
    checkpoints,
    load_newest,
    load_tree,
    publish,
    remove,
    save_tree,
    write_atomically,
)
from rlhf_lab.environment import changes, environment, sitting
from rlhf_lab.holding import RunRefused, first_decides, take
from rlhf_lab.interfaces import Tracker
from rlhf_lab.journal import Journal
from rlhf_lab.redaction import redact
from rlhf_lab.status import Status, first_line, read_status
from rlhf_lab.stopping import Stopped
from rlhf_lab.types import Metrics

# settings that change nothing that a run measures
INCIDENTAL = (
    *("tracker", "artifacts", "keep_checkpoints", "hardware.threads", "stage.hardware.threads"),
    *("judge.dry_run", "stage.judge.dry_run", "stage.shared_prefixes"),
    *(
        f"{where}hardware.{key}"
        for where in ("", "stage.")
        for key in ("distribution", "offload", "gradient_checkpointing")
    ),
)
# and what the names of others end in, wherever they stand
INCIDENTAL_ENDS = ("tokens_at_once", "sampling.batch_size")
STOP = "stop"  # a file of this name in a run's directory asks it to stop
SUBMISSION = "submission"  # a folder of those who started the run
PREAMBLE = {
    *(".lock", "config.yaml", "overrides.yaml", "environment.json", "status.json", "error.txt", "warnings.jsonl"),
    *("tracker.json", "wandb", "data.json", STOP, SUBMISSION, ".job.json"),
}


def difference(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Lines `key: before -> after` for every leaf in which two nested configurations differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from difference(before.get(key, "absent"), after.get(key, "absent"), f"{path}.{key}" if path else key)
    elif before != after:
        yield f"{path}: {before!r} -> {after!r}"


def telling(lines: Iterable[str]) -> list[str]:
    """Of the lines of a `difference` those that change what a run measures."""
    return [
        line
        for line in lines
        if not line.startswith(INCIDENTAL) and not line.partition(":")[0].endswith(INCIDENTAL_ENDS)
    ]


# the same values as safe_load, ten times as fast, where PyYAML has libyaml
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_config(file: Path) -> dict[str, Any]:
    """A frozen config.yaml; a run reads those of all of its artifacts before it starts."""
    return yaml.load(file.read_text(), Loader=_LOADER)


class Run:
    """An open run directory, held by one process; of several ranks the first alone writes into it.

    Metrics of a step are appended when the step is done. After a crash the run continues from its latest sound
    checkpoint, and what was logged after that checkpoint is taken back, so every step stands in the log once.
    """

    def __init__(
        self,
        directory: Path,
        *,
        seed: int,
        keep: int | Literal["all"],
        tracker: Tracker,
        console: Console,
        lock: FileIO,
    ) -> None:
        self.directory, self.seed, self.tracker, self.console = directory, seed, tracker, console
        self.finished = is_finished(directory)
        self.last: Metrics = {}
        self._keep, self._lock = keep, lock
        self._status, self._journal = Status(directory), Journal(directory)
        self._is_new = False  # whether this process gave the directory its configuration
        self._got_further = False  # whether this process did a step, or a piece of work
        self._facts: dict[str, Any] = {}
        self._differs: list[str] = []  # from what is frozen, in settings that change nothing that is measured

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
        held: list[FileIO] = []
        first_decides(lambda: held.append(take(directory)))
        if not ranks.is_first():
            held.append((directory / ".lock").open("rb", buffering=0))
        run = cls(
            directory,
            seed=int(config["seed"]),
            keep=config["keep_checkpoints"],
            tracker=tracker,
            console=console,
            lock=held[0],
        )
        try:
            first_decides(lambda: run._begin(config, overrides, artifacts))
        except BaseException:
            run.close()
            raise
        return run

    def _begin(self, config: dict[str, Any], overrides: list[str], artifacts: Mapping[str, Path]) -> None:
        """Sweep up, compare with what is frozen, and note who works here now."""
        directory = self.directory
        try:
            self._lock.truncate(0)
            self._lock.write(
                f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n".encode()
            )
            sweep_up(directory)
            frozen = directory / "config.yaml"
            if frozen.exists():
                self._differs = list(difference(read_config(frozen), config))
                if changed := telling(self._differs):
                    raise RunRefused(
                        f"{directory} holds a run with another configuration ({'; '.join(changed[:8])}); "
                        "give this run another name with name=, or remove that directory"
                    )
            else:
                self._is_new = True
                write_atomically(directory / "overrides.yaml", yaml.safe_dump(overrides))
                write_atomically(frozen, yaml.safe_dump(config, sort_keys=False))
            if not self.finished:
                self._note_environment(environment(artifacts))
                self._status.write("running")
        except OSError as error:
            raise RunRefused(
                f"cannot write to {directory}: {error.strerror}; free space, or choose another place with runs_dir="
            ) from error

    def _note_environment(self, facts: dict[str, Any]) -> None:
        """environment.json: the facts of the first sitting, and a line for each; see `resume`.

        Raises:
            RunRefused: what the run reads is not what it has read so far.
        """
        file = self.directory / "environment.json"
        if file.exists() and self._has_begun:
            first = json.loads(file.read_text())
            before = {name: read["sha256"] for name, read in first["artifacts"].items()}
            for name, read in facts["artifacts"].items():
                if before.get(name) != read["sha256"]:
                    raise RunRefused(
                        f"{self.directory} was begun with another {read['path']} than is there now; "
                        "give this run another name with name=, or remove that directory to start it again"
                    )
        else:
            write_atomically(file, json.dumps(facts | {"sittings": []}, indent=1))
        self._facts = facts

    @property
    def _has_begun(self) -> bool:
        return has_begun(self.directory)

    @property
    def name(self) -> str:
        return self.directory.name

    def close(self) -> None:
        """Let go of the directory."""
        self._lock.close()

    def steps(self, what: str, first: int, total: int, latest: Mapping[str, float]) -> Iterator[int]:
        """Count as `Console.steps` does, and keep the progress in status.json up to date.

        Args:
            latest: the metrics of the last step; the caller keeps it up to date.
        """
        begun = time.monotonic()
        self._note_progress(what, first, total, 0.0, latest)
        for step in self.console.steps(what, first, total, latest):
            yield step
            self._got_further = True
            done = step + 1
            self._note_progress(what, done, total, (done - first) / (time.monotonic() - begun), latest)

    def _note_progress(self, what: str, step: int, total: int, pace: float, latest: Mapping[str, float]) -> None:
        if ranks.is_first():
            self._status.progress(what, step, total, pace, latest)

    def checkpoint(self, step: int, state: Callable[[], dict[str, Any]], *, due: bool) -> None:
        """The end of a step: save if it is due or if the run is asked to stop, and stop then.

        Raises:
            Stopped: as `pause`.
        """
        self._got_further = True
        reason = self._asked_to_stop()
        if due or reason:
            self.save(step, state())
        if reason:
            self._status.reached(step)
            self._stop(reason)

    def pause(self) -> None:
        """Between two pieces of work that are on the disk: stop here if the run is asked to.

        A mere warning is heeded when there is something to show for this process: under a time limit that is hardly
        longer than loading takes, a run would otherwise be warned, and stop, for ever.

        Raises:
            Stopped: by a signal to any of its processes, or by a file `stop` in its directory, which is then removed.
        """
        if reason := self._asked_to_stop():
            self._stop(reason)

    def _asked_to_stop(self) -> str:
        """Why, or nothing; the same on every rank."""
        reason = "" if stopping.is_warning() and not self._got_further else stopping.requested() or ""
        if not reason and ranks.is_first() and (self.directory / STOP).exists():
            reason = f"the file {self.directory / STOP}"
        if not ranks.agree(bool(reason)):
            return ""
        return ranks.broadcast(reason) or "a request to another of its processes"

    def _stop(self, reason: str) -> None:
        if ranks.is_first():
            (self.directory / STOP).unlink(missing_ok=True)
        raise Stopped(f"{self.directory} stopped: asked by {reason}; the same command continues it")

    def finish(self, metrics: Metrics) -> None:
        """Everything is written: only now does the run count as finished."""
        self.finished = True
        self._status.held(*high_water.highest(ranks.gather(high_water.since_begin())))
        if ranks.is_first():
            (self.directory / STOP).unlink(missing_ok=True)
            self._status.write("finished", metrics=metrics)

    def drop_checkpoints(self) -> None:
        """A finished run needs none; they stay if all are to be kept."""
        if ranks.is_first() and self._keep != "all":
            remove(self.directory / "checkpoints")

    def note_end(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """As the end of a `with` block: why the run ended, the traceback of a failure in error.txt."""
        if not ranks.is_first() or ranks.lost():  # who left first says why, and all may be started again
            return
        if error is None:
            (self.directory / "error.txt").unlink(missing_ok=True)
        elif isinstance(error, Stopped | KeyboardInterrupt):
            self._status.write_last("stopped", reason=str(error) or "interrupted from the keyboard")
        else:
            self._status.write_last("failed", error=redact(first_line(error)))
            with contextlib.suppress(OSError):
                write_atomically(self.directory / "error.txt", redact("".join(traceback.format_exception(error))))

    def leave(self, reason: str) -> None:
        """End without a result, as was wished; what is there is gone on with."""
        if ranks.is_first():
            self._status.write_last("stopped", reason=reason)

    def withdraw(self) -> None:
        """Remove a directory in which nothing was measured or made, so that the mended command finds its name free.

        One that was frozen before this process came stays, and says why it failed.
        """
        if ranks.is_first() and self._is_new and not self._has_begun:
            shutil.rmtree(self.directory)

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one step's metrics to metrics.jsonl, flushed to disk, and pass them to the tracker."""
        self.last = metrics
        if ranks.is_first():
            self._journal.log(step, metrics)
            self._status.held(metrics.get("memory/peak", 0.0), metrics.get("memory/device/peak", 0.0))
            self.tracker.log(step, metrics)

    def warn(self, step: int, message: str) -> None:
        """One loud line on the console, and in warnings.jsonl."""
        if ranks.is_first():
            self.console.warn(f"step {step}: {message}")
            self._journal.warn(step, message)

    def write_text(self, relative: str, text: str) -> None:
        """Write a file, whole or not at all."""
        if ranks.is_first():
            path = self.directory / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)

    def write_rows(self, relative: str, rows: list[dict[str, Any]]) -> None:
        """Write a table of samples as JSON lines, whole or not at all."""
        self.write_text(relative, "".join(json.dumps(row) + "\n" for row in rows))

    def make(self, relative: str, fill: Callable[[Path], None]) -> None:
        """Have a folder filled, by the first rank; it takes its name when it is whole, and then all ranks go on.

        Raises:
            OSError: the disk is full or read-only; the name is then not taken.
        """
        if ranks.is_first():
            final = self.directory / relative
            temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir(parents=True)
                fill(temporary)
                publish(temporary, final)
            except SafetensorError as error:  # which is what a full disk is to safetensors
                raise OSError(f"{final} cannot be written: {error}") from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        ranks.barrier()

    def has(self, relative: str) -> bool:
        """Whether a file or folder is there, which is then whole; the same on every rank."""
        return ranks.broadcast((self.directory / relative).exists())

    def drop(self, relative: str) -> None:
        """Remove a folder that is needed no more, if it is there."""
        if ranks.is_first():
            remove(self.directory / relative)
        ranks.barrier()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Checkpoint the state after `step`; older ones beyond those to be kept go once it is safe."""
        if ranks.is_first():
            folder = self.directory / "checkpoints"
            save_tree(folder / f"step_{step:06d}", state)
            if isinstance(self._keep, int):
                for _, old in list(checkpoints(folder))[self._keep :]:
                    remove(old)
        ranks.barrier()

    def resume(self) -> tuple[int, dict[str, Any]] | None:
        """The latest sound checkpoint as (step, state), or None at the beginning of a run.

        A damaged checkpoint is said loudly, the one before it taken, and the damaged one removed. What metrics.jsonl,
        warnings.jsonl and samples/ hold of later steps is taken back, since those steps will be done again.

        Raises:
            RunRefused: there are checkpoints, and every one is damaged.
        """
        found: list[dict[str, Any]] = []

        def choose() -> tuple[int | None, Metrics]:
            step = self._load_newest(found)
            kept = self._journal.take_back(-1 if step is None else step)
            for logged, metrics in kept:
                self.tracker.log(logged, metrics)
            self._note_sitting(step)
            return step, kept[-1][1] if kept else {}

        step, self.last = first_decides(choose)
        if step is None:
            return None
        path = self.directory / "checkpoints" / f"step_{step:06d}"
        self.console.say(f"resuming after step {step} from {path}")
        return step, found[0] if found else load_tree(path)

    def _load_newest(self, found: list[dict[str, Any]]) -> int | None:
        folder = self.directory / "checkpoints"
        try:
            newest = load_newest(folder, self.console.warn)
        except DamagedCheckpoint as error:
            raise RunRefused(
                f"no sound checkpoint is left in {folder} ({error}); "
                "remove that folder to start the run again from its beginning"
            ) from error
        if newest is None:
            return None
        found.append(newest[1])
        return newest[0]

    def _note_sitting(self, resumed_from: int | None) -> None:
        """One entry more in environment.json; a change of the code or of a package since the last is said."""
        file = self.directory / "environment.json"
        stored = json.loads(file.read_text())
        now, before = sitting(self._facts, resumed_from), stored.get("sittings", [])
        if self._differs:
            now["differs"] = self._differs
        write_atomically(file, json.dumps(stored | {"sittings": [*before, now]}, indent=1))
        if before and (changed := list(changes(before[-1], now))):
            self.warn(resumed_from or 0, f"continued under other code or packages: {'; '.join(changed)}")


def leftovers(directory: Path) -> list[Path]:
    """What a process that was killed left half-written, or half-removed."""
    folders = [path for path in directory.iterdir() if path.is_dir() and path.name != SUBMISSION]
    return [left for folder in (directory, *folders) for left in folder.glob(".*.tmp")]


def sweep_up(directory: Path) -> None:
    """Remove the leftovers."""
    for left in leftovers(directory):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def has_begun(directory: Path) -> bool:
    """Whether anything was measured or made in `directory`."""
    made = {path.name for path in directory.iterdir() if path.is_dir() or path.stat().st_size}
    return not made <= PREAMBLE


def is_finished(directory: Path) -> bool:
    """Whether the run in `directory` wrote everything that it set out to write."""
    return read_status(directory).get("state") == "finished"
