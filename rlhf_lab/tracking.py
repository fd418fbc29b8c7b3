"""Mirrors of the metrics outside the run directory; the directory itself never depends on them."""

import json
import os
import secrets
from pathlib import Path
from typing import Any, Literal

from rlhf_lab.engine.checkpoint import write_atomically
from rlhf_lab.types import Metrics


class NoTracker:
    """Metrics stay in the run directory."""

    def start(self, directory: Path, config: dict[str, Any]) -> None: ...
    def log(self, step: int, metrics: Metrics) -> None: ...
    def finish(self) -> None: ...


class WandbTracker:
    """Weights & Biases; continues the same W&B run when the run directory is resumed, and never asks for a login.

    The key comes from the environment (WANDB_API_KEY) and is needed in the mode "online" only; the configuration that
    is sent holds no secrets, since none is ever part of it.
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

    def finish(self) -> None:
        self._run.finish()
