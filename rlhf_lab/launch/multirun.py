"""A sweep from what was typed: every point composed and checked first, frozen, and only then started.

Hydra's own launchers compose a point when its turn comes, and again when a cluster starts it a second time. Here `-m`
reads Hydra's sweep grammar and composes all points at once. Another launcher or sweeper of Hydra (`hydra/launcher=`,
`hydra/sweeper=`) still gets the command line, one point at a time.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rlhf_lab.launch.compose import LAUNCHING, ROOT, Plan, key_of, plan_run
from rlhf_lab.launch.execute import preflight
from rlhf_lab.launch.explain import in_words
from rlhf_lab.launch.sweep import SEEDS


@dataclass(frozen=True, kw_only=True)
class Launching:
    """How runs are started, which is no part of what they are.

    Fields:
        executor: the node of the configuration that names who starts them.
        plan: whether only to say what would run; `calibrate` measures for it.
    """

    root: Path
    runs_dir: Path
    sweeps_dir: Path
    executor: Mapping[str, Any]
    plan: bool | str


class ImpossiblePoints(ValueError):
    """Points of a sweep that cannot run; a line for each mistake, with the point that it is in."""


def points(arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of every point of a sweep, in the order of the product: the last key varies fastest.

    Raises:
        ValueError: a key is swept over nothing, or over an interval, which has no list of values.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # which a glob asks
    choices: list[list[str]] = []
    for override in parser.parse_overrides(list(arguments)):
        key, typed = override.get_key_element(), override.input_line or ""
        if not override.is_sweep_override():
            choices.append([typed])
            continue
        if not override.is_discrete_sweep():
            raise ValueError(f"{typed}: an interval has no list of values; use choice() or range(), or hydra/sweeper=")
        choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        if not choices[-1]:
            raise ValueError(f"{typed}: there is no such value of {key}, so that the sweep would have no runs")
    return [list(point) for point in itertools.product(*choices)]


def plan_points(arguments: Sequence[str]) -> tuple[list[Plan], Launching]:
    """The plan of every point, each in its directory of the sweep.

    Raises:
        ImpossiblePoints: some points cannot be composed or are refused; each is named.
    """
    typed = list(arguments)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        swept = _study_parameters(typed)
        typed = [*(f"{key}={values}" for key, values in swept.items() if key not in map(key_of, typed)), *typed]
        every, name = points(typed), sweep_name(typed)
        composed: dict[tuple[str, ...], _Composed] = {}
        plans: list[Plan] = []
        launching: list[Launching] = []
        mistakes: list[tuple[list[str], Exception]] = []
        for point in every:
            try:
                one = _composed(point, composed)
                how = launching_of(one.config, name)
                plans.append(plan_run(one.config, point, one.choices, within=how.root))
                launching.append(how)
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                mistakes.append((point, error))
    if mistakes:
        raise _impossible(mistakes, len(every))
    if len({str(how) for how in launching}) > 1:
        raise ImpossiblePoints("a sweep has one executor, one sweeps_dir and one plan=; sweep over something else")
    return plans, launching[0]


@dataclass(frozen=True, kw_only=True)
class _Composed:
    config: DictConfig
    choices: Mapping[str, str]


def _composed(point: Sequence[str], before: dict[tuple[str, ...], _Composed]) -> _Composed:
    """A point as composed; points that differ by a seed alone are composed once, most of the time of a sweep.

    Args:
        before: what was composed so far, by its overrides but for seeds; the new one is added. It is the point that
            was asked for last, since all points set the same keys.
    """
    seeds = [override for override in point if override.partition("=")[0] in SEEDS]
    others = tuple(override for override in point if override not in seeds)
    if others not in before:
        config = compose("config", overrides=list(others), return_hydra_config=True)
        choices = {str(k): str(v) for k, v in config.hydra.runtime.choices.items() if v is not None}
        with open_dict(config):
            config.pop("hydra")
        before[others] = _Composed(config=config, choices=choices)
    for override in OverridesParser.create().parse_overrides(seeds):
        OmegaConf.update(before[others].config, override.get_key_element(), override.value())
    return before[others]


def _impossible(mistakes: Sequence[tuple[Sequence[str], Exception]], of: int) -> ImpossiblePoints:
    """Every point that cannot run, with the reason that a person can act on."""
    lines = [f"{' '.join(point)}: {line}" for point, error in mistakes for line in in_words(error, point).splitlines()]
    return ImpossiblePoints("\n".join([*lines, f"{len(mistakes)} of {of} points cannot run; nothing was started"]))


def check_points(plans: Sequence[Plan]) -> None:
    """Refuse what cannot work, of every run and artifact of a sweep, before any of it starts.

    Raises:
        ImpossiblePoints: naming the points.
    """
    mistakes: list[tuple[Sequence[str], Exception]] = []
    sound: set[Path] = set()
    for plan in plans:
        try:
            preflight(plan, sound)
        except (HydraException, ValueError) as error:
            mistakes.append((plan.overrides, error))
    if mistakes:
        raise _impossible(mistakes, len(plans))


def _is_sweep(argument: str) -> bool:
    return any(override.is_sweep_override() for override in OverridesParser.create().parse_overrides([argument]))


def _study_parameters(typed: Sequence[str]) -> dict[str, str]:
    """What a configuration file sweeps over, `hydra.sweeper.params`.

    Read of the first point: what is the same in all of them need not fit the default of what is swept.

    Raises:
        HydraException, OmegaConfBaseException: what is the same in all points cannot be composed, whatever is swept.
    """
    try:
        config = compose("config", overrides=points(typed)[0], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        try:
            compose("config", overrides=[argument for argument in typed if not _is_sweep(argument)])
        except (HydraException, OmegaConfBaseException) as common:
            if str(common) == str(error):  # said once and not for every point
                raise
        return {}
    params = OmegaConf.select(config, "hydra.sweeper.params")
    return {} if params is None else {str(key): str(values) for key, values in params.items()}


def launching_of(config: DictConfig, name: str) -> Launching:
    """How a composed configuration's run is started; `name` is the sweep's unless it says its own."""
    return Launching(
        root=Path(config.sweeps_dir) / str(config.sweep or name),
        runs_dir=Path(config.runs_dir),
        sweeps_dir=Path(config.sweeps_dir),
        executor=dict(OmegaConf.to_container(config.executor, resolve=True)),  # type: ignore[arg-type]
        plan=config.plan,
    )


def sweep_name(typed: Sequence[str]) -> str:
    """The same for the same command, so that typing it again continues the sweep: what varies, and a digest.

    Example: `algorithm-reward-seed-3f2a91`.
    """
    said = sorted(o for o in typed if key_of(o).split(".")[0] not in LAUNCHING)
    varying = sorted(key_of(o).split(".")[-1].replace("/", ".") for o in typed if _is_sweep(o))
    return "-".join([*varying, sha256("\n".join(said).encode()).hexdigest()[:6]])
