"""One process that does one frozen plan: `python -m rlhf_lab.launch.worker <sweep> <digest of the plan>`.

What it does was decided when the sweep was submitted; the configuration files are not read.
"""

import sys
from pathlib import Path

from rlhf_lab import stopping
from rlhf_lab.launch.job import FINISHED, STOPPED, die_with_parent, note_failure


def main() -> None:
    """Exit with what `work` returns."""
    die_with_parent()
    stopping.listen()
    root, digest = sys.argv[1:]
    sys.exit(work(Path(root), digest))


def work(root: Path, digest: str) -> int:
    """Do the plan, and return an exit code as in `rlhf_lab.launch.job`."""
    from rlhf_lab.launch.execute import execute  # torch, after this process has begun to listen
    from rlhf_lab.launch.main import say_why
    from rlhf_lab.launch.sweep import Sweep

    directory: Path | None = None
    overrides: list[str] = []
    try:
        plan = Sweep.read(root).plan(digest)
        directory, overrides = plan.directory, list(plan.overrides)
        execute(plan)
    except stopping.Stopped as stopped:
        print(f"{directory} stopped: {stopped}", flush=True)
        return STOPPED
    except Exception as error:
        code = say_why(error, overrides)
        if directory is not None:
            note_failure(directory, (str(error).splitlines() or [type(error).__name__])[0])
        return code
    return FINISHED


if __name__ == "__main__":
    main()
