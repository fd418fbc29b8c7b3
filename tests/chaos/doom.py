"""One process that is killed with SIGKILL at a moment chosen beforehand, or left to come to its end."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

SOURCE = Path(__file__).with_name("doom.c")
LONGEST = 900  # seconds; what takes longer hangs


@dataclass(frozen=True, kw_only=True)
class AtTime:
    """A kill so many seconds after the start."""

    seconds: float

    def __str__(self) -> str:
        return f"after {self.seconds:.2f} s"


@dataclass(frozen=True, kw_only=True)
class AtOperation:
    """A kill at the file operation `place`, counted from 0: `half` before it or half way through it, or just after."""

    place: int
    half: bool

    def __str__(self) -> str:
        return f"{'in' if self.half else 'after'} operation {self.place}"


@dataclass(frozen=True, kw_only=True)
class AtFirst:
    """A kill at the first file operation "function path" that matches the pattern `like`."""

    like: str
    half: bool

    def __str__(self) -> str:
        return f"{'in' if self.half else 'after'} the first {self.like}"


Moment = AtTime | AtOperation | AtFirst


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """What one process did.

    Fields:
        code: its exit code, -9 if it was killed.
        seconds: from its start to its end.
        operations: what it did to files below runs/, one "function path" each.
        said: what it printed.
    """

    code: int
    seconds: float
    operations: list[str]
    said: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def last(self) -> str:
        return self.operations[-1] if self.operations else "nothing written yet"


@cache
def library() -> Path:
    """The compiled doom.c.

    Raises:
        FileNotFoundError: there is no C compiler.
    """
    folder = Path(mkdtemp(prefix="doom"))
    built = folder / "doom.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(built), str(SOURCE), "-ldl"], check=True)
    return built


def forget_library() -> None:
    """Remove what `library` compiled."""
    if library.cache_info().currsize:
        shutil.rmtree(library().parent)
        library.cache_clear()


def sit(folder: Path, command: Sequence[str], moment: Moment | None) -> Sitting:
    """Start `command` in `folder` and kill it at `moment`, if it lives so long; files in folder/runs count."""
    said, note = folder / "said.txt", folder / "operations.txt"
    match moment:
        case AtOperation():
            when = {"DOOM_AT": str(2 * moment.place + (not moment.half))}
        case AtFirst():
            when = {"DOOM_AT": str(int(not moment.half)), "DOOM_LIKE": moment.like}
        case _:
            when = {"DOOM_AT": "-1"}
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        **{"LD_PRELOAD": str(library()), "DOOM_ROOT": str(folder.resolve() / "runs"), "DOOM_NOTE": str(note)},
        **when,
    }
    note.write_text("")
    begun = time.monotonic()
    with said.open("w") as console:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=console, stderr=subprocess.STDOUT)
        try:
            process.wait(moment.seconds if isinstance(moment, AtTime) else LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return Sitting(
        code=process.returncode,
        seconds=time.monotonic() - begun,
        operations=note.read_text().splitlines(),
        said=said.read_text(),
    )
