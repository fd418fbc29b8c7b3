"""From what a person typed to one plain, resolved configuration, and the artifacts that it refers to."""

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from rlhf_lab.launch.check import check
from rlhf_lab.redaction import refuse_secrets

ROOT = Path(__file__).resolve().parents[2]
LONGEST_SUFFIX = 60
# what does not belong into a run's name, since it does not change its results or says where they are
_INCIDENTAL = {"name", "runs_dir", "artifacts", "keep_checkpoints", "debug", "hardware", "tracker"}
# how a run is started, which is no part of what it is
LAUNCHING = ("executor", "num_processes", "plan", "returns", "sweep", "sweeps_dir")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run as it would be started: its directory, its configuration, and what must be there before.

    Fields:
        config: resolved and plain; what is frozen in the run directory.
        overrides: what was typed, or what an artifact's reference says.
        num_processes: that share its work, on all nodes together.
        needs: the plans of the artifacts that the configuration refers to, in the order in which to build them.
    """

    directory: Path
    config: dict[str, Any]
    overrides: tuple[str, ...]
    num_processes: int
    needs: tuple["Plan", ...] = field(default=(), compare=False)

    @property
    def output(self) -> Path:
        """What other runs read of it."""
        return self.directory / self.config["output"]

    @property
    def command(self) -> str:
        """What a person types to do this run."""
        return f"python launch.py {shlex.join(self.overrides)}"


def in_order(*plans: Plan) -> Iterator[Plan]:
    """What the plans need, directly or through others, each once and after its own needs."""
    seen: set[Path] = set()

    def walk(of: Plan) -> Iterator[Plan]:
        for needed in of.needs:
            if needed.directory not in seen:
                seen.add(needed.directory)
                yield from walk(needed)
                yield needed

    for plan in plans:
        yield from walk(plan)


_referred: ContextVar[list[Plan] | None] = ContextVar("referred", default=None)


def _artifact(reference: str, seed: int, root: DictConfig) -> str:
    referred = _referred.get()
    if referred is None:  # asked while a configuration is still being merged, or only to be shown
        return f"artifact:{reference}"
    settings = {"seed": seed, "artifact_seed": root.artifact_seed, "runs_dir": root.runs_dir}
    settings |= {f"hardware.{key}": value for key, value in root.hardware.items() if key != "_target_"}
    settings |= {"num_processes": root.num_processes} if root.num_processes != 1 else {}
    plan = plan_experiment(reference, tuple(settings.items()), bool(root.shrink))
    if plan not in referred:
        referred.append(plan)
    return str(plan.output)


def _one(reference: str, *, _root_: DictConfig) -> str:
    """`${artifact:study/name}`: the output folder of that experiment, under the run's artifact seed."""
    return _artifact(reference, _root_.artifact_seed, _root_)


def _many(reference: str, count: int, *, _root_: DictConfig) -> list[str]:
    """`${artifacts:study/name,k}`: the outputs of that experiment with the seeds 0 to k - 1."""
    return [_artifact(reference, seed, _root_) for seed in range(count)]


def _here(what: Literal["device", "processes"]) -> str | int:
    """`${here:device}`: cuda if this machine has a GPU, else cpu; `${here:processes}`: one for each GPU, else two."""
    gpus = torch.cuda.device_count()
    return ("cuda" if gpus else "cpu") if what == "device" else gpus or 2


def register_resolvers() -> None:
    """Teach OmegaConf the project's references, and what this machine has; safe to call twice."""
    OmegaConf.register_new_resolver("here", _here, replace=True)
    OmegaConf.register_new_resolver("artifact", _one, replace=True)
    OmegaConf.register_new_resolver("artifacts", _many, replace=True)


@contextmanager
def _collecting() -> Iterator[list[Plan]]:
    found: list[Plan] = []
    token = _referred.set(found)
    try:
        yield found
    finally:
        _referred.reset(token)


def _shrink(config: DictConfig, typed: Collection[str]) -> None:
    """Make the settings that `shrink` names small, those that the run has and that were not typed.

    A number is a cap; a mapping says which value becomes which.
    """
    for key, small in config.shrink.items():
        value = OmegaConf.select(config, str(key))
        if value is None or key in typed:
            continue
        if OmegaConf.is_dict(small):
            OmegaConf.update(config, str(key), small.get(value, value))
        elif value > small:
            OmegaConf.update(config, str(key), small)


def _reached(config: DictConfig) -> dict[str, set[str]]:
    """What the run reads: its stage, its tracker, plain values, and what these refer to.

    Returns:
        Top-level key -> the entries of it that are read; none means all. A group that is a mere list of names, such as
        `scorers`, is read by entry: what is not referred to need not be built.
    """
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    reached: dict[str, set[str]] = {str(key): set() for key, value in raw.items() if not isinstance(value, dict)}
    waiting = [("stage", ""), ("tracker", ""), ("shrink", ""), ("executor", "")]
    for key, _ in waiting:
        if not isinstance(raw.get(key), dict):
            raise ValueError(f"every run reads {key}, which is not there; choose one with {key}=<option>")
    done: set[tuple[str, str]] = set()
    while waiting:
        key, entry = place = waiting.pop()
        if place in done:
            continue
        done.add(place)
        by_entry = entry in raw[key] and "_target_" not in raw[key]
        read = reached.setdefault(key, {entry} if by_entry else set())
        if not by_entry:
            read.clear()
        elif read:
            read.add(entry)
        spelled = json.dumps(raw[key][entry] if by_entry else raw[key])
        names = re.findall(r"\$\{(?:[\w]+:[^{}]*)?(\w+)(?:\.(\w+))?", spelled)
        waiting += [(name, inner) for name, inner in names if isinstance(raw.get(name), dict)]
    return reached


