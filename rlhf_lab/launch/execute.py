"""Carrying out a plan: its artifacts first, each built once, then the run itself, then its report."""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from hydra.utils import instantiate

from rlhf_lab import stopping
from rlhf_lab.console import Console
from rlhf_lab.data.statistics import of_stage
from rlhf_lab.engine import out_of_memory, ranks
from rlhf_lab.engine.checkpoint import remove
from rlhf_lab.environment import input_hashes
from rlhf_lab.interfaces import Tracker
from rlhf_lab.judges.price import DryRun
from rlhf_lab.launch.check import BadConfig
from rlhf_lab.launch.compose import ROOT, Plan, in_order
from rlhf_lab.run import Run, RunRefused, difference, is_finished, leftovers, read_config, sweep_up, telling
from rlhf_lab.stopping import Stopped
from rlhf_lab.types import Metrics

# what may differ between the run that built an artifact and the run that reads it
_INCIDENTAL = ("hardware", "tracker", "artifacts", "keep_checkpoints")


SECONDS_BETWEEN_TRIES = 0.5


class RunFailed(RuntimeError):
    """A run that had begun and stopped for another reason than a person's mistake; says where to read more."""


def preflight(plan: Plan, sound: set[Path] | None = None) -> None:
    """Refuse what cannot work, of the run and of every artifact that it would build; loads no weights.

    Args:
        sound: artifacts that were looked at for other runs of a sweep and not refused; those of this run are added.

    Raises:
        BadConfig, ValueError: naming the key or path, what was found and what to do.
    """
    needs = list(in_order(plan))
    promised = {str(needed.output) for needed in needs}
    known = set() if sound is None else sound
    new = [needed for needed in needs if needed.directory not in known]
    for one in (plan, *new):
        if one.config["artifacts"] not in ("build", "refuse"):
            raise BadConfig(f"artifacts={one.config['artifacts']!r}: must be 'build' or 'refuse'")
        if not is_finished(one.directory):
            with ranks.planned(one.num_processes):
                instantiate(one.config["stage"], _convert_="all").check(promised)
    for needed in new:
        _check_artifact(needed, plan.config["artifacts"])
    known |= {needed.directory for needed in new}


def _check_artifact(plan: Plan, policy: str) -> None:
    """Refuse an artifact that is not there and must not be built, or that is there with another configuration."""
    if is_finished(plan.directory):
        stored = read_config(plan.directory / "config.yaml")
        ours = {key: value for key, value in plan.config.items() if key not in _INCIDENTAL}
        theirs = {key: value for key, value in stored.items() if key not in _INCIDENTAL}
        changed = [line for line in telling(difference(theirs, ours)) if ".hardware." not in line]
        if changed:
            raise RunRefused(
                f"the artifact {plan.directory} was built with another configuration ({'; '.join(changed[:5])}); "
                "remove it to have it built again, or choose another place with runs_dir="
            )
        if all(is_finished(needed.directory) for needed in plan.needs):
            _check_inputs(plan)
    elif policy == "refuse":
        raise RunRefused(f"the artifact {plan.directory} is not there; build it with: {plan.command}")


def _check_inputs(plan: Plan) -> None:
    """Refuse an artifact that was built from other files than those that stand there now."""
    recorded = json.loads((plan.directory / "environment.json").read_text())["artifacts"]
    for needed in plan.needs:
        before = recorded[input_name(plan, needed)]["sha256"]
        if before != input_hashes(needed.output):
            raise RunRefused(
                f"the artifact {plan.directory} was built from another {needed.output} than is there now; "
                f"remove {plan.directory} to have it built again"
            )


def input_name(plan: Plan, needed: Plan) -> str:
    """How the record of a run names what it read."""
    return str(needed.output.relative_to(plan.config["runs_dir"]))


@contextmanager
def _building(directory: Path, console: Console) -> Iterator[None]:
    """Held by one process at a time: who comes second waits, and finds the artifact finished."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.build").open("a") as lock:
        if not _is_ours(lock):
            console.say(f"waiting for another process that builds {directory}")
            while not _is_ours(lock):
                _heed(directory)
                time.sleep(SECONDS_BETWEEN_TRIES)
        yield


def _is_ours(lock: TextIO) -> bool:
    """Whether the first rank got a lock, which is not waited for, so that a request to stop is heard."""
    return ranks.broadcast(ranks.is_first() and _take(lock))


def _take(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _heed(directory: Path) -> None:
    """Before work on a directory begins: stop if this process, or another rank, was asked to and not only warned."""
    if ranks.agree(stopping.requested() is not None and not stopping.is_warning()):
        raise Stopped(f"{directory} was not begun: asked to stop; the same command continues")


def build(plan: Plan) -> None:
    """Do an artifact's plan, unless another process, of whatever sweep, is at it; that one is waited for."""
    console = Console()
    _prepare(plan, console)
    with _building(plan.directory, console):
        if not ranks.broadcast(is_finished(plan.directory)):
            carry_out(plan, console)


