"""`plan=true`: what a command would start, in a table, and nothing started."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console as Terminal
from rich.markup import escape
from rich.table import Table

from rlhf_lab.launch.calibration import Calibration
from rlhf_lab.launch.compose import Plan
from rlhf_lab.launch.multirun import Launching
from rlhf_lab.launch.outlook import EarlierRuns, Forecast, Outlook, described, forecast
from rlhf_lab.launch.terminal import duration, memory, terminal

ORDINALS = "abcdefghijklmnopqrstuvwxyz"
SAID = {"new": "new", "continued": "goes on", "finished": "finished already"}
OF_ARTIFACTS = {"new": "build", "continued": "goes on", "finished": "reuse"}


def show(plans: Sequence[Plan], how: Launching) -> None:
    """Print what the plans would take, by runs that are done and steps that were measured; start none of them."""
    out = terminal()
    calibration = Calibration.read(how.runs_dir)
    if how.plan == "calibrate":
        calibration = calibration.measured(plans, how.runs_dir, out)
    earlier = EarlierRuns.below((how.runs_dir, how.sweeps_dir))
    seen = forecast(plans, calibration.before(earlier, plans))
    notes = _Notes()
    out.print(f"{len(plans)} runs, {len(seen.artifacts)} artifacts that they need; nothing is started")
    _runs(seen, notes, out)
    if seen.artifacts:
        _artifacts(seen, notes, out)
    for line in (*notes.lines, *_totals(seen, how.executor), *_submission(seen, how.executor)):
        out.print(escape(line))


class _Notes:
    """What estimates are judged by: said once each, below the tables."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def mark(self, one: Outlook) -> str:
        """The letter of the note that says by what this one is judged."""
        if one.estimate is None:
            return ""
        text = f"{one.estimate.trust}: {one.estimate.source}{_split(one.estimate.split)}"
        place = len(self._known)
        letter = ORDINALS[place % len(ORDINALS)] * (place // len(ORDINALS) + 1)
        return self._known.setdefault(text, letter)

    @property
    def lines(self) -> Iterator[str]:
        for text, letter in self._known.items():
            yield f"  {letter}  {text}"


def _split(shares: Mapping[str, float]) -> str:
    """How the time of the steps divides, if there is more than one phase to it."""
    if len(shares) < 2:
        return ""
    return "; of its steps " + ", ".join(f"{phase} {100 * share:.0f}%" for phase, share in shares.items())


def _takes(one: Outlook, notes: _Notes) -> list[str]:
    """The cells of what it takes: time, memory, by what that is judged."""
    if one.standing == "finished":
        return ["", "", ""]
    floor = "?" if one.least_mib is None else f"≥ {memory(one.least_mib)}"
    if one.estimate is None:
        return ["?", floor, ""]
    wide = one.estimate.most - one.estimate.least > 0.1 * one.estimate.seconds
    spread = f" ({duration(one.estimate.least)} to {duration(one.estimate.most)})" if wide else ""
    # a trial reads less data: the whole run held up to a fifth more main memory
    held = f"{'≥ ' * (one.estimate.trust == 'calibrated')}{memory(one.estimate.memory_mib)}"
    if one.estimate.device_memory_mib:
        held += f", on the device {memory(one.estimate.device_memory_mib)}"
    elif one.plan.config["stage"]["hardware"]["device"] != "cpu":
        held += f", on the device {floor}"
    return [f"{duration(one.seconds)}{spread}", held, notes.mark(one)]


def _standing(one: Outlook, words: Mapping[str, str]) -> str:
    return words[one.standing] + (f" after step {one.step}" if one.step and one.standing == "continued" else "")


def _runs(seen: Forecast, notes: _Notes, out: Terminal) -> None:
    facts = [described(one.plan.config) for one in seen.runs]
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    common = {name: facts[0][name] for name in names if len({fact.get(name) for fact in facts}) == 1}
    if len(seen.runs) > 1 and common:
        out.print(escape("  every run: " + "; ".join(f"{name} {value}" for name, value in common.items() if value)))
    columns = [name for name in names if name not in common or len(seen.runs) == 1]
    table = Table("run", *columns, "standing", "time", "memory", "by")
    for one, fact in zip(seen.runs, facts, strict=True):
        cells = [fact.get(name, "") for name in columns]
        table.add_row(
            *map(escape, [one.plan.directory.name, *cells, _standing(one, SAID)]), *map(escape, _takes(one, notes))
        )
    out.print(table)


def _artifacts(seen: Forecast, notes: _Notes, out: Terminal) -> None:
    table = Table("artifact", "method", "size", "standing", "needed by", "time", "memory", "by")
    for one in seen.artifacts:
        fact = described(one.plan.config)
        name = str(one.plan.config["name"])
        runs = f"{one.runs} run{'s' * (one.runs != 1)}"
        cells = [name, fact["method"], fact["size"], _standing(one, OF_ARTIFACTS), runs]
        table.add_row(*map(escape, [*cells, *_takes(one, notes)]))
    out.print(table)


def _totals(seen: Forecast, executor: Mapping[str, Any]) -> Iterator[str]:
    waiting = seen.to_do
    runs = sum(one.runs == 0 for one in waiting)
    said = f"to do: {runs} of {len(seen.runs)} runs, {len(waiting) - runs} of {len(seen.artifacts)} artifacts"
    if not waiting:
        yield f"{said}; everything is finished already"
        return
    processes = {one.plan.num_processes for one in waiting}
    devices = {
        one.plan.config["stage"]["hardware"]["device"] for one in waiting if "hardware" in one.plan.config["stage"]
    }
    each = " or ".join(f"{count} process{'es' * (count > 1)}" for count in sorted(processes))
    yield f"{said}; {each} each, on {', '.join(sorted(devices))}"
    if seen.unknown < len(waiting):
        at_once = executor.get("at_once") or (1 if _kind(executor) == "here" else len(waiting))
        known = "" if not seen.unknown else f", of the {len(waiting) - seen.unknown} that are known"
        work, wall = duration(seen.device_seconds), duration(seen.wall_seconds(at_once))
        hours = f" ({seen.device_seconds / 3600:.1f} device-hours)" if seen.device_seconds >= 3600 else ""
        yield f"time: {work} of work{hours}, {wall} on the clock with {at_once} at once{known}"
        yield "  starts of processes and the cluster's queue come on top"
    if seen.unknown:
        yield f"time of {seen.unknown} of {len(waiting)}: unknown; plan=calibrate measures"
    judged = [one for one in waiting if one.estimate is not None]
    if judged:
        largest = max(judged, key=lambda one: one.plan.num_processes * _main_mib(one))
        each, count = memory(max(map(_main_mib, judged))), largest.plan.num_processes
        together = f", {memory(count * _main_mib(largest))} for the {count} processes of a run" if count > 1 else ""
        yield f"memory: at most {each} a process{together}, as far as known"


def _main_mib(one: Outlook) -> float:
    return 0.0 if one.estimate is None else one.estimate.memory_mib


def _kind(executor: Mapping[str, Any]) -> str:
    return executor["_target_"].rpartition(".")[2].lower()


def _submission(seen: Forecast, executor: Mapping[str, Any]) -> Iterator[str]:
    """What would be submitted, in its order."""
    kind = _kind(executor)
    settings = {key: value for key, value in executor.items() if key != "_target_" and value not in (None, {}, [])}
    spelled = ", ".join(f"{key}={value}" for key, value in settings.items())
    yield f"executor: {kind}{': ' * bool(spelled)}{spelled}"
    if kind != "slurm" or not seen.to_do:
        return
    throttle = f", {settings['at_once']} at a time" if "at_once" in settings else ""
    for place, jobs in enumerate(seen.rounds, 1):
        after = f", after array {place - 1}" if place > 1 else ""
        what = "runs" if jobs[0].runs == 0 else ", ".join(one.plan.directory.name for one in jobs)
        size = f"{len(jobs)} job{'s' * (len(jobs) != 1)}"
        yield f"  array {place}: {size}{throttle}{after}: {what}"
