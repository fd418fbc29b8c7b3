"""What SLURM's controller answers."""

import re
import subprocess
from collections.abc import Collection, Sequence


def array_of(job: str) -> str:
    """The array that a job is of; itself if it is of none."""
    return job.split("_")[0]


def largest_array() -> int:
    """How many jobs the cluster takes in one array.

    Raises:
        ValueError: there is no cluster, or it does not answer.
    """
    answer = ask(["scontrol", "show", "config"])
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", answer)
    assert found, "scontrol show config does not say MaxArraySize"
    return max(int(found[1]), 1)  # the largest index is one less


def live_jobs(ids: Collection[str]) -> set[str]:
    """Those of the jobs that are waiting or running.

    Raises:
        ValueError: SLURM does not answer.
    """
    if not ids:
        return set()
    arrays = sorted({array_of(job) for job in ids})
    try:
        answer = ask(["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(arrays)}"])
    except ValueError as error:
        if "Invalid job id" in str(error):  # all of them are so old that SLURM has forgotten them
            return set()
        raise
    return set(answer.split()) & set(ids)


def ask(command: Sequence[str]) -> str:
    """What one of SLURM's tools answers.

    Raises:
        ValueError: it is not there, or it failed.
    """
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no {command[0]} here: executor=slurm is for a machine from which jobs are submitted; "
            "executor=pool runs in the background of this one"
        ) from error
    if answer.returncode != 0:
        raise ValueError(f"{' '.join(command)}: {answer.stderr.strip() or f'exit code {answer.returncode}'}")
    return answer.stdout