def default_name(
    overrides: Sequence[str], choices: Mapping[str, str], config: DictConfig, reached: Collection[str]
) -> str:
    """A run's name: its experiment or its method and reward, its seed, and whatever else was typed.

    What was typed in full becomes a digest when it is long.

    Example: `ppo_lag-ensemble_uwo-s0`, `ppo-single-s1-algorithm.kl_coef=0.1`, `reward_ensembles/ppo_uwo-s3`.
    """
    if experiment := choices.get("experiments"):
        parts, said = [experiment], {"experiments"}
    else:
        named = "algorithm" in reached or any(key_of(override) == "algorithm" for override in overrides)
        parts = [choices["algorithm" if named else "stage"]]
        parts += [choices["reward"]] if "reward" in reached else []
        said = {"algorithm", "reward", "stage"}
    parts.append(f"s{config.seed}")
    parts += [f"a{config.artifact_seed}"] if config.artifact_seed else []
    said |= {"seed", "artifact_seed"}
    silent = {*_INCIDENTAL, *LAUNCHING}
    others = sorted(o for o in overrides if key_of(o) not in said and key_of(o).split(".")[0] not in silent)
    if others:
        spelled = re.sub(r"[^\w.,=+-]+", "_", ",".join(others))
        parts.append(spelled if len(spelled) <= LONGEST_SUFFIX else sha256(",".join(others).encode()).hexdigest()[:8])
    return "-".join(parts)


def key_of(override: str) -> str:
    """What an override sets."""
    return override.lstrip("+~").split("=")[0].split("@")[0]


def _settle(config: DictConfig, reached: Mapping[str, set[str]]) -> dict[str, Any]:
    """The resolved values of what the run reads.

    Container by container, so that a reference in a group that is not read is not followed.
    """

    def plain(value: Any) -> Any:
        if not OmegaConf.is_config(value):
            return value
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=False)

    settled: dict[str, Any] = {}
    for key in map(str, config):
        if read := reached.get(key):
            settled[key] = {
                str(entry): "???" if OmegaConf.is_missing(config[key], entry) else plain(config[key][entry])
                for entry in config[key]
                if entry in read
            }
        elif key in reached:
            settled[key] = plain(config[key])
    return settled


def plan_run(
    config: DictConfig, overrides: Sequence[str], choices: Mapping[str, str], within: Path | None = None
) -> Plan:
    """Check and resolve what a composed configuration's run reads; references become paths, their artifacts `needs`.

    Args:
        choices: group -> option, as composed; they name a run that has no name.
        within: the directory that holds the run's own; the configuration's `runs_dir` if none is given.

    Raises:
        BadConfig: a key, a type or a range is wrong.
        ValueError: something was typed that the run does not read, or holds a secret.
    """
    config = config.copy()
    reached = _reached(config)
    for override in overrides:
        group = key_of(override).split(".")[0]
        if group in config and group not in reached and group not in _INCIDENTAL:
            raise ValueError(f"{override}: this kind of run does not read {group}; remove it")
    if config.name is None:
        config.name = default_name(overrides, choices, config, reached)
    _shrink(config, {key_of(override) for override in overrides})
    refuse_secrets({key_of(o): o.partition("=")[2] for o in overrides}, "command line")
    check(_settle(config, reached))  # before the artifacts are looked at, so that a typo is refused at once
    with _collecting() as needs:
        settled = _settle(config, reached)
    refuse_secrets(settled, "configuration")
    return Plan(
        directory=Path(settled["runs_dir"]) / settled["name"] if within is None else within / flat(settled["name"]),
        config={key: value for key, value in settled.items() if key not in LAUNCHING},
        overrides=tuple(overrides),
        num_processes=settled["num_processes"],
        needs=tuple(needs),
    )


def flat(name: str) -> str:
    """A run's name as one folder: within a sweep there are no studies."""
    return name.replace("/", ".")


@cache
def plan_experiment(reference: str, settings: tuple[tuple[str, Any], ...], smoke: bool) -> Plan:
    """The plan of one experiment file under some settings (key, value), as if these had been typed."""
    config = _compose_experiment(reference, smoke).copy()
    for key, value in settings:
        OmegaConf.update(config, key, value)
    typed = [f"experiments={reference}", *(f"{key}={value}" for key, value in settings)]
    return plan_run(config, [*typed, "debug=smoke"] if smoke else typed, {"experiments": reference})


@cache
def _compose_experiment(reference: str, smoke: bool) -> DictConfig:
    """Compose once for all seeds, and apart from whatever Hydra is composing at the moment."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    token = _referred.set(None)
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("config", overrides=[f"experiments={reference}", *(["debug=smoke"] if smoke else [])])
    finally:
        _referred.reset(token)
        GlobalHydra.instance().hydra = outer  # of the instance that stands there now: Hydra replaced it
