"""What a run will take, judged by runs that are done: the same one under another seed, or the nearest that there is.

Seeds, names and places cost nothing and are left out of every comparison; a real-valued setting (a rate, a weight, a
limit) hardly costs anything, and says so; how much work there is scales; anything else makes a guess a rough one.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import yaml

from rlhf_lab.engine.accounting import EVALUATION

Trust = Literal["calibrated", "measured", "alike", "scaled", "rough"]
# what a stage does as often as these say; of a stage with steps of its own, its data's size costs nothing
STEPS = (("steps",), ("offline_steps", "online_iterations", "online_steps"))
ROWS = ("epochs", "prompts", "dataset.train_size")
# how often something beside the work is done
FREQUENCIES = ("evaluate_every", "checkpoint_every")
# without these in common, one run tells nothing of another: method, model, batch, lengths, machine
NEEDED = re.compile(
    r"(algorithm\.)?_target_|model\.(base|policy|reference|critic)|hardware\..*|prompts_per_step|samples_per_prompt|"
    r"batch_size|.*(max_new_tokens|max_prompt_tokens|max_response_tokens)"
)
NOT_STEPS = (EVALUATION, "tokens_per_second")  # the latter a rate, which older runs have among their times
LONGEST_PAGE_S = 600  # a page that appeared later than that after its run was drawn once more
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_RUNS = {"checkpoints", "samples", "plots", "shards", "plans", "log", "code", "policy", "scorer", "data", "wandb"}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run is expected to take.

    Fields:
        seconds: from taking its directory to its page; `least` and `most` of the runs that it is judged by, if several.
        memory_mib: the most that its process holds in main memory.
        device_memory_mib: the most that it holds on its device; 0 where there is none, or nobody looked.
        split: phase -> share of the time of the steps, evaluations left out; {} where no run logged it.
        source: by which runs, and how these differ.
    """

    seconds: float
    least: float
    most: float
    memory_mib: float
    device_memory_mib: float
    trust: Trust
    source: str
    split: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Past:
    """A finished run. `loop` is what of its seconds went by in its steps, `split` in their phases."""

    directory: Path
    settings: Mapping[str, Any]
    host: str
    seconds: float
    loop: float
    memory_mib: float
    device_memory_mib: float
    split: Mapping[str, float]


def settings_of(config: Mapping[str, Any], num_processes: int = 1) -> dict[str, Any]:
    """The leaves of what a run reads, without what says only which seed, which name and which place.

    Args:
        config: frozen; `stage` repeats all that the run reads.
    """
    runs_dir = str(config.get("runs_dir", "")).rstrip("/") + "/"
    leaves: dict[str, Any] = {"num_processes": num_processes}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                if key != "seed":
                    walk(entry, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list):
            leaves[f"{path}.length"] = len(value)
            for i, entry in enumerate(value):
                walk(entry, f"{path}.{i}")
        elif isinstance(value, str) and value.startswith(runs_dir):
            leaves[path] = re.sub(r"/a\d+/", "/a/", value.removeprefix(runs_dir))
        else:
            leaves[path] = value

    walk(config["stage"], "")
    return leaves


def amount(settings: Mapping[str, Any]) -> Mapping[str, float]:
    """How much work a run is: quantity -> number; what each is multiplied by scales the time. {} if nobody knows."""
    for keys in STEPS:
        if keys[0] in settings:
            first, *rest = (settings[key] for key in keys)
            return {"steps": first + (rest[0] * rest[1] if rest else 0)}
    return {key: settings[key] for key in ROWS if isinstance(settings.get(key), int)}


def amount_keys(settings: Mapping[str, Any]) -> set[str]:
    steps = {key for keys in STEPS if keys[0] in settings for key in keys}
    return steps | {"dataset.train_size"} if steps else set(ROWS)


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How a past run differs from one to come: in amounts, in real values, in anything else."""

    amounts: tuple[str, ...]
    reals: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def trust(self) -> Trust:
        if self.others:
            return "rough"
        return "scaled" if self.amounts else "alike" if self.reals else "measured"

    @property
    def distance(self) -> tuple[int, int, int]:
        return len(self.others), len(self.amounts), len(self.reals)


def likeness(new: Mapping[str, Any], old: Mapping[str, Any]) -> Likeness | None:
    """How two runs differ in what they take; None if the one tells nothing of the other."""
    missing = object()
    differing = [key for key in dict.fromkeys([*new, *old]) if new.get(key, missing) != old.get(key, missing)]
    if any(NEEDED.fullmatch(key) for key in differing):
        return None
    amounts = [key for key in differing if key in amount_keys(new) | set(FREQUENCIES)]
    if amount(new).keys() != amount(old).keys():
        return None
    reals = [key for key in differing if key not in amounts and _is_real(new.get(key, 0.0), old.get(key, 0.0))]
    others = [key for key in differing if key not in amounts and key not in reals]
    return Likeness(amounts=tuple(amounts), reals=tuple(reals), others=tuple(others))


def _is_real(new: Any, old: Any) -> bool:
    """Whether a setting, which one side may lack, is a real value; YAML's 1 may be one too."""
    kinds = {type(new), type(old)}
    return kinds <= {float, int} and float in kinds


