"""Mirrors of the metrics outside the run directory; the directory itself never depends on them."""

import json
import os
import secrets
from pathlib import Path
from typing import Any, Literal

from rlhf_lab.engine.checkpoint import write_atomically
from rlhf_lab.types import Metrics

End = Literal["finished", "stopped", "failed"]


class NoTracker:
    """Metrics stay in the run directory."""

    def start(self, directory: Path, config: dict[str, Any]) -> None: ...
    def take_back(self, logged: int) -> None: ...
    def log(self, step: int, metrics: Metrics) -> None: ...
    def finish(self, state: End) -> None: ...


class WandbTracker:
    """Weights & Biases; continues the same W&B run when the run directory is resumed, and never asks for a login.

    The key comes from the environment (WANDB_API_KEY) and is needed in the mode "online" only; the configuration that
    is sent holds no secrets, since none is ever part of it.

    Steps that are done again after a resume were sent before, with the same numbers, and are not sent twice. What W&B
    had not yet written when its own process was killed too is therefore missing there; metrics.jsonl has it.
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
        self._kept = directory / "tracker.json"
        known: dict[str, Any] = (
            json.loads(self._kept.read_text()) if self._kept.exists() else {"id": secrets.token_hex(4)}
        )
        self._id: str = known["id"]
        self._sent: int = known.get("sent", -1)  # steps up to this one are known to W&B
        self._remember()
        self._run = wandb.init(
            project=self.project,
            name=config["name"],
            id=self._id,
            resume="allow",
            mode=self.mode,
            dir=str(directory),
            config=config,
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("*", step_metric="episode")

    def _remember(self) -> None:
        write_atomically(self._kept, json.dumps({"id": self._id, "sent": self._sent}))

    def take_back(self, logged: int) -> None:
        """From now on steps up to `logged` are known already."""
        if logged > self._sent:
            self._sent = logged
            self._remember()

    def log(self, step: int, metrics: Metrics) -> None:
        if step > self._sent:
            self._run.log(dict(metrics), step=step)

    def finish(self, state: End) -> None:
        """Close the W&B run; one that will be continued as preempted, one that failed as failed."""
        if state == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state == "finished" else 1)
