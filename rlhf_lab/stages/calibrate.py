"""The last step of a value model: from its raw scores to stated units, on held-out responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlhf_lab.console import Console
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import sequences
from rlhf_lab.engine.forward import raw_scores
from rlhf_lab.engine.models import Calibration
from rlhf_lab.engine.score import by_length
from rlhf_lab.functional.calibration import least_squares, logistic, scaled, standardise
from rlhf_lab.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CalibrationMethod = Literal["none", "standardised", "scaled", "gold", "labels"]
TOKENS_AT_ONCE = 16384


@dataclass(frozen=True)
class ReferenceSet:
    """What a value model is calibrated on: responses and their targets (none to be standardised or scaled)."""

    name: str
    prompts: Sequence[Prompt]
    responses: Sequence[str]
    target: Tensor

    @classmethod
    def read(
        cls, dataset: Dataset, reads: str, template: Template, method: CalibrationMethod, column: str
    ) -> "ReferenceSet":
        """The responses of the first held-out split.

        Args:
            reads: the kind of records that the value model learns from.
            column: the gold column of method "gold", without its `_0`, `_1`.

        Raises:
            ValueError: no held-out split is there, or it lacks the column.
        """
        if method == "none":
            return cls("", [], [], torch.zeros(0))
        if not dataset.splits:
            raise ValueError(
                f"stage.calibration={method} needs held-out rows, and {dataset.path} has none; "
                "set dataset.hold_out or dataset.eval_splits, or stage.calibration=none"
            )
        split = dataset.splits[0]
        name = f"{dataset.path}:{split}"
        if method in ("standardised", "scaled"):
            records = getattr(dataset, reads)(split, template)
            texts = [(record.prompt, text) for record in records for text in record.responses]
            return cls(name, [prompt for prompt, _ in texts], [text for _, text in texts], torch.zeros(0))
        rows = dataset.labelled(split, "safe" if method == "labels" else column, template)
        target = torch.tensor([row[2] for row in rows])
        target = 1 - target if method == "labels" else target  # high is unsafe, as a cost is
        return cls(name, [row[0] for row in rows], [row[1] for row in rows], target)

    @torch.no_grad()
    def calibrate(
        self, model: "PreTrainedModel", template: Template, method: CalibrationMethod, console: Console
    ) -> Calibration:
        """The affine map that gives the model's raw scores their units."""
        if method == "none":
            return Calibration()
        read = sequences(template, self.prompts, self.responses)
        raw = by_length(read, TOKENS_AT_ONCE, model.device, lambda part: raw_scores(model, part))
        if method == "standardised":
            scale, shift = standardise(raw)
        elif method == "scaled":
            scale, shift = scaled(raw)
        elif method == "gold":
            scale, shift = least_squares(raw, self.target)
        else:
            scale, shift = logistic(raw, self.target)
        known = len(self.target) > 0
        agreement = f", correlation {torch.corrcoef(torch.stack([raw, self.target]))[0, 1]:.3f}" if known else ""
        console.say(
            f"calibrated ({method}) on {len(raw)} responses of {self.name.rpartition(':')[2]}: "
            f"score = {scale:.3f} raw {shift:+.3f}{agreement}"
        )
        return Calibration(scale, shift, method, self.name)
