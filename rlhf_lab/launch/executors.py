"""Where the runs of a sweep run: here, one after the other; in the background of this machine; or on a cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from rlhf_lab.launch.check import near
from rlhf_lab.launch.sweep import Sweep, submitting
from rlhf_lab.types import Count, NonNegativeCount, Positive

EXTRA = 'pip install -e ".[slurm]"'


class Executor(Protocol):
    """Who starts the runs of a sweep."""

    kind: ClassVar[str]

    def submit(self, sweep: Sweep) -> list[dict[str, Any]]:
        """Start what of the sweep is neither finished nor under way, its artifacts first, and return at once.

        Returns:
            What was noted of each new job in the sweep's jobs.jsonl.

        Raises:
            ValueError: it cannot be started, as the message says; nothing is left behind that would run.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Here:
    """One run after the other, in the process that was started."""

    kind: ClassVar[str] = "here"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A few workers in the background of this machine, which go on when the terminal is closed.

    Fields:
        at_once: how many runs at a time.
        devices: of each run in turn, as CUDA_VISIBLE_DEVICES, e.g. [0,1] or ["0,1","2,3"]; null: all that are visible.
        restarts: how often a run that was killed is started again without having got further in between.
    """

    kind: ClassVar[str] = "pool"
    at_once: Count
    devices: Sequence[int | str] | None
    restarts: NonNegativeCount

    def submit(self, sweep: Sweep) -> list[dict[str, Any]]:
        """See `Executor`."""
        _need_submitit(self.kind)
        from rlhf_lab.launch.pool import submit

        with submitting(sweep.root):
            return submit(self, sweep)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Jobs of a SLURM cluster: arrays of artifacts, then one array of all runs.

    Fields:
        partition, account, qos, constraint: as sbatch's options; null: the cluster's default.
        gres: such as gpu:1, for each node.
        nodes, cpus, mem_gb: of each run; cpus and memory on each node.
        time_min: the limit after which SLURM ends a job, which then is requeued and goes on.
        signal_delay_s: how long before that the run is warned; longer than a step and a checkpoint take.
        at_once: runs of the array at a time; null: as many as the cluster lets.
        requeues: how often a run may reach its time limit; pre-emptions are not counted.
        restarts: how often a run that was killed is started again without having got further in between.
        snapshot: whether the jobs use a copy of the code as it is now, and not the files that stand there when they
            start.
        setup: lines of shell before the job's own.
        extra: further options of sbatch, as --option=value.
    """

    kind: ClassVar[str] = "slurm"
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gres: str | None
    nodes: Count
    cpus: Count
    mem_gb: Positive
    time_min: Count
    signal_delay_s: Count
    at_once: Count | None
    requeues: NonNegativeCount
    restarts: NonNegativeCount
    snapshot: bool
    setup: Sequence[str]
    extra: Mapping[str, str | int | float | bool]

    def __post_init__(self) -> None:
        if self.signal_delay_s >= 60 * self.time_min:
            raise ValueError(
                f"executor.signal_delay_s={self.signal_delay_s} is not shorter than executor.time_min={self.time_min}: "
                "the run would be warned before it starts"
            )

    def submit(self, sweep: Sweep) -> list[dict[str, Any]]:
        """See `Executor`."""
        _need_submitit(self.kind)
        from rlhf_lab.launch.slurm import submit

        with submitting(sweep.root):
            return submit(self, sweep)


def revive(stored: Mapping[str, Any]) -> Here | Pool | Slurm:
    """The executor that a sweep was submitted with, from what sweep.json says of it.

    Raises:
        ValueError: there is no such kind, or a setting is missing.
    """
    kinds = {one.kind: one for one in (Here, Pool, Slurm)}
    settings = {key: value for key, value in stored.items() if key != "kind"}
    if stored["kind"] not in kinds:
        raise ValueError(f"executor={stored['kind']!r} is no kind of executor; {near(stored['kind'], kinds)}")
    kind = kinds[stored["kind"]]
    wanted = {field.name for field in fields(kind)}
    if settings.keys() != wanted:
        odd = ", ".join(sorted(settings.keys() ^ wanted))
        raise ValueError(f"the sweep was frozen by another version: the settings {odd} of its executor do not fit")
    return kind(**settings)


def _need_submitit(kind: str) -> None:
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ValueError(f"executor={kind} needs submitit, which is not installed; {EXTRA}") from error
