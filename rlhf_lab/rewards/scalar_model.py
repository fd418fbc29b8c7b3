"""A trained reward or cost model as a source of scores, whatever tokenizer and template it was trained with."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from rlhf_lab.data.templates import Style, Template
from rlhf_lab.data.tokenise import sequences
from rlhf_lab.engine.distribution import Distribution, through
from rlhf_lab.engine.forward import raw_outputs
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import check_path
from rlhf_lab.engine.models import load_scorer
from rlhf_lab.engine.prefixes import shares_prefixes
from rlhf_lab.engine.score import by_length
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.types import GAUSSIAN, Count, Rollout, Score, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ScalarModel:
    """Scores in the units of the model's calibration: standard deviations of a reference set, gold units, or raw.

    Args:
        path: folder or hub id of a one-label sequence classifier; or of one that says mean and log-variance of its
            score, of which the mean is the score.
        template: how it writes conversations; "auto" as it was saved.
        tokens_at_once: budget of one forward.
        condition: what this model is told after each request, for one that was trained to read it (a preference);
            what the policy is told, it never sees.
    """

    def __init__(self, path: str, template: Style, tokens_at_once: Count, condition: str = "") -> None:
        self.path, self.tokens_at_once, self.condition = path, tokens_at_once, condition
        self.style: Style = template

    def check(self, promised: Collection[str] = ()) -> None:
        """Raises ValueError if the folder cannot be loaded; loads nothing."""
        check_path(self.path, "reward model", promised)

    def load(self, hardware: Hardware, policy: Template) -> Self:
        """Read the weights; `policy` is how the responses that will be scored were written."""
        self.template = Template(load_tokenizer(self.path), self.style)
        self.reads_tokens = self.template.writes_like(policy)
        distribution = Distribution.of(hardware)
        model, self.calibration = load_scorer(self.path, device=distribution.loads_on, dtype=hardware.dtype)
        self.model = distribution.frozen(model, is_scorer=True)
        return self

    num_models = 1

    @property
    def is_gaussian(self) -> bool:
        """Whether the loaded model says how sure it is."""
        return self.model.config.num_labels == len(GAUSSIAN)

    @property
    def units(self) -> str:
        """How the loaded model was calibrated."""
        return self.calibration.method

    @property
    def models(self) -> tuple["PreTrainedModel", ...]:
        """What was loaded."""
        return (self.model,)

    def reads_like(self, other: "ScalarModel") -> bool:
        """Whether both loaded models are shown the same tokens."""
        alike = (self.reads_tokens, self.condition) == (other.reads_tokens, other.condition)
        return alike and self.template.writes_like(other.template)

    def read(self, rollout: Rollout) -> Sequences:
        """What the model is shown. A response that was cut stands as it is, without an EOS that it never had."""
        conditioned = any(prompt.condition for prompt in rollout.prompts)
        if not self.reads_tokens or conditioned or self.condition:
            asked = [prompt.plain.conditioned(self.condition, {}) for prompt in rollout.prompts]
            return sequences(self.template, asked, rollout.responses, rollout.finished.tolist())
        return rollout.sequences

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Score:
        """(B,) calibrated scores."""
        read = self.read(rollout)
        raw = by_length(
            read,
            self.tokens_at_once,
            self.model.device,
            through(self.model, lambda part: raw_outputs(self.model, part)),
            together=shares_prefixes(self.model),
        )
        return self.calibrated(raw)

    def calibrated(self, raw: Tensor) -> Score:
        """The score that (B, D) outputs of the model mean."""
        value = self.calibration(raw[:, 0])
        variances = (self.calibration.variance(raw[:, 1:].exp()),) if self.is_gaussian else ()
        return Score(value=value, members=value[:, None], variances=variances)
