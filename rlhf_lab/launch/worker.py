"""One process that does one frozen plan: `python -m rlhf_lab.launch.worker <sweep> <digest of the plan>`.

What it does was decided when the sweep was submitted; the configuration files are not read.
"""

import sys
from pathlib import Path

from rlhf_lab import stopping
from rlhf_lab.launch import outcome
from rlhf_lab.launch.job import FAILED, FINISHED, STOPPED, die_with_parent, note_failure, now_as_said


def main() -> None:
    """Exit with what `work` returns; as one of several ranks, with what makes them end or start again together."""
    die_with_parent()
    stopping.listen()
    root, digest = sys.argv[1:]
    code = 0 if outcome.is_settled() else outcome.settle(work_and_close(Path(root), digest))
    stopping.ignore()  # whoever asks does so until this process has ended
    sys.exit(code)


def work_and_close(root: Path, digest: str) -> int:
    """Do the plan; the page of the sweep too if nothing else of it is left to do."""
    from rlhf_lab.engine import ranks
    from rlhf_lab.launch.closing import close

    code = work(root, digest)
    if code != STOPPED and ranks.is_first() and (page := close(root)):
        print(f"the sweep is over; its page: {page}", flush=True)
    return code


def work(root: Path, digest: str) -> int:
    """Do the plan, and return an exit code as in `rlhf_lab.launch.job`."""
    from rlhf_lab.engine import ranks  # torch, after this process has begun to listen
    from rlhf_lab.launch.execute import build, execute
    from rlhf_lab.launch.main import say_why
    from rlhf_lab.launch.sweep import Sweep
    from rlhf_lab.redaction import redact

    since = now_as_said()
    directory: Path | None = None
    overrides: list[str] = []
    try:
        sweep = Sweep.read(root)
        plan = sweep.plan(digest)
        directory, overrides = plan.directory, list(plan.overrides)
        if digest in {artifact.plan for artifact in sweep.artifacts}:
            build(plan)
        else:
            execute(plan)
        ranks.stop()
    except stopping.Stopped as stopped:
        if ranks.is_first():
            print(stopped, flush=True)
        ranks.stop()
        return STOPPED
    except Exception as error:
        if ranks.lost():  # all are started again, or another says why not
            return FAILED
        code = say_why(error, overrides)
        if directory is not None:
            reason = redact((str(error).splitlines() or [type(error).__name__])[0])
            note_failure(directory, reason, since=since)
        return code
    return FINISHED


if __name__ == "__main__":
    main()