def _evaluations(settings: Mapping[str, Any]) -> float:
    """How often a run with steps is measured: before the first, after the last, and as often as it was asked to be."""
    steps, every = settings.get("steps"), settings.get("evaluate_every")
    return 2 + (-(-steps // every) - 1 if steps and every else 0)


def scaled(past: Past, settings: Mapping[str, Any]) -> float:
    """The seconds of a run that differs from a past one in how much work there is.

    What went by in steps is in proportion to them, the rest to the number of evaluations.
    """
    ratio = 1.0
    before, now = amount(past.settings), amount(settings)
    for key in before.keys() & now.keys():
        ratio *= now[key] / before[key]
    rest = past.seconds - past.loop
    return past.loop * ratio + rest * _evaluations(settings) / _evaluations(past.settings)


class History:
    """The finished runs below some directories, read once."""

    def __init__(self, places: Iterable[Path], host: str) -> None:
        self.places, self.host = list(dict.fromkeys(place.absolute() for place in places)), host

    @cached_property
    def _directories(self) -> list[Path]:
        found: dict[Path, None] = {}
        for place in self.places:
            for folder, children, files in os.walk(place):
                children[:] = [child for child in children if child not in _NOT_RUNS]
                if "status.json" in files and "config.yaml" in files:
                    found[Path(folder)] = None
        return list(found)

    @cached_property
    def _read(self) -> dict[Path, Past]:
        return {}

    def _pasts(self, target: str) -> Iterator[Past]:
        for directory in self._directories:
            if directory not in self._read:
                spelled = (directory / "config.yaml").read_text()
                if target not in spelled:  # reading YAML is slow
                    continue
                past = _past(directory, spelled)
                if past is None:
                    continue
                self._read[directory] = past
            yield self._read[directory]

    def estimate(self, config: Mapping[str, Any], num_processes: int) -> Estimate | None:
        """What the run takes, by the runs that are most like it; None if none tells anything of it."""
        settings = settings_of(config, num_processes)
        found = [
            (differs.distance, past, differs)
            for past in self._pasts(settings["_target_"])
            if (differs := likeness(settings, past.settings)) is not None
        ]
        if not found:
            return None
        nearest = min(distance for distance, _, _ in found)
        alike = [(past, differs) for distance, past, differs in found if distance == nearest]
        here = [(past, differs) for past, differs in alike if past.host == self.host]
        return _judged([past for past, _ in here or alike], (here or alike)[0][1], settings, bool(here))


def _judged(pasts: Sequence[Past], differs: Likeness, settings: Mapping[str, Any], here: bool) -> Estimate:
    seconds = [scaled(past, settings) for past in pasts]
    count = pasts[0].directory.name if len(pasts) == 1 else f"{len(pasts)} runs such as {pasts[0].directory.name}"
    notes = [
        f"{key} {pasts[0].settings.get(key, 'absent')} -> {settings.get(key, 'absent')}"
        for key in (*differs.others, *differs.amounts, *differs.reals)
    ]
    more = f" and {len(notes) - 3} more" if len(notes) > 3 else ""
    source = count + (f"; {', '.join(notes[:3])}{more}" if notes else "")
    return Estimate(
        seconds=median(seconds),
        least=min(seconds),
        most=max(seconds),
        memory_mib=max(past.memory_mib for past in pasts),
        device_memory_mib=max(past.device_memory_mib for past in pasts),
        trust=differs.trust,
        split=shares(pasts[0].split),
        source=source if here else f"{source}; on {pasts[0].host}",
    )


def _past(directory: Path, spelled: str) -> Past | None:
    """What a run directory tells; None if the run did not finish, or its files are not those of a run."""
    try:
        status = json.loads((directory / "status.json").read_text())
        config = yaml.load(spelled, Loader=_LOADER)
        if status["state"] != "finished":
            return None
        environment = json.loads((directory / "environment.json").read_text())
        settings = settings_of(config, environment.get("num_processes", 1))
        page = directory / "report.html"
        drawing = page.stat().st_mtime - (directory / "status.json").stat().st_mtime if page.exists() else 0.0
        split = seconds_of_phases(directory)
        seconds = status["seconds"] + (drawing if 0 < drawing < LONGEST_PAGE_S else 0.0)
        return Past(
            directory=directory,
            settings=settings,
            host=status.get("host", environment["host"]),
            seconds=seconds,
            loop=min(sum(split.values()) or _seconds_of_pace(status), status["seconds"]),
            memory_mib=status["peak_memory_mib"],
            device_memory_mib=status.get("peak_device_memory_mib", 0),
            split=split,
        )
    except (OSError, KeyError, ValueError, TypeError, yaml.YAMLError):
        return None


def _seconds_of_pace(status: Mapping[str, Any]) -> float:
    """What the loop took by its pace; all of the time, if the run noted none."""
    progress = status.get("progress", {})
    return progress["steps"] / progress["per_second"] if progress.get("per_second") else status["seconds"]


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each of the whole."""
    whole = sum(seconds.values())
    return {phase: spent / whole for phase, spent in seconds.items()} if whole else {}


def seconds_of_phases(directory: Path) -> dict[str, float]:
    """phase -> the sum of what a run logged of its time, step by step, evaluations left out; {} if it logs none."""
    file = directory / "metrics.jsonl"
    sums: dict[str, float] = {}
    for line in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
        for key, value in line.items():
            phase = key.removeprefix("time/")
            if phase != key and "/" not in phase and phase not in NOT_STEPS:
                sums[phase] = sums.get(phase, 0.0) + float(value)
    return sums
