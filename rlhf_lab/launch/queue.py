"""What SLURM says of jobs: all of them asked for at once, the recently ended too."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass

from rlhf_lab.launch.controller import array_of, ask

# states of a job that is, or will be, on its way; see squeue(1)
LIVE = {
    *("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
}


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job as SLURM sees it. `reason` says why it waits, and where it runs once it does."""

    state: str
    reason: str

    @property
    def is_live(self) -> bool:
        return self.state in LIVE


def queued(ids: Collection[str]) -> dict[str, Queued] | None:
    """job -> how it stands, of those that SLURM still knows; None if there is no cluster that answers.

    One question to the controller; jobs that it has forgotten are asked of the accounting, where there is one.
    """
    if shutil.which("squeue") is None:
        return None
    if not ids:
        return {}
    arrays = sorted({array_of(job) for job in ids})
    try:
        answer = ask(
            ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N", f"--jobs={','.join(arrays)}"]
        )
    except ValueError as error:
        if "Invalid job id" not in str(error):
            return None
        answer = ""  # all of them are so old that the controller has forgotten them
    found: dict[str, Queued] = {}
    for line in answer.splitlines():
        job, state, reason, nodes = line.split("|")
        found[job] = Queued(state=state, reason=nodes if state == "RUNNING" else reason)
    forgotten = {array_of(job) for job in ids if job not in found}
    return (_accounted(forgotten) if forgotten else {}) | found


def _accounted(arrays: Collection[str]) -> dict[str, Queued]:
    """What the accounting says of the ends of jobs; nothing, where there is none."""
    if shutil.which("sacct") is None:
        return {}
    asked = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode"]
    try:
        answer = ask([*asked, f"--jobs={','.join(sorted(arrays))}"])
    except ValueError:
        return {}
    ended: dict[str, Queued] = {}
    for line in answer.splitlines():
        job, state, code = line.split("|")
        # `CANCELLED by 0`; what the controller has forgotten is over, whatever the accounting last heard
        word = state.split()[0]
        end = Queued(state="ENDED" if word in LIVE else word, reason=f"exit code {code.split(':')[0]}")
        ended |= dict.fromkeys(expanded(job), end)
    return ended


def expanded(job: str) -> list[str]:
    """The jobs that `7_[2-4,9%3]` means, as SLURM writes those of an array that never began."""
    array, bracket, places = job.partition("_[")
    if not bracket:
        return [job]
    found: list[str] = []
    for part in places.rstrip("]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        found += [f"{array}_{place}" for place in range(int(first), int(last or first) + 1)]
    return found
