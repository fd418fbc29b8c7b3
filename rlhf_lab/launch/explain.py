"""Hydra's complaints in one line: what was typed, what is there, and the closest match."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from rlhf_lab.launch.check import near
from rlhf_lab.launch.compose import ROOT, key_of


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key != "_target_":
                yield f"{prefix}{key}"
                yield from _keys(value, f"{prefix}{key}.")


def _known_keys(overrides: Sequence[str], wrong: str) -> list[str]:
    """Every key of what the other overrides compose; of the default configuration, if they do not."""
    others = [o for o in overrides if key_of(o) != wrong and not o.startswith("hydra")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        try:
            config = compose("config", overrides=others)
        except (HydraException, OmegaConfBaseException):
            config = compose("config")
    return list(_keys(OmegaConf.to_container(config, resolve=False)))


def _no_option(group: str, option: str) -> str:
    folder = ROOT / "conf" / group
    if group.startswith("experiments"):
        option = f"{group.removeprefix('experiments')}/{option}".lstrip("/")
        group, folder = "experiments", ROOT / "experiments"
    options = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    return f"{group}={option}: no such option; {near(option, options)} (there are: {', '.join(options)})"


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line for a composition or a construction that failed."""
    text = str(error)
    first = (text.strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, ValueError):
        return str(error.__cause__)
    if isinstance(error, OverrideParseException):
        reason = text.strip().splitlines()[-1 if first.startswith("Error parsing") else 0]
        return f"{error.override}: not of the form key=value ({reason}); a value with special characters needs quotes"
    if isinstance(error, InterpolationToMissingValueError) and (match := re.search(r"mandatory value: (\S+)", text)):
        return f"{match[1]} is missing; set {match[1]}=<value>"
    if isinstance(error, InterpolationKeyError) and (match := re.search(r"key '([^']+)' not found", text)):
        where = next((o for o in overrides if match[1] in o), error.full_key)
        return f"{where}: there is no {match[1]}; {near(match[1], _known_keys([], match[1]))}"
    if isinstance(error, MissingConfigException) and (match := re.search(r"Could not find '([^']+)/([^'/]+)'", text)):
        return _no_option(*match.groups())
    if match := re.search(
        r"Could not (?:override|append to config\. An item is already at|delete from config\.) '([^']+)'", text
    ):
        if "already at" in match[0]:
            return f"{match[1]} is there already; set it without the +"
        wrong = key_of(match[1])
        known = _known_keys(overrides, wrong)
        if wrong in known:  # a mapping, which would have to be replaced
            return f"{wrong} takes its entries one by one: +{wrong}.<key>=<value>"
        return f"{wrong}: no such key; {near(wrong, known if '.' in wrong else [k for k in known if '.' not in k])}"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        key, _, values = match[1].partition("=")
        as_list = f", for a list write '{key}=[{values}]'" if "." in key else ""
        return f"{match[1]}: several values; for a sweep add -m{as_list}"
    return first


def in_words(error: Exception, overrides: Sequence[str]) -> str:
    """What a person is told of an error of theirs."""
    ours = isinstance(error, HydraException | OmegaConfBaseException)
    return explain(error, overrides) if ours else str(error)
