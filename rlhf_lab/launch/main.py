"""The command line: compose, name, plan, execute; mistakes in one line, exit code 2; failures in full, exit code 1."""

import os
import re
import sys
from hashlib import sha256

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf_lab.launch.compose import ROOT, plan_run, register_resolvers

LONGEST_SUFFIX = 60
_SAID_BY_NAME = ("algorithm", "reward", "seed", "name", "runs_dir", "hardware", "tracker", "artifacts", "debug")


def default_name(overrides: list[str], choices: dict[str, str], seed: int) -> str:
    """A run's name from its choices, its seed, and whatever else was typed (as a digest when that is long).

    Example: `ppo_lag-ensemble_uwo-s0`, `ppo-single-s1-algorithm.kl_coef=0.1`.
    """
    others = sorted(o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] not in _SAID_BY_NAME[:9] or "." in o.split("=")[0])
    parts = [choices["algorithm"], choices["reward"], f"s{seed}"]
    if others:
        spelled = re.sub(r"[^\w.,=+-]+", "_", ",".join(others))
        short = len(spelled) <= LONGEST_SUFFIX
        parts.append(spelled if short else sha256(",".join(others).encode()).hexdigest()[:8])
    return "-".join(parts)


def launch(config: DictConfig) -> None:
    """What Hydra calls with each composed configuration."""
    from rlhf_lab.launch.execute import execute

    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    choices = {str(key): str(value) for key, value in settings.runtime.choices.items()}
    try:
        execute(plan_run(config, overrides, default_name(overrides, choices, config.seed)))
    except (ValueError, FloatingPointError, OSError) as error:
        if settings.mode == RunMode.MULTIRUN:  # the other points of the sweep go on; Hydra raises at the end
            print(f"error: {' '.join(overrides)}: {error}", file=sys.stderr)
            raise
        _refuse(str(error))


def main() -> None:
    """Run the command line; never returns a traceback for a mistake of the person who typed it."""
    os.environ["RLHF_LAB_ROOT"] = str(ROOT)  # where conf/config.yaml finds experiments/
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions reach the handlers below
    register_resolvers()
    entry = hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")(launch)
    try:
        entry()
    except (HydraException, OmegaConfBaseException) as error:
        from rlhf_lab.launch.explain import explain

        _refuse(explain(error, [argument for argument in sys.argv[1:] if not argument.startswith("-")]))
    except (ValueError, FloatingPointError, OSError) as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        _refuse("interrupted; the same command continues from the last checkpoint")


def _refuse(message: str) -> None:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
