"""Starting what was composed: say it only, run it here, or freeze it and hand it over."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig

from rlhf_lab import stopping
from rlhf_lab.console import Console
from rlhf_lab.environment import code_state
from rlhf_lab.launch.compose import Plan, key_of, plan_run
from rlhf_lab.launch.execute import RunFailed, execute, preflight
from rlhf_lab.launch.executors import Here
from rlhf_lab.launch.job import REFUSED, STOPPED, Task
from rlhf_lab.launch.multirun import Launching, check_points, launching_of, plan_points
from rlhf_lab.launch.standing import take_back_stops
from rlhf_lab.launch.sweep import SUBMISSION, Sweep, freeze, refuse_taken
from rlhf_lab.run import has_begun
from rlhf_lab.types import Metrics


def start_run(config: DictConfig, overrides: Sequence[str], choices: Mapping[str, str]) -> float | None:
    """One run: here, or submitted alone.

    Returns:
        The metric that `returns` names, for a sweeper that asked for the run.

    Raises:
        ValueError: the run has no such metric.
    """
    within = None if config.sweep is None else Path(config.sweeps_dir) / str(config.sweep)
    plan = plan_run(config, overrides, choices, within)
    how = launching_of(config, "")
    if how.plan:
        preflight(plan)
        _forecast([plan], how)
        return None
    executor = instantiate(how.executor)
    if isinstance(executor, Here) and not _is_shared(plan):
        stopping.listen()
        return _returned(execute(plan), config.returns, plan)
    preflight(plan)
    if isinstance(executor, Here):
        is_new = not plan.directory.exists()
        if code := _share(_freeze(plan.directory / SUBMISSION, [plan], how), plan):
            if code == REFUSED and is_new and not has_begun(plan.directory):
                shutil.rmtree(plan.directory)  # so that the mended command finds its name free
            sys.exit(code)
        return _returned({}, config.returns, plan)
    if config.returns is not None:
        raise ValueError(f"returns={config.returns} is known when the run is over; use executor=here")
    _submit(plan.directory / SUBMISSION, [plan], how)
    return None


def start_sweep(typed: Sequence[str]) -> int:
    """All points of a sweep: checked, frozen, then run here or handed over. Returns the exit code."""
    if "RANK" in os.environ:
        raise ValueError("a sweep starts the processes of its runs itself; use num_processes=<n> instead of torchrun")
    if asked_for := [word for word in typed if key_of(word) == "returns" and word != "returns=null"]:
        raise ValueError(
            f"{asked_for[0]} is for a sweeper that asks for it, and -m alone has none; add hydra/sweeper=optuna, "
            "or leave it away: the sweep's page compares every metric"
        )
    plans, how = plan_points(typed)
    check_points(plans)
    refuse_taken(plans)
    if how.plan:
        _forecast(plans, how)
        return 0
    if isinstance(instantiate(how.executor), Here):
        return run_here(_freeze(how.root, plans, how), plans)
    _submit(how.root, plans, how)
    return 0


def _freeze(root: Path, plans: Sequence[Plan], how: Launching) -> Sweep:
    command = f"python launch.py {shlex.join(sys.argv[1:])}"
    kind = instantiate(how.executor).kind
    settings = {key: value for key, value in how.executor.items() if key != "_target_"}
    return freeze(root, plans, command=command, git=code_state(), executor={"kind": kind, **settings})


def _submit(root: Path, plans: Sequence[Plan], how: Launching) -> None:
    """Freeze the plans and hand them to the executor, which says what it was given."""
    sweep = _freeze(root, plans, how)
    instantiate(how.executor).submit(sweep)


def _forecast(plans: Sequence[Plan], how: Launching) -> None:
    from rlhf_lab.launch.forecast import show

    show(plans, how)


def run_here(sweep: Sweep, plans: Sequence[Plan]) -> int:
    """Run the points; one that stops does not stop the others."""
    from rlhf_lab.launch.main import say_why
    from rlhf_lab.report.sweep import build_sweep_report

    stopping.listen()
    console = Console()
    console.say(f"sweep {sweep.root}: {len(plans)} runs")
    take_back_stops(plan.directory for plan in plans)
    stopped: list[int] = []
    for i, plan in enumerate(plans, 1):
        console.say(f"[{i}/{len(plans)}] {plan.directory.name}")
        try:
            if not _is_shared(plan):
                execute(plan)
            elif (code := _share(sweep, plan)) == STOPPED:
                sys.exit(code)
            elif code:
                stopped.append(code)
        except (HydraException, ValueError, RunFailed) as error:
            stopped.append(say_why(error, list(plan.overrides), prefix=f"{' '.join(plan.overrides)}: "))
    console.say(f"the sweep's page: {build_sweep_report(sweep.root)}")
    if stopped:
        console.say(f"error: {len(stopped)} of {len(plans)} runs of the sweep did not finish")
    return min(stopped, default=0)


def _is_shared(plan: Plan) -> bool:
    """Whether its processes are still to be started; torchrun and accelerate have done it."""
    return plan.num_processes > 1 and "RANK" not in os.environ


def _share(sweep: Sweep, plan: Plan) -> int:
    """Do a frozen run with several processes, and wait for it; returns its exit code."""
    from rlhf_lab.launch.processes import supervised

    digest = next(run.plan for run in sweep.runs if run.directory == plan.directory.absolute())
    return supervised(Task.read(sweep.root, digest))


def _returned(metrics: Metrics, name: str | None, plan: Plan) -> float | None:
    if name is None:
        return None
    metrics = metrics or json.loads((plan.directory / "status.json").read_text())["metrics"]  # finished before
    if name not in metrics:
        raise ValueError(f"returns={name}, but {plan.directory} measured no such metric; it has {sorted(metrics)}")
    return metrics[name]
