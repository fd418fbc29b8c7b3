"""The end of a sweep: whoever does its last run draws the page over all of them."""

import fcntl
import sys
import traceback
from pathlib import Path

from rlhf_lab.launch.sweep import SUBMISSION, Sweep
from rlhf_lab.redaction import redact
from rlhf_lab.status import read_status

OVER = ("finished", "failed")


def is_over(sweep: Sweep) -> bool:
    """Whether no run of it goes on or waits; one that was stopped waits to be continued."""
    return all(read_status(run.directory).get("state") in OVER for run in sweep.runs)


def close(root: Path) -> Path | None:
    """Draw the sweep's page if it is over and the page is not newer than every run.

    What goes wrong there is said and no more: the runs are done, and `report=` draws the page again.

    Returns:
        The page, None if it was not drawn.
    """
    if root.name == SUBMISSION or not is_over(sweep := Sweep.read(root)):
        return None
    with (root / ".page").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the last two runs may end together
        page = root / "report.html"
        ended = max((run.directory / "status.json").stat().st_mtime for run in sweep.runs)
        if page.exists() and page.stat().st_mtime > ended:
            return None
        try:
            from rlhf_lab.report.sweep import build_sweep_report  # matplotlib, for the last run only

            return build_sweep_report(root)
        except Exception as error:
            print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
            print(
                f"the sweep's page could not be drawn: {redact(str(error))}; python launch.py report={root} tries again"
            )
            return None
