"""What is asked of a sweep that is submitted, as typed: a verb, a name and few options.

python launch.py status=<sweep>    cancel=<sweep>    stop=<sweep or run>    retry=<sweep>    report=<sweep>
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_lab.launch.check import near
from rlhf_lab.launch.standing import Standing, standing, standings
from rlhf_lab.launch.sweep import SUBMISSION, Sweep, find


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was typed: the verb, of which sweep or run, and its options as typed."""

    verb: str
    name: str
    options: Mapping[str, str]
    sweeps_dir: Path
    runs_dir: Path

    def sweep(self) -> Sweep:
        """The sweep that is meant.

        Raises:
            ValueError: there is none of that name.
        """
        return find(self.name, self.sweeps_dir, self.runs_dir)

    def one_run(self) -> tuple[Standing, Sweep | None] | None:
        """A run that is no sweep by itself, if that is what the name means, and the sweep that it is of, if of one."""
        for place in (Path(self.name), self.sweeps_dir / self.name, self.runs_dir / self.name):
            if not (place / "config.yaml").exists() or (place / SUBMISSION).exists():
                continue
            if (place.parent / "sweep.json").is_file():
                sweep = Sweep.read(place.parent.absolute())
                found = [one for one in standings(sweep)[1] if one.directory == place.absolute()]
                if found:
                    return found[0], sweep
            return standing(place.name, place, "", {}, None, False), None
        return None


PLACES = {"sweeps_dir": "sweeps", "runs_dir": "runs"}
OPTIONS = {
    **{"status": ("watch",), "cancel": ("force",), "stop": (), "report": ()},
    "retry": (),  # and executor.<setting>
}


def asked(arguments: Sequence[str]) -> Asked | None:
    """The verb of a command line, or None if it has none and so is a run's.

    Raises:
        ValueError: an option that the verb does not have, or a word that is nearly a verb and nothing else.
    """
    typed = {word.partition("=")[0]: word.partition("=")[2] for word in arguments}
    verbs = [word for word in typed if word in OPTIONS]
    if not verbs:
        if len(typed) == 1 and (close := difflib.get_close_matches(next(iter(typed)), OPTIONS, n=1, cutoff=0.75)):
            raise ValueError(f"{next(iter(typed))}: no such key and no such verb; did you mean {close[0]}=<sweep>?")
        return None
    verb, *others = verbs
    if others:
        raise ValueError(f"{verb}= and {others[0]}=: one at a time")
    known = (*OPTIONS[verb], *PLACES)
    options = {key: value for key, value in typed.items() if key != verb}
    for key in options:
        if key not in known and not (verb == "retry" and key.startswith("executor.")):
            raise ValueError(f"{verb}= has no option {key}; {near(key, known)}")
    if not typed[verb] and verb != "status":
        raise ValueError(f"{verb}= needs the name or the path of a sweep; `status=` lists them")
    places = {key: Path(options.pop(key, default)) for key, default in PLACES.items()}
    return Asked(verb=verb, name=typed[verb].rstrip("/"), options=options, **places)
