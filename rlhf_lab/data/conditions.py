"""What a policy is told beside the request: the preferences that a response is to serve."""

import random
from collections.abc import Sequence
from typing import Literal

from rlhf_lab.data.preferences import JOINT, Registry
from rlhf_lab.data.templates import Template
from rlhf_lab.records import Prompt
from rlhf_lab.seeds import derive


class NoConditions:
    """The policy reads the request alone."""

    streams: tuple[str, ...] = ()
    new_tokens: tuple[str, ...] = ()

    def check(self, template: Template) -> None:
        """There is nothing that a tokenizer could not read."""

    def drawn(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
        return list(prompts)

    def evaluated(self, prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
        return {"": list(prompts)}


PerPrompt = Literal["one", "subset", "all"]


class Preferences:
    """Prompts that say which preferences count, and weigh the rewards that measure these.

    Args:
        registry: the preferences, their words and weights. A preference's name is that of the score that measures it.
        per_prompt: "one" preference; a non-empty "subset" of those that can go together, each as likely as any other
            number of them; or "all", one of every dimension, as in the paper.

    Source: P-MORL, Jang et al. 2023, arXiv:2310.11564: what counts is a combination of declared preferences.
    """

    new_tokens: tuple[str, ...] = ()  # which of its wordings are new, only the model's settings know

    def __init__(self, registry: Registry, per_prompt: PerPrompt) -> None:
        self.registry, self.per_prompt = registry, per_prompt
        self.streams = registry.names
        self.dimensions = list(registry.dimensions.values())

    def check(self, template: Template) -> None:
        """Refuse wordings that the policy's tokenizer cannot read.

        Raises:
            ValueError: naming the words, and where they can be added.
        """
        if unknown := sorted(template.unknown(self.registry.words(self.streams, "policy"))):
            raise ValueError(
                f"the policy's tokenizer does not know {unknown}, of preferences.policy; "
                f"add them with model.new_tokens=[{','.join(unknown)}], or use words that it knows"
            )

    def drawn(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
        """Each prompt with preferences of its own, a function of the seed, the prompt and its place."""
        return [
            self._told(prompt, self._choose(random.Random(derive(seed, prompt.id, place))))
            for place, prompt in enumerate(prompts)
        ]

    def evaluated(self, prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
        """condition -> the prompts under it: each preference alone, and one of every dimension in all combinations."""
        alone = [(stream,) for stream in self.streams]
        together = [held for held in self.registry.combinations if held not in alone]
        return {JOINT.join(held): [self._told(prompt, held) for prompt in prompts] for held in [*alone, *together]}

    def _choose(self, draw: random.Random) -> tuple[str, ...]:
        count = {"one": 1, "all": len(self.dimensions)}.get(self.per_prompt) or draw.randint(1, len(self.dimensions))
        places = sorted(draw.sample(range(len(self.dimensions)), count))
        return tuple(draw.choice(self.dimensions[place]) for place in places)

    def _told(self, prompt: Prompt, held: Sequence[str]) -> Prompt:
        weights = {name: self.registry.weights[name] for name in held}
        return prompt.conditioned(self.registry.words(held, "policy"), weights)
