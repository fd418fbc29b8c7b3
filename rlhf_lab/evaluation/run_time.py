"""How long finished runs took, alone and with everything that was made for them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rlhf_lab.status import read_status

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class Hours:
    """Time that runs took.

    Fields:
        wall: hours on the clock, of all sittings, one run after the other.
        gpu: hours times processes, of runs on a GPU; 0 on a CPU.
        missing: runs among them whose records are gone, so that their time is not counted.
    """

    wall: float
    gpu: float
    missing: int


def hours(runs: Sequence[Path]) -> Hours:
    """The time of these runs, each counted once."""
    wall = gpu = 0.0
    missing = 0
    for run in dict.fromkeys(runs):
        seconds = read_status(run).get("seconds")
        if seconds is None:
            missing += 1
            continue
        wall += seconds / SECONDS_PER_HOUR
        config = yaml.safe_load((run / "config.yaml").read_text())
        device = (config.get("stage", {}).get("hardware") or {}).get("device", "cpu")
        if device.startswith("cuda"):
            processes = json.loads((run / "environment.json").read_text()).get("num_processes", 1)
            gpu += seconds * processes / SECONDS_PER_HOUR
    return Hours(wall=wall, gpu=gpu, missing=missing)


def with_needs(runs: Sequence[Path]) -> list[Path]:
    """The runs and every run whose outputs they read, directly or through others, each once."""
    found: dict[Path, None] = {}
    waiting = list(runs)
    while waiting:
        run = waiting.pop(0)
        if run not in found:
            found[run] = None
            waiting += _needs(run)
    return list(found)


def _needs(run: Path) -> Iterator[Path]:
    file = run / "environment.json"
    if not file.is_file():
        return
    for read in json.loads(file.read_text())["artifacts"].values():
        place = Path(read["path"])
        yield place.parent if (place.parent / "status.json").is_file() else place
