"""What may be found below runs/ at any moment, and what must be found at the end, beside an undisturbed run's.

Whatever has its final name is whole, and equals what the undisturbed run wrote under that name. Only a log that is
appended to may end in a line that was cut short.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from pyarrow import parquet

from rlhf_lab.engine.accounting import CLOCKED
from rlhf_lab.report.run import read_run

# written again and again, or about the process that ran; compared by what they mean
LIVING = ("status.json", "environment.json", "metrics.jsonl", "warnings.jsonl", "report.html", "error.txt")
REPLACED = ("generations.parquet",)  # by that of a later evaluation; until then whole, at the end equal
FOLDERS = ("policy", "scorer", "data", "reference", "shards")  # take their names whole
LOCKS = (".lock", ".build")


def entries(runs: Path) -> set[Path]:
    """Every file and folder below, relative, but for locks."""
    return {path.relative_to(runs) for path in runs.rglob("*") if not path.name.endswith(LOCKS)}


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without the times that it took."""
    return {key: value for key, value in row.items() if not key.startswith(CLOCKED)}


def lines(log: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, without the times that they took.

    Raises:
        ValueError: a line that is not the last is no JSON.
    """
    text = log.read_text() if log.exists() else ""
    return [timeless(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def run_folders(runs: Path) -> list[Path]:
    """Relative directories of the runs below, artifacts included."""
    return sorted(path.parent.relative_to(runs) for path in runs.rglob("config.yaml"))


def state(run: Path) -> dict[str, Any]:
    """status.json, {} before there is one."""
    path = run / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def faults(runs: Path, reference: Path) -> Iterator[str]:
    """What a reader must not find just after a kill."""
    kept = entries(reference)
    for name in sorted(entries(runs)):
        path = runs / name
        if any(part.startswith(".") for part in name.parts):
            continue  # a temporary name: nobody reads it
        if "checkpoints" in name.parts:
            continue  # an undisturbed run has none at its end
        if name not in kept and name.name != "error.txt":
            yield f"{name} is not among the files of an undisturbed run"
        elif path.is_dir():
            continue
        elif name.suffix == ".png":
            Image.open(path).load()
        elif name.name in REPLACED and state(path.parent).get("state") != "finished":
            parquet.read_table(path)
        elif name.name not in LIVING and path.read_bytes() != (reference / name).read_bytes():
            yield f"{name} differs from that of an undisturbed run"
    for name in run_folders(runs):
        yield from _faults_of(runs / name, reference / name)


def _faults_of(run: Path, reference: Path) -> Iterator[str]:
    for name in ("metrics.jsonl", "warnings.jsonl"):
        found, expected = lines(run / name), lines(reference / name)
        if name == "metrics.jsonl" and found != expected[: len(found)]:
            yield f"{run / name} does not begin as that of an undisturbed run"
        if strange := [line for line in found if line not in expected]:
            yield f"{run / name} has lines that an undisturbed run has not: {strange[:2]}"
    for folder in FOLDERS:
        for part in (run / folder).glob("**/"):
            if any(name.startswith(".") for name in part.relative_to(run).parts):
                continue
            there = sorted(path.name for path in part.iterdir() if path.is_file() and not path.name.startswith("."))
            expected = sorted(path.name for path in (reference / part.relative_to(run)).glob("*") if path.is_file())
            if there != expected:
                yield f"{part} has {there} of {expected}"
    for checkpoint in (run / "checkpoints").glob("step_*"):
        if trouble := _damage(checkpoint):
            yield f"{checkpoint}: {trouble}"
    if (run / "environment.json").exists():
        json.loads((run / "environment.json").read_text())
    if _cut_short(run / "report.html"):
        yield f"{run / 'report.html'} is cut short"
    if state(run):
        read_run(run)  # the project's own reader, which draws the page of an unfinished run too


def _cut_short(page: Path) -> bool:
    return page.exists() and not page.read_text().rstrip().endswith("</html>")


def _damage(checkpoint: Path) -> str:
    try:
        hashes = json.loads((checkpoint / "sha256.json").read_text())
        found = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in hashes}
    except (FileNotFoundError, ValueError) as error:
        return f"incomplete: {error}"
    return "" if found == hashes and hashes else "its files do not match their hashes"


def achieved(runs: Path) -> dict[str, int]:
    """What must never become less: finished runs, finished shards, and the step from which each run continues."""
    done: dict[str, int] = {}
    for name in run_folders(runs):
        run = runs / name
        finished = state(run).get("state") == "finished"
        sound = [path for path in (run / "checkpoints").glob("step_*") if not _damage(path)]
        steps = [int(path.name.removeprefix("step_")) for path in sound]
        done[f"{name} finished"] = int(finished)
        done[f"step of {name}"] = 1 << 30 if finished else max(steps, default=-1)
        for shard in (run / "shards").glob("*/"):
            if not shard.name.startswith("."):
                done[f"{name} shard {shard.name}"] = 1
    return done


def differences(runs: Path, reference: Path) -> Iterator[str]:
    """In what a run that came to its end, and the artifacts that it needs, differ from an undisturbed one."""
    found, expected = entries(runs), entries(reference)
    yield from (f"{name} is left over" for name in sorted(found - expected))
    yield from (f"{name} is missing" for name in sorted(expected - found))
    for name in sorted(found & expected):
        if (
            (runs / name).is_file()
            and name.name not in LIVING
            and (runs / name).read_bytes() != (reference / name).read_bytes()
        ):
            yield f"{name} differs"
    for name in run_folders(reference):
        ours, theirs = runs / name, reference / name
        for log in ("metrics.jsonl", "warnings.jsonl"):
            if (ours / log).exists() and not (ours / log).read_text().endswith("\n"):
                yield f"{name / log} ends in half a line"
            if lines(ours / log) != lines(theirs / log):
                yield f"{name / log} differs"
        if (said := state(ours)).get("state") != "finished":
            yield f"{name} is {said.get('state')}"
        elif timeless(said.get("metrics", {})) != timeless(state(theirs).get("metrics", {})):
            yield f"{name / 'status.json'} has other metrics"
        if _cut_short(ours / "report.html"):
            yield f"{name / 'report.html'} is cut short"
