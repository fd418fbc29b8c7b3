"""The command line: compose, plan, execute. A person's mistake is one line and exit code 2, a failed run 1."""

import os
import sys
import traceback

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf_lab.launch import outcome
from rlhf_lab.launch.asking import asked
from rlhf_lab.launch.compose import ROOT, register_resolvers
from rlhf_lab.launch.job import STOPPED
from rlhf_lab.redaction import redact
from rlhf_lab.stopping import Stopped

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


def with_own_data(arguments: list[str]) -> list[str]:
    """The arguments, with `dataset=table` where a person names data but no kind of data set.

    The default data set is the embedded world, whose splits, sizes and short responses mean nothing for a table.
    """
    typed = {argument.split("=")[0].lstrip("+"): argument.partition("=")[2] for argument in arguments}
    path = typed.get("dataset.path", "embedded:")
    if path.startswith("embedded:") or "dataset" in typed or "experiments" in typed:
        return arguments
    if os.environ.get("RANK", "0") == "0":  # of several processes of torchrun, the first one speaks
        settings = "its settings: conf/dataset/table.yaml"
        print(f"dataset=table, since dataset.path={path} is a table ({settings})", flush=True)
    return ["dataset=table", *arguments]


def launch(config: DictConfig) -> float | None:
    """What Hydra calls with each composed configuration; the metric that `returns` names, if it names one."""
    from rlhf_lab.launch.start import start_run

    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    choices = {str(group): str(option) for group, option in settings.runtime.choices.items() if option is not None}
    try:
        return start_run(config, overrides, choices)
    except Exception as error:
        if settings.mode == RunMode.MULTIRUN:  # another launcher's, whose sweeper has to be told
            say_why(error, overrides, prefix=f"{' '.join(overrides)}: ")
            raise
        sys.exit(say_why(error, overrides))  # here, where Hydra does not print the exception itself


def main() -> None:
    """Run the command line; never returns a traceback for a mistake of the person who typed it."""
    os.environ["RLHF_LAB_ROOT"] = str(ROOT)  # where conf/config.yaml finds experiments/
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions reach the handlers below
    sys.argv[1:] = with_own_data(sys.argv[1:])
    register_resolvers()
    typed = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    try:
        if wish := asked(typed):
            from rlhf_lab.launch.follow import follow

            sys.exit(follow(wish))
        if is_sweep(sys.argv[1:]):
            from rlhf_lab.launch.start import start_sweep

            sys.exit(start_sweep(typed))
        hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")(launch)()
    except Exception as error:
        sys.exit(say_why(error, typed))
    except Stopped as stopped:
        if outcome.may_speak():
            print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(INTERRUPTED)


def is_sweep(arguments: list[str]) -> bool:
    """Whether a command line is a sweep that no other launcher or sweeper of Hydra is asked for."""
    flags = {argument for argument in arguments if argument.startswith("-")}
    others = [argument for argument in arguments if argument.startswith(("hydra/launcher=", "hydra/sweeper="))]
    return bool(flags) and flags <= {"-m", "--multirun"} and not others


def say_why(error: Exception, overrides: list[str], prefix: str = "") -> int:
    """Print why nothing, or no more, was run, and return the exit code that says which."""
    from rlhf_lab.launch.execute import RunFailed

    code = REFUSED
    if isinstance(error, HydraException | OmegaConfBaseException | ValueError):
        from rlhf_lab.launch.explain import in_words

        message = in_words(error, overrides)
    elif isinstance(error, RunFailed):
        code, message = FAILED, str(error)
    else:  # ours: no run directory has its traceback
        code, message = FAILED, f"{type(error).__name__}: {error}"
    if not outcome.may_speak():
        return code
    if code == FAILED and not isinstance(error, RunFailed):
        print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    for line in redact(message).splitlines():
        print(f"error: {prefix}{line}", file=sys.stderr)
    return code
