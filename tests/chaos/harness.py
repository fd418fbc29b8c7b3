"""Chains of kills: a run is killed, looked at, started again, killed again, and compared when it comes to its end."""

import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_lab.launch.compose import ROOT
from tests.chaos.doom import AtOperation, AtTime, Moment, Sitting, sit
from tests.chaos.whole import achieved, differences, entries, faults

MOST_KILLS = 5  # of one run, before it is let to come to its end
NAME = "run"


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A run that nothing happened to.

    Fields:
        folder: where it was typed; its runs are in `folder`/runs.
        sitting: its one process.
    """

    folder: Path
    sitting: Sitting

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def moment(self, source: random.Random, timed: bool) -> Moment:
        """When to kill another such run.

        Either uniformly over the time that this one took, or at one of its file operations. Neighbours that are alike,
        such as the hundred writes of one table, count as one, or every kill would hit a table.
        """
        if timed:
            return AtTime(seconds=source.uniform(0, self.sitting.seconds))
        operations = self.sitting.operations
        firsts = [k for k, each in enumerate(operations) if not k or each != operations[k - 1]]
        chosen = source.randrange(len(firsts))
        end = [*firsts[1:], len(operations)][chosen]
        return AtOperation(place=source.randrange(firsts[chosen], end), half=source.random() < 0.5)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill: when, what the process did last, and what was wrong just after it."""

    moment: Moment
    last: str
    faults: list[str]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One run through all its kills. `losses`: what was wrong at its end, by which none of its kills is survived."""

    number: int
    from_nothing: bool
    kills: list[Kill] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
        return 0 if self.losses else sum(not kill.faults for kill in self.kills)


class Trial:
    """One command, its undisturbed run, and the chains that are compared with it.

    Args:
        folder: of the trial's own, empty or absent.
        typed: the command, without name= and runs_dir=.
        artifacts: a runs directory with artifacts that it may take over, or None.
        say: takes a line of progress.
    """

    def __init__(
        self, folder: Path, typed: tuple[str, ...], *, artifacts: Path | None, say: Callable[[str], None]
    ) -> None:
        self.folder, self.say = folder, say
        self.typed = ("debug=smoke", *typed, f"name={NAME}")
        self.command = (sys.executable, str(ROOT / "launch.py"), *self.typed, "runs_dir=runs")
        self.whole = self._undisturbed("undisturbed", artifacts)
        self.alone = self.whole  # once its artifacts are there

    def _undisturbed(self, name: str, artifacts: Path | None) -> Undisturbed:
        folder = self.folder / name
        self._prepare(folder, artifacts)
        sitting = sit(folder, self.command, None)
        if sitting.code:
            raise RuntimeError(f"{' '.join(self.typed)} fails even undisturbed: {sitting.said[-2000:]}")
        self.say(f"{name}: {sitting.seconds:.0f} s, {len(sitting.operations)} file operations")
        return Undisturbed(folder=folder, sitting=sitting)

    def _prepare(self, folder: Path, artifacts: Path | None) -> None:
        folder.mkdir(parents=True)
        if artifacts is None:
            (folder / "runs").mkdir()
        else:
            shutil.copytree(artifacts, folder / "runs", ignore=shutil.ignore_patterns(NAME))

    def control(self) -> list[str]:
        """Run once more beside the artifacts, undisturbed: the differences then are no kill's. Chains measure by it."""
        self.alone = self._undisturbed("control", self.whole.runs)
        return list(differences(self.alone.runs, self.whole.runs))

    def drawn(self, number: int, seed: int, *, most: int, from_nothing: bool) -> list[Moment]:
        """The moments of chain `number`; clock and operations take turns."""
        like = self.whole if from_nothing else self.alone
        return [
            like.moment(random.Random(f"{seed} {' '.join(self.typed)} {number} {k}"), timed=(number + k) % 2 == 1)
            for k in range(most)
        ]

    def chain(self, number: int, moments: Sequence[Moment], *, from_nothing: bool) -> Chain:
        """Kill one run at each of the moments; a process that comes to its end before its moment ends the chain."""
        folder = self.folder / f"chain_{number:02d}"
        self._prepare(folder, None if from_nothing else self.whole.runs)
        chain = Chain(number=number, from_nothing=from_nothing)
        before: dict[str, int] = {}
        for moment in [*moments, None]:
            sitting = sit(folder, self.command, moment)
            if moment is None or not sitting.killed:
                chain.losses.extend(self._at_the_end(folder, sitting, from_nothing))
                break
            after = achieved(folder / "runs")
            wrong = [*self._faults(folder), *(f"lost: {what}" for what in before if after.get(what, -1) < before[what])]
            chain.kills.append(Kill(moment=moment, last=sitting.last, faults=wrong))
            self.say(f"chain {number}, killed {moment} ({sitting.last}){''.join(f'; {each}' for each in wrong)}")
            before = after
        verdict = "; ".join(chain.losses) or "ended as the undisturbed one"
        self.say(f"chain {number}{', from nothing' if from_nothing else ''}: {verdict}")
        if not chain.losses and chain.survived == len(chain.kills):
            shutil.rmtree(folder)
        return chain

    def _faults(self, folder: Path) -> list[str]:
        try:
            return list(faults(folder / "runs", self.whole.runs))
        except Exception as error:  # whatever a reader trips over is a fault
            return [f"{type(error).__name__}: {error}"]

    def _at_the_end(self, folder: Path, sitting: Sitting, twice: bool) -> Iterator[str]:
        if sitting.code:
            yield f"the last process ended with {sitting.code}: {sitting.said[-1000:]}"
            return
        yield from differences(folder / "runs", self.whole.runs)
        if twice:
            before = {name: (folder / "runs" / name).stat().st_mtime_ns for name in entries(folder / "runs")}
            again = sit(folder, self.command, None)
            after = {name: (folder / "runs" / name).stat().st_mtime_ns for name in entries(folder / "runs")}
            changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            if again.code or changed:
                yield f"the finished run, started again, ended with {again.code} and changed {changed}"
