"""The code that jobs run: a copy of the project's files, and how a job imports them and no others."""

import shlex
import subprocess
from pathlib import Path

from rlhf_lab.launch.compose import ROOT


def snapshot(root: Path) -> Path:
    """A copy of the project's files as they are now, changed and new ones too; one that is there already stays.

    Raises:
        ValueError: the project is no git repository, so that nobody knows which files are its own.
    """
    code = root / "code"
    if code.exists():
        return code
    asked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise ValueError(f"executor.snapshot=true copies what git knows of {ROOT}, but: {answer.stderr.strip()}")
    partial = root / ".code.tmp"
    files = "\0".join(name for name in answer.stdout.split("\0") if name and (ROOT / name).exists())
    partial.mkdir(parents=True, exist_ok=True)
    copied = ["tar", "--create", "--null", "--no-recursion", "--files-from=-"]
    archive = subprocess.run(copied, cwd=ROOT, input=files.encode(), stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "--extract"], cwd=partial, input=archive, check=True)
    partial.rename(code)
    return code


def environment(code: Path) -> list[str]:
    """Lines of shell by which a job imports the project from `code`, and from nowhere else."""
    path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return [path, "export PYTHONSAFEPATH=1"]  # python -m would look into the working directory first
