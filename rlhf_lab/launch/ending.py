"""Ending what a sweep has under way: its jobs, and only those; or its runs, at their next step."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console as Terminal
from rich.markup import escape

from rlhf_lab.launch.asking import Asked
from rlhf_lab.launch.pool import is_alive
from rlhf_lab.launch.standing import CANCELLED, Standing, standings
from rlhf_lab.launch.sweep import Sweep, find, jobs, names
from rlhf_lab.launch.terminal import terminal
from rlhf_lab.run import STOP

LONGEST_COMMAND = 500  # jobs


def cancel(wish: Asked) -> int:
    """End the jobs of a sweep and no others; runs that are under way are saved first, if they have a step's time."""
    if wish.options.get("force", "false") not in ("true", "false"):
        raise ValueError(f"force={wish.options['force']}: must be true or false")
    sweep, out = wish.sweep(), terminal()
    artifacts, runs = standings(sweep)
    live = [one for one in (*artifacts, *runs) if one.live]
    kept = {} if wish.options.get("force") == "true" else _needed_elsewhere(sweep, artifacts, wish)
    ended = [one for one in live if one.plan not in kept]
    for one in live:
        if one.plan in kept:
            out.print(escape(f"{one.name} is built on, since sweep {kept[one.plan]} needs it; force=true ends it too"))
    count = _end(sweep, ended, out)
    done = sum(one.state == "finished" for one in runs)
    out.print(f"{count} of {len(runs) + len(artifacts)} ended; {done} runs are done and stay")
    return 0


def _end(sweep: Sweep, ended: Sequence[Standing], out: Terminal) -> int:
    """Have the jobs of these end, each after its run is saved if it can be; returns how many were asked to."""
    own = {job["job"] for job in jobs(sweep.root)}
    for one in [one for one in ended if one.job and one.job["job"] not in own]:
        out.print(escape(f"{one.name} is built by a job of another sweep, and built on"))
    ended = [one for one in ended if not one.job or one.job["job"] in own]
    # a pool that is gone, whose number another process may have by now: somebody else is at work on the run
    ended = [replace(one, job={}) if _is_gone(one.job) else one for one in ended]
    of_slurm = sorted({one.job["job"] for one in ended if one.job.get("executor") == "slurm"})
    for first in range(0, len(of_slurm), LONGEST_COMMAND):
        _scancel(of_slurm[first : first + LONGEST_COMMAND])
    for process in sorted({int(one.job["job"]) for one in ended if one.job.get("executor") == "pool"}):
        host = next(one.job["host"] for one in ended if one.job.get("job") == str(process))
        if host != socket.gethostname():
            raise ValueError(f"the sweep runs on {host}; type this there")
        os.kill(process, signal.SIGTERM)  # its number and its start were compared
    foreign = set() if sweep.executor["kind"] == "here" else {artifact.plan for artifact in sweep.artifacts}
    for one in [one for one in ended if not one.job and one.plan in foreign]:
        out.print(escape(f"{one.name} is built by somebody else, and built on"))
        ended.remove(one)
    for one in ended:
        if not one.job:
            (one.directory / STOP).touch()
            out.print(escape(f"{one.name} runs in somebody's terminal; it is asked to stop at its next step"))
    with (sweep.root / CANCELLED).open("a") as file:
        for one in ended:
            if one.job:
                file.write(json.dumps({"job": one.job["job"], "plan": one.plan, "when": time.strftime("%F %T")}) + "\n")
    return len(ended)


def _is_gone(job: Mapping[str, Any]) -> bool:
    return job.get("executor") == "pool" and job["host"] == socket.gethostname() and not is_alive(job)


def _scancel(ids: Sequence[str]) -> None:
    answer = subprocess.run(["scancel", *ids], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ValueError(f"scancel: {answer.stderr.strip()}")


def _needed_elsewhere(sweep: Sweep, artifacts: Sequence[Standing], wish: Asked) -> dict[str, str]:
    """Plan of an artifact that a job of its own is building -> another sweep whose jobs wait for that job.

    A pool is one process; what it leaves unfinished, the pool of the other sweep takes up.
    """
    building = {one.directory: one.plan for one in artifacts if one.live and one.job.get("executor") == "slurm"}
    needed: dict[str, str] = {}
    others = (
        [find(name, wish.sweeps_dir, wish.runs_dir) for name in names(wish.sweeps_dir, wish.runs_dir)]
        if building
        else []
    )
    for other in others:
        shared = [one.directory for one in other.artifacts if one.directory in building]
        if other.root != sweep.root and shared and any(one.live for one in standings(other)[1]):
            needed |= {building[directory]: other.name for directory in shared}
    return needed


def stop(wish: Asked) -> int:
    """Have what runs save and end at its next step; what waits does not begin. `retry=` goes on."""
    out = terminal()
    one_run = wish.one_run()
    if one_run:
        runs, sweep = [one_run[0]], one_run[1]
    else:
        sweep = wish.sweep()
        artifacts, members = standings(sweep)
        runs = [*artifacts, *members]
    running = [one for one in runs if one.state == "running" and one.live]
    waiting = [one for one in runs if one.state == "pending" and one.live]
    of_pool = any(one.job.get("executor") == "pool" for one in (*running, *waiting))
    if one_run and of_pool:
        for one in (*running, *waiting):  # the pool's process does other runs too; one that waits stops as it begins
            (one.directory / STOP).touch()
    elif sweep is not None and of_pool:
        _end(sweep, [*running, *waiting], out)  # whose process saves what runs and begins nothing new
    else:
        for one in running:
            (one.directory / STOP).touch()
        if sweep is not None:
            _end(sweep, waiting, out)
    out.print(f"{len(running)} asked to save and stop at their next step; {len(waiting)} that waited will not begin")
    return 0
