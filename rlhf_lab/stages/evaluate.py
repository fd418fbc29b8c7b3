"""What policies are measured with on every held-out split: prompts, sampling, scores, gold, KL to the reference."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.distribution import Distribution
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.models import load_frozen
from rlhf_lab.engine.score import Scorer
from rlhf_lab.engine.tokenizer import load_tokenizer, new_token_ids
from rlhf_lab.evaluation.evaluator import Evaluator, under_conditions
from rlhf_lab.interfaces import Conditions
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.seeds import derive
from rlhf_lab.types import Count, Metrics


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What any number of policies of one kind are measured with, loaded once.

    Fields:
        options: device, type, seed and new tokens that a policy is loaded with.
    """

    evaluator: Evaluator
    scorer: Scorer
    sampling: Sampling
    options: Mapping[str, Any]

    def measure(self, policy: str) -> tuple[Metrics, list[dict[str, Any]]]:
        """The metrics of the policy in a folder and one row per response, see `Evaluator`."""
        engine = Generator(load_frozen(policy, **self.options), self.evaluator.template, self.sampling)
        return self.evaluator.evaluate(engine, self.scorer)


class Evaluate:
    """How policies are measured on held-out prompts: what a stage needs that measures some.

    Args:
        rewards: name -> source; null leaves one out.
        conditions: what the policy is told beside each request.
        tokens_at_once: budget of one scoring forward.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        rewards: Mapping[str, Any],
        evaluation_sampling: Sampling,
        hardware: Hardware,
        tokens_at_once: Count,
        conditions: Conditions,
    ) -> None:
        self.model, self.dataset, self.hardware = model, dataset, hardware
        self.rewards = {name: source for name, source in rewards.items() if source is not None}
        self.sampling, self.tokens_at_once = evaluation_sampling, tokens_at_once
        self.conditions = conditions

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        self.model.check(("policy", "reference"), promised)
        self.dataset.check(promised)
        for source in self.rewards.values():
            source.check(promised)

    def prompts(self, split: str, template: Template) -> Sequence[Prompt]:
        """The prompts of a split, each once."""
        return self.dataset.prompts(split, template)

    def bench(self, policy: str, seed: int) -> Bench:
        """Load what policies are measured with; `policy` is the folder of one of them, which says how prompts read."""
        device = self.hardware.start()
        new_tokens = [*self.model.new_tokens, *self.conditions.new_tokens]
        template = Template(load_tokenizer(policy, new_tokens), self.dataset.template_style)
        self.conditions.check(template)
        prompts = {split: self.prompts(split, template) for split in self.dataset.splits}
        options = {
            "device": device,
            "dtype": self.model.dtype(self.hardware),
            "adapters": self.model.adapters,
            "seed": derive(seed, "initial weights"),
            "new_tokens": new_token_ids(template.tokenizer, new_tokens),
        }
        distribution = Distribution.of(self.hardware)
        on_shards: dict[str, Any] = {**options, "device": distribution.loads_on}
        scorer = Scorer(
            rewards={name: source.load(self.hardware, template) for name, source in self.rewards.items()},
            reference=distribution.frozen(load_frozen(self.model.reference, **on_shards)),
            critics=None,
            tokens_at_once=self.tokens_at_once,
        )
        evaluator = Evaluator(
            prompts=under_conditions(prompts, self.conditions),
            gold={name: Gold(measure) for name, measure in self.dataset.gold.items()},
            template=template,
            seed=seed,
        )
        return Bench(evaluator=evaluator, scorer=scorer, sampling=self.sampling, options=options)
