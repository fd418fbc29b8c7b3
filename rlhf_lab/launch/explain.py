"""Hydra's complaints in one line: what was typed, what is there, and the closest match."""

import re
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_lab.launch.check import near
from rlhf_lab.launch.compose import ROOT


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key in config:
        path = f"{prefix}{key}"
        found.append(path)
        node = OmegaConf.select(config, str(key), throw_on_missing=False) if not config._is_missing(key) else None
        if isinstance(node, DictConfig) and OmegaConf.is_dict(node):
            found += _keys(node, f"{path}.")
    return found


def _composed_without(overrides: Sequence[str], key: str) -> list[str]:
    """Every key of the configuration that the other overrides compose."""
    rest = [o for o in overrides if o.lstrip("+~").split("=")[0].split("@")[0] != key and not o.startswith("hydra")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        try:
            return [key for key in _keys(compose("config", overrides=rest)) if "_target_" not in key]
        except (HydraException, OmegaConfBaseException):
            return [key for key in _keys(compose("config")) if "_target_" not in key]


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line (or a few) for a composition that failed."""
    text = str(error)
    if isinstance(error, MissingConfigException) and (match := re.search(r"Could not find '([^']+)/([^'/]+)'", text)):
        group, option = match.groups()
        options = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        if group.startswith("experiments"):
            here = ROOT / "experiments"
            options = sorted(str(path.relative_to(here).with_suffix("")) for path in here.rglob("*.yaml"))
            option = f"{group.removeprefix('experiments')}/{option}".lstrip("/")
        return f"{group}={option}: no such option; {near(option, options)} (there are: {', '.join(options)})"
    if match := re.search(r"Could not (?:override|append|delete) '([^']+)'", text):
        key = match[1].split("@")[0]
        known = _composed_without(overrides, key)
        return f"{key}: no such key; {near(key, known) if '.' in key else near(key, [k for k in known if '.' not in k])}"
    return text.strip().splitlines()[0]
