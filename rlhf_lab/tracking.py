"""Mirrors of the metrics outside the run directory; the directory itself never depends on them."""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

from rlhf_lab.engine.checkpoint import write_atomically
from rlhf_lab.types import Metrics

End = Literal["finished", "stopped", "failed"]


class NoTracker:
    """Metrics stay in the run directory."""

    def start(self, directory: Path, config: dict[str, Any]) -> None: ...
    def log(self, step: int, metrics: Metrics) -> None: ...
    def finish(self, state: End) -> None: ...


class WandbTracker:
    """Weights & Biases; continues the same W&B run when the run directory is resumed, and never asks for a login.

    The key comes from the environment (WANDB_API_KEY) and is needed in the mode "online" only; the configuration that
    is sent holds no secrets, since none is ever part of it.

    W&B holds back what it was told last, so a kill may lose steps there; and it cannot take steps back. So a run that
    is continued tells it every step again: offline in a folder that replaces those of earlier sittings, online to a
    server that ignores the steps that it knows.
    """

    def __init__(self, project: str, mode: Literal["offline", "online"]) -> None:
        self.project = project
        self.mode: Literal["offline", "online"] = mode

    def start(self, directory: Path, config: dict[str, Any]) -> None:
        """Open or continue the W&B run whose id is kept in tracker.json.

        Raises:
            ValueError: wandb is not installed, or online without a key.
        """
        try:
            import wandb
        except ImportError as error:
            raise ValueError("tracker=wandb needs the package wandb: pip install -e '.[wandb]'") from error
        if self.mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise ValueError("tracker.mode=online needs WANDB_API_KEY in the environment; or use tracker.mode=offline")
        kept = directory / "tracker.json"
        known = json.loads(kept.read_text())["id"] if kept.exists() else secrets.token_hex(4)
        write_atomically(kept, json.dumps({"id": known}))
        for earlier in directory.glob(f"wandb/offline-run-*-{known}"):
            shutil.rmtree(earlier)
        self._run = wandb.init(
            project=self.project,
            name=config["name"],
            id=known,
            resume="allow",
            mode=self.mode,
            dir=str(directory),
            config=config,
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("*", step_metric="episode")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, state: End) -> None:
        """Close the W&B run; one that will be continued as preempted, one that failed as failed."""
        if state == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state == "finished" else 1)
