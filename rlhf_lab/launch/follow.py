"""What a person does with a sweep that is submitted: see how it stands, start again what is missing, draw its page."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from dataclasses import fields, replace

import yaml
from rich.console import Console as Terminal
from rich.markup import escape
from rich.table import Table

from rlhf_lab.launch.asking import Asked
from rlhf_lab.launch.check import check_node, near
from rlhf_lab.launch.closing import close
from rlhf_lab.launch.ending import cancel, stop
from rlhf_lab.launch.executors import Here, Pool, Slurm, revive
from rlhf_lab.launch.standing import TO_RETRY, Standing, standings, take_back_stops, totals
from rlhf_lab.launch.sweep import Sweep, find, names
from rlhf_lab.launch.terminal import duration, terminal

COLOURS = {
    **{"pending": "dim", "running": "cyan", "stopped": "yellow", "cancelled": "yellow"},
    **{"failed": "red", "lost": "red", "finished": "green"},
}


def follow(wish: Asked) -> int:
    """Do what was asked for; returns the exit code."""
    return VERBS[wish.verb](wish)


def status(wish: Asked) -> int:
    """Print how a sweep or a run stands; again and again with watch=<seconds>."""
    out = terminal()
    if not wish.name:
        known = list(names(wish.sweeps_dir, wish.runs_dir))
        for name in known:
            _, runs = standings(find(name, wish.sweeps_dir, wish.runs_dir))
            out.print(escape(f"{name}: {next(totals(runs))}"))
        if not known:
            out.print(escape(f"there are no sweeps in {wish.sweeps_dir}"))
        return 0
    watch = _seconds(wish.options.get("watch"))
    while True:
        if one := wish.one_run():
            _table([], [one[0]], out)
            live = one[0].live
        else:
            sweep = wish.sweep()
            artifacts, runs = standings(sweep)
            close(sweep.root)  # a sweep whose last run could not begin has nobody else who draws its page
            _show(sweep, wish.name, artifacts, runs, out)
            live = any(one.live for one in runs)
        if not (watch and live):
            return 0
        time.sleep(watch)
        out.clear() if out.is_terminal else out.print()


def _seconds(typed: str | None) -> float:
    if typed is None:
        return 0.0
    try:
        seconds = float(typed)
    except ValueError as error:
        raise ValueError(f"watch={typed}: must be a number of seconds") from error
    if seconds <= 0:
        raise ValueError(f"watch={typed}: must be more than 0 seconds")
    return seconds


def _show(sweep: Sweep, name: str, artifacts: Sequence[Standing], runs: Sequence[Standing], out: Terminal) -> None:
    """Print it; by `name` it was found, and will be again."""
    out.print(escape(f"sweep {sweep.name}, {sweep.created}, executor {sweep.executor['kind']}: {sweep.command}"))
    _table([one for one in artifacts if one.state != "finished"], runs, out)
    if reused := sum(one.state == "finished" for one in artifacts):
        out.print(f"{reused} of {len(artifacts)} artifacts are there")
    for line in totals(runs):
        out.print(escape(line))
    for one in (*artifacts, *runs):
        if one.state == "failed":
            out.print(escape(f"  {one.name}: {_log(sweep, one)}"))
    if any(one.state in TO_RETRY for one in runs):
        out.print(escape(f"start again what is missing: python launch.py retry={name}"))
    where = [f"logs: {sweep.root / 'log'}"] if (sweep.root / "log").exists() else []
    page = sweep.root / "report.html"
    out.print(
        escape("; ".join([*where, f"page: {page}" if page.exists() else f"page: python launch.py report={name}"]))
    )


def _log(sweep: Sweep, one: Standing) -> str:
    """Where to read why it failed."""
    log = sweep.root / one.job["log"] if one.job.get("log") else None
    places = [path for path in (one.directory / "error.txt", log) if path is not None and path.exists()]
    return ", ".join(map(str, places)) or "nothing was written"


def _table(artifacts: Sequence[Standing], runs: Sequence[Standing], out: Terminal) -> None:
    table = Table("run", "state", "", "left", "requeued", "job")
    for one in (*artifacts, *runs):
        table.add_row(
            escape(one.name),
            f"[{COLOURS[one.state]}]{one.state}[/]",
            escape(one.detail),
            duration(one.seconds_left) if one.seconds_left else "",
            f"{one.requeued} ×" if one.requeued else "",
            str(one.job.get("job", "")),
        )
    out.print(table)


def retry(wish: Asked) -> int:
    """Submit again what is neither finished nor under way, as it was frozen."""
    from rlhf_lab.launch.start import run_here

    sweep, out = wish.sweep(), terminal()
    artifacts, runs = standings(sweep)
    executor = _with_settings(revive(sweep.executor), wish.options)
    again = [one for one in runs if one.state != "finished" and not one.live]
    take_back_stops([one.directory for one in (*artifacts, *again) if not one.live])
    for one in again:
        out.print(escape(f"{one.name}: {one.state}, {one.detail}"))
    if not again:
        for line in totals(runs):
            out.print(escape(f"nothing to retry; {line}"))
        return 0
    if isinstance(executor, Here):
        with chdir(sweep.cwd):  # what is frozen may be relative to it
            return run_here(sweep, [sweep.plan(one.plan) for one in again])
    executor.submit(sweep)
    return 0


def _with_settings(executor: Here | Pool | Slurm, typed: Mapping[str, str]) -> Here | Pool | Slurm:
    """The executor with settings typed as executor.<setting>=<value>."""
    known = {field.name: getattr(executor, field.name) for field in fields(executor)}
    settings = {key.removeprefix("executor."): yaml.safe_load(value) for key, value in typed.items()}
    for key in settings:
        if key not in known:
            raise ValueError(f"executor.{key}: no setting of executor={executor.kind}; {near(key, known)}")
    check_node(
        "executor", {"_target_": f"{type(executor).__module__}.{type(executor).__qualname__}"} | known | settings
    )
    return replace(executor, **settings)


def report(wish: Asked) -> int:
    """Draw the page of a sweep as it stands now."""
    from rlhf_lab.report.sweep import build_sweep_report

    terminal().print(escape(str(build_sweep_report(wish.sweep().root))))
    return 0


VERBS: Mapping[str, Callable[[Asked], int]] = {
    **{"status": status, "retry": retry, "cancel": cancel, "stop": stop, "report": report}
}