def execute(plan: Plan) -> Metrics:
    """Build what the plan needs, then run it; a finished run is said to be finished and left alone.

    Returns the run's last metrics, {} if it was finished already.
    """
    console = Console()
    _prepare(plan, console)
    return carry_out(plan, console)


def _prepare(plan: Plan, console: Console) -> None:
    """Refuse what cannot work, and build what is missing of what the plan needs."""
    preflight(plan)
    ranks.start(torch.device(plan.config.get("hardware", {}).get("device", "cpu")))
    needs = list(in_order(plan))
    missing = [needs[i] for i in ranks.broadcast([i for i, one in enumerate(needs) if not is_finished(one.directory)])]
    for i, needed in enumerate(missing):
        console.say(f"[{i + 1}/{len(missing)}] building {needed.directory}, which this run needs")
        with _building(needed.directory, console):
            if not ranks.broadcast(is_finished(needed.directory)):
                carry_out(needed, console)
    for needed in needs:
        _check_inputs(needed)
        if ranks.is_first():
            _complete_artifact(needed)


def carry_out(plan: Plan, console: Console) -> Metrics:
    """One run from its frozen configuration to its report; {} for one that was to say its price alone.

    Raises:
        ValueError: a mistake that only the data or the weights could show.
        RunFailed: anything else that went wrong; the traceback is in the run directory.
        Stopped: it was asked to stop, and is saved.
    """
    _heed(plan.directory)
    stage = instantiate(plan.config["stage"], _convert_="all")
    tracker = instantiate(plan.config["tracker"], _convert_="all")
    directory = plan.directory
    run = Run.open(
        directory,
        config=plan.config,
        overrides=list(plan.overrides),
        artifacts={input_name(plan, needed): needed.output for needed in plan.needs},
        tracker=tracker,
        console=console,
    )
    page = directory / "report.html"
    try:
        with ExitStack() as afterwards:
            afterwards.callback(run.close)
            if run.finished:
                if ranks.is_first():
                    _complete(plan)
                console.say(f"{directory} is finished already; its results are in {page}")
                console.say("for another run of the same configuration give it a name of its own with name=")
                return {}
            afterwards.push(run.note_end)
            stage.check()
            if ranks.is_first():
                tracker.start(directory, plan.config)
                afterwards.push(partial(_close, tracker))
            console.say(f"run {directory}")
            try:
                with out_of_memory.phase("run"):
                    metrics = stage.run(run)
            except DryRun as price:
                console.say(str(price))
                run.leave(str(price))
                return {}
            finally:
                note_data(run, stage)
            run.finish(metrics)
            if ranks.is_first():
                draw_report(directory)  # after the status, which the page shows
            run.drop_checkpoints()
    except ValueError as error:
        if not _is_mistake(error):
            raise RunFailed(f"{directory} stopped: {error}; the traceback is in {directory / 'error.txt'}") from error
        run.withdraw()
        raise
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise RunFailed(
            f"{directory} stopped: {error.strerror or error}{place}; "
            "mend that, and the same command continues from the last checkpoint"
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RunFailed(
            f"{directory} stopped: {type(error).__name__}: {reason}; the traceback is in {directory / 'error.txt'}"
        ) from error
    made = {"output": plan.output, "report": page, "metrics": directory / "metrics.jsonl"}
    console.summary({what: str(path) for what, path in made.items() if path.exists()})
    return metrics


def _complete(plan: Plan) -> None:
    """What comes after the last result, where a process was killed before it was done."""
    if not _has_page(plan.directory):
        draw_report(plan.directory)
    if plan.config["keep_checkpoints"] != "all":
        remove(plan.directory / "checkpoints")
    sweep_up(plan.directory)


def _complete_artifact(plan: Plan) -> None:
    """The same of an artifact; not if its builder is still at it, or if its place is for reading only."""
    unneeded = plan.config["keep_checkpoints"] != "all" and (plan.directory / "checkpoints").exists()
    if _has_page(plan.directory) and not unneeded and not leftovers(plan.directory):
        return
    with suppress(OSError), (plan.directory / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _complete(plan)


def _has_page(directory: Path) -> bool:
    page, status = directory / "report.html", directory / "status.json"
    return page.exists() and page.stat().st_mtime >= status.stat().st_mtime


def _close(tracker: Tracker, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
    """As the end of a `with` block."""
    stopped = isinstance(error, Stopped | KeyboardInterrupt)
    tracker.finish("finished" if error is None else "stopped" if stopped else "failed")


def note_data(run: Run, stage: object) -> None:
    """Leave what the stage read of its data, and what it left out, as data.json; a run that failed has that too."""
    if read := of_stage(stage):
        run.write_text("data.json", json.dumps(read, indent=1))


def _is_mistake(error: ValueError) -> bool:
    """Whether it was raised by the project's own checks, and not from within a library or by a slip of ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(ROOT / "rlhf_lab") in trace.tb_frame.f_code.co_filename


def draw_report(directory: Path) -> None:
    """Write the run's report.html."""
    from rlhf_lab.report.page import build_report  # matplotlib, which a refusal should not wait for

    build_report(directory)
