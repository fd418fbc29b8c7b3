"""From what a person typed to one plain, resolved configuration, and the artifacts that it refers to."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Plan:
    """A run as it would be started: its directory, its configuration, and what must be there before.

    Fields:
        config: resolved and plain; what is frozen in the run directory.
        overrides: what was typed, or what an artifact's reference says.
        needs: the plans of the artifacts that the configuration refers to, in the order in which to build them.
    """

    directory: Path
    config: dict[str, Any]
    overrides: tuple[str, ...]
    needs: tuple["Plan", ...] = field(default=(), compare=False)

    @property
    def output(self) -> Path:
        """What other runs read of it."""
        return self.directory / self.config["output"]

    @property
    def command(self) -> str:
        """What a person types to do this run."""
        return f"python launch.py {' '.join(self.overrides)}"


_referred: ContextVar[list[Plan] | None] = ContextVar("referred", default=None)


def _artifact(reference: str, seed: int, root: DictConfig) -> str:
    referred = _referred.get()
    if referred is None:  # asked while a configuration is still being merged, or only to be shown
        return f"artifact:{reference}"
    overrides = [
        f"experiments={reference}",
        f"seed={seed}",
        f"artifact_seed={root.artifact_seed}",
        f"runs_dir={root.runs_dir}",
        *(f"hardware.{key}={root.hardware[key]}" for key in ("device", "dtype", "threads")),
    ]
    plan = plan_experiment(tuple([*overrides, "debug=smoke"] if root.shrink else overrides))
    if plan not in referred:
        referred.append(plan)
    return str(plan.output)


def _one(reference: str, *, _root_: DictConfig) -> str:
    """`${artifact:study/name}`: the output folder of that experiment, under the run's artifact seed."""
    return _artifact(reference, _root_.artifact_seed, _root_)


def _many(reference: str, count: int, *, _root_: DictConfig) -> list[str]:
    """`${artifacts:study/name,k}`: the outputs of that experiment with the seeds 0 to k - 1."""
    return [_artifact(reference, seed, _root_) for seed in range(count)]


def register_resolvers() -> None:
    """Teach OmegaConf the project's references; safe to call twice."""
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


def _reached(config: DictConfig) -> set[str]:
    """The top-level keys that the run reads: its stage, its tracker, plain values, and what these refer to."""
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    reached: set[str] = {str(key) for key, value in raw.items() if not isinstance(value, dict)}
    waiting = ["stage", "tracker", "shrink"]
    while waiting:
        key = waiting.pop()
        reached.add(key)
        names = re.findall(r"\$\{(?:[\w]+:[^{}]*)?(\w+)", json.dumps(raw[key]))
        waiting += [name for name in names if name in raw and name not in reached]
    return reached


def plan_run(config: DictConfig, overrides: Sequence[str], default_name: str) -> Plan:
    """Resolve what a composed configuration's run reads; references become paths, their artifacts become `needs`.

    Raises:
        ValueError: something was typed that the run does not read.
    """
    config = config.copy()
    if config.name is None:
        config.name = default_name
    _shrink(config, {override.lstrip("+").split("=")[0] for override in overrides})
    reached = _reached(config)
    for override in overrides:
        key = override.lstrip("+~").split("=")[0].split("@")[0]
        if (group := key.split(".")[0]) in config and group not in reached:
            raise ValueError(f"{override}: this kind of run does not read {group}; remove it")
    with _collecting() as needs:
        # container by container, so that a reference in a group that is not read is not followed
        settled = {
            str(key): OmegaConf.to_container(config[key], resolve=True, throw_on_missing=False)
            if OmegaConf.is_config(config[key])
            else config[key]
            for key in config
            if key in reached
        }
    directory = Path(settled["runs_dir"]) / settled["name"]
    return Plan(directory, settled, tuple(overrides), tuple(needs))


@cache
def plan_experiment(overrides: tuple[str, ...]) -> Plan:
    """Compose one experiment file with its overrides, apart from whatever Hydra is composing at the moment."""
    state = GlobalHydra.instance()
    outer = state.hydra
    state.clear()
    token = _referred.set(None)
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("config", overrides=list(overrides))
    finally:
        _referred.reset(token)
        state.clear()
        state.hydra = outer
    return plan_run(config, overrides, default_name="unnamed")
