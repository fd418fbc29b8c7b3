"""How a run of several processes ended: the first of them to know writes it down, for the launcher and the others.

Elastic takes every exit code but 0 for a crash and starts all ranks again. That is right for a rank that was killed; a
rank that failed by itself would fail again, so the ranks that are started after it see that it is over, and end.
"""

import os
from pathlib import Path

from rlhf_lab.launch.job import FAILED, FINISHED, STOPPED

FILE = "RLHF_LAB_OUTCOME"  # environment variable: where the ranks write it


def is_settled() -> bool:
    """Whether a rank has already said how the run ended."""
    return FILE in os.environ and Path(os.environ[FILE]).exists()


def may_speak() -> bool:
    """Whether it is this process that says why the run failed; what all ranks found is said once."""
    if FILE in os.environ:
        try:
            Path(os.environ[FILE]).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
    if os.environ.get("RANK", "0") == "0":
        return True
    from rlhf_lab.engine import ranks  # torch, which a refusal of the first rank should not wait for

    return ranks.world() > 1 and not ranks.lost()


def settle(code: int) -> int:
    """Write down an exit code of the contract in `rlhf_lab.launch.job`; returns what this process exits with."""
    from rlhf_lab.engine import ranks

    if FILE not in os.environ:
        return code
    if code in (FINISHED, STOPPED):
        if ranks.is_first():
            Path(os.environ[FILE]).write_text(str(code))
        return 0
    if not ranks.lost():
        Path(os.environ[FILE]).write_text(str(code))
    return FAILED


def read(file: Path) -> int:
    """The exit code that the ranks agreed on; failed if none got as far as that."""
    said = file.read_text() if file.exists() else ""
    return int(said or FAILED)
