"""What a run says of its steps: metrics.jsonl, warnings.jsonl and samples/, where every step stands once."""

import json
import math
from pathlib import Path

from rlhf_lab.engine.checkpoint import append_line, write_atomically
from rlhf_lab.types import Metrics

METRICS, WARNINGS = "metrics.jsonl", "warnings.jsonl"


class Journal:
    """The lines of a run, as the one process writes them that holds its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._warned: list[str] = []  # lines of warnings.jsonl from this process

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one step's metrics, flushed to disk."""
        values = {key: _plain(value) for key, value in metrics.items()}
        append_line(self.directory / METRICS, json.dumps({"step": step, **values}))

    def warn(self, step: int, message: str) -> None:
        """Append a warning."""
        self._warned.append(json.dumps({"step": step, "message": message}))
        append_line(self.directory / WARNINGS, self._warned[-1])

    def take_back(self, step: int) -> list[tuple[int, Metrics]]:
        """Drop what is said of later steps, since they will be done again; returns (step, metrics) of those kept."""
        metrics = [line for line in self._lines(METRICS) if _step_of(line) <= step]
        # what was said of the data just now, before resuming, stays, and stands there once
        older = [line for line in self._lines(WARNINGS) if _step_of(line) <= step and line not in self._warned]
        warnings = sorted([*self._warned, *older], key=_step_of)  # as if it had not been interrupted
        for name, kept in ((METRICS, metrics), (WARNINGS, warnings)):
            if (self.directory / name).exists():
                write_atomically(self.directory / name, "".join(line + "\n" for line in kept))
        for table in (self.directory / "samples").glob("step_*.jsonl"):
            if int(table.stem.removeprefix("step_")) > step:
                table.unlink()
        rows = [json.loads(line) for line in metrics]
        return [(row["step"], {key: float(row[key]) for key in row if key != "step"}) for row in rows]

    def _lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []


def _plain(value: float) -> float | str:
    """JSON has no NaN: spell what is not finite."""
    return value if math.isfinite(value) else str(value)


def _step_of(line: str) -> float:
    """The step of a JSON line; a line cut short by a crash belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
