"""Estimates from a few short steps of each kind of run, measured once and kept beside the runs."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from rich.console import Console as Terminal
from rich.markup import escape

from rlhf_lab.engine.checkpoint import write_atomically
from rlhf_lab.launch.compose import ROOT, Plan, in_order
from rlhf_lab.launch.history import FREQUENCIES, Estimate, amount_keys, settings_of
from rlhf_lab.launch.outlook import Basis
from rlhf_lab.launch.terminal import duration
from rlhf_lab.launch.trial import NotTried, Trial, units_of
from rlhf_lab.run import is_finished

FILE = ".calibration.json"
BUSY = 1.2  # processes that want a core


def kind(plan: Plan) -> str:
    """Digest of what the pace of a run depends on: not on how much work it is, nor on a real value."""
    settings = settings_of(plan.config, plan.num_processes)
    incidental = {*amount_keys(settings), *FREQUENCIES}
    paced = {key: value for key, value in settings.items() if key not in incidental and not isinstance(value, float)}
    return sha256(json.dumps(paced, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A trial, and of what, where and when; `load` is how many processes wanted a core, for each core."""

    trial: Trial
    of: str
    host: str
    when: str
    load: float


@dataclass(frozen=True)
class Calibration:
    """What was measured so far: kind of run -> its trial."""

    known: Mapping[str, Measured]

    @classmethod
    def read(cls, runs_dir: Path) -> "Calibration":
        """What `runs_dir` keeps of earlier calibrations."""
        file = runs_dir / FILE
        stored = json.loads(file.read_text()) if file.exists() else {}
        return cls({key: Measured(**entry | {"trial": Trial(**entry["trial"])}) for key, entry in stored.items()})

    def write(self, runs_dir: Path) -> None:
        runs_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(
            runs_dir / FILE, json.dumps({key: asdict(entry) for key, entry in self.known.items()}, indent=1)
        )

    def measured(self, plans: Sequence[Plan], runs_dir: Path, out: Terminal) -> "Calibration":
        """With every kind of run among what the plans still have to do, measured now in a temporary directory.

        Each is written down as soon as it is measured.

        What a kind needs and is not there is made by the trials of other kinds, too short to be of use to anyone.
        """
        every = {one.directory: one for one in (*in_order(*plans), *plans)}
        to_do = [one for one in every.values() if not is_finished(one.directory)]
        kinds = {kind(one): one for one in reversed(to_do)}
        known = dict(self.known)
        with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
            outputs: dict[str, str] = {}  # of what is not there: the trial's instead
            for i, one in enumerate(to_do):
                key = kind(one)
                place = Path(folder) / key
                if kinds[key] is one:
                    began = time.monotonic()
                    out.print(escape(f"[{len({kind(o) for o in to_do[: i + 1]})}/{len(kinds)}] {one.config['name']}"))
                    try:
                        config = _repointed(_sized(one, every), outputs)
                        config["runs_dir"] = folder
                        trial = _tried(place, config)
                    except NotTried as reason:
                        out.print(escape(f"  not measured: {reason}"))
                        continue
                    known[key] = Measured(
                        trial=trial,
                        of=str(one.config["name"]),
                        host=socket.gethostname(),
                        when=time.strftime("%F %T"),
                        load=os.getloadavg()[0] / (os.cpu_count() or 1),
                    )
                    Calibration(known).write(runs_dir)
                    out.print(escape(f"  measured in {duration(time.monotonic() - began)}"))
                made = sorted(place.glob(f"*/{one.config['output']}"))
                if made:
                    outputs[str(one.output)] = str(made[-1])
        return Calibration(known)

    def before(self, earlier: Basis, plans: Sequence[Plan]) -> "Calibrated":
        """Trials where earlier runs do not tell exactly."""
        return Calibrated(self, earlier, {one.directory: one for one in (*in_order(*plans), *plans)})


@dataclass(frozen=True)
class Calibrated:
    """Estimates from earlier runs of the same settings, else from trials, else from what is nearest."""

    calibration: Calibration
    earlier: Basis
    every: Mapping[Path, Plan]

    def estimate(self, plan: Plan) -> Estimate | None:
        known = self.earlier.estimate(plan)
        measured = self.calibration.known.get(kind(plan))
        if measured is None or (known is not None and known.trust == "measured"):
            return known
        stage, trial = _sized(plan, self.every)["stage"], measured.trial
        every = stage.get("evaluate_every", 0)
        evaluations = -(-stage["steps"] // every) - 1 if every and "steps" in stage else 0
        seconds = trial.seconds(units_of(stage), evaluations)
        notes = "" if measured.host == socket.gethostname() else f" on {measured.host}"
        if measured.load > BUSY:
            notes += f", when {measured.load:.1f} processes shared a core"
        return Estimate(
            seconds=seconds,
            least=seconds,
            most=seconds,
            memory_mib=trial.memory_mib,
            device_memory_mib=trial.device_memory_mib,
            trust="calibrated",
            split=trial.split,
            source=f"steps of {measured.of}, {measured.when}{notes}",
        )


def _sized(plan: Plan, every: Mapping[Path, Plan]) -> dict[str, Any]:
    """The configuration of a plan, with the number of rows of a table that is there, or will be, where it says none.

    Raises:
        NotTried: nobody knows that number.
    """
    stage = plan.config["stage"]
    if "dataset" not in stage or stage["dataset"]["train_size"] is not None:
        return plan.config
    path = Path(stage["dataset"]["path"])
    table = path / f"{stage['dataset']['train_split']}.parquet"
    if table.exists():
        rows = parquet.read_metadata(table).num_rows
    else:
        maker = next((one for one in every.values() if str(one.output) == str(path)), None)
        if maker is None:
            return plan.config
        rows = units_of(_sized(maker, every)["stage"])  # a row for each prompt
    return plan.config | {"stage": stage | {"dataset": stage["dataset"] | {"train_size": rows}}}


def _repointed(value: Any, outputs: Mapping[str, str]) -> Any:
    """A configuration in which paths to what is not there lead to what the trials made."""
    if isinstance(value, dict):
        return {key: _repointed(entry, outputs) for key, entry in value.items()}
    if isinstance(value, list):
        return [_repointed(entry, outputs) for entry in value]
    return outputs.get(value, value) if isinstance(value, str) else value


def _tried(place: Path, config: dict[str, Any]) -> Trial:
    """Measure in a process of its own.

    Raises:
        NotTried: it failed; with the last line that it said.
    """
    units_of(config["stage"])
    place.mkdir(parents=True)
    (place / "plan.json").write_text(json.dumps(config))
    child = subprocess.run(
        [sys.executable, "-m", "rlhf_lab.launch.trial", str(place)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path.cwd(),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if child.returncode:
        raise NotTried((child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1])
    return Trial(**json.loads((place / "trial.json").read_text()))
