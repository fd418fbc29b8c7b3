"""What each phase of a step takes: its seconds, its memory and, of the tokens that it works on, how many a second."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from rlhf_lab.engine import high_water, out_of_memory, ranks
from rlhf_lab.types import Metrics

CLOCKED = ("time/", "memory/", "throughput/")  # metrics that say how a run ran, which no two runs have in common
EVALUATION = "evaluation"


class Account:
    """The phases of one step, each timed and watched while it runs; one that comes again adds to its first part.

    Memory is the highest mark within the phase, of the rank that held most; where the kernel keeps only the mark of the
    whole process, it is that. On a GPU the device's own mark stands beside it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, tuple[float, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time and watch what is done in the block.

        Raises:
            OutOfMemory: memory ran out in it; says so under its name.
        """
        high_water.mark()
        begun = _now()
        with out_of_memory.phase(name):
            yield
            seconds = _now() - begun
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._peaks[name] = high_water.highest([high_water.since_mark(), self._peaks.get(name, (0.0, 0.0))])

    def metrics(self, tokens: Mapping[str, int]) -> Metrics:
        """What was measured, by name; every rank must call this.

        Args:
            tokens: phase -> how many it worked on; of the first also `throughput/step` is said, which is what it
                worked on per second of all phases but the evaluation.

        Returns:
            `time/<phase>` in seconds, `time/share/<phase>` of all phases of the step, `throughput/<phase>` in tokens
            per second, `memory/<phase>` and `memory/peak` in MiB, `memory/device/…` too where there is one.
        """
        spent = sum(self._seconds.values())
        metrics = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        metrics |= {f"time/share/{name}": seconds / spent for name, seconds in self._seconds.items()}
        metrics |= {f"throughput/{name}": count / self._seconds[name] for name, count in tokens.items()}
        if tokens:
            steady = spent - self._seconds.get(EVALUATION, 0.0)
            metrics["throughput/step"] = next(iter(tokens.values())) / steady
        of_ranks = ranks.gather(self._peaks)
        peaks = {name: high_water.highest([peaks[name] for peaks in of_ranks]) for name in self._peaks}
        for i, place in enumerate(("memory", "memory/device")):
            if any(peak[i] for peak in peaks.values()):
                metrics |= {f"{place}/{name}": peak[i] for name, peak in peaks.items()}
                metrics[f"{place}/peak"] = max(peak[i] for peak in peaks.values())
        return metrics


def _now() -> float:
    """Seconds, when what was started on a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
