"""What a policy is told beside the request: the tastes that a response is to serve."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Literal

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
    """Prompts that say which tastes count, and weigh the rewards that measure these.

    Args:
        wording: stream -> what the policy reads if that taste counts. The stream is the score that measures it.
        weights: stream -> what the taste weighs when it counts, beside the others that count.
        rivals: tastes of which a prompt holds at most one, e.g. [[brief, thorough], [kind, blunt]]. One that is not
            listed rivals none.
        per_prompt: "one" taste; a non-empty "subset" of those that can go together, each as likely as any other number
            of them; or "all", one of every rivalry, as in the paper's three dimensions.

    Raises:
        ValueError: the parts speak of different tastes, or a weight is not positive.

    Source: P-MORL, Jang et al. 2023, arXiv:2310.11564: a preference is a combination of declared tastes.
    """

    new_tokens: tuple[str, ...] = ()  # which of its wordings are new, only the model's settings know

    def __init__(
        self,
        wording: Mapping[str, str],
        weights: Mapping[str, float],
        rivals: Sequence[Sequence[str]],
        per_prompt: PerPrompt,
    ) -> None:
        if not wording or wording.keys() != weights.keys():
            raise ValueError(
                f"conditions.wording has {sorted(wording)}, conditions.weights {sorted(weights)}; "
                "each taste needs both, and there is at least one"
            )
        if wrong := [stream for stream, weight in weights.items() if weight <= 0]:
            raise ValueError(
                f"conditions.weights.{wrong[0]}={weights[wrong[0]]}; a taste that counts weighs more than 0"
            )
        listed = [stream for group in rivals for stream in group]
        if len(listed) > len(set(listed)) or not set(listed) <= wording.keys():
            raise ValueError(
                f"conditions.rivals lists {listed}, but the tastes are {sorted(wording)}, each in one rivalry at most"
            )
        self.wording, self.weights, self.per_prompt = dict(wording), dict(weights), per_prompt
        self.streams = tuple(wording)
        lone = [(stream,) for stream in wording if stream not in listed]
        self.dimensions = [*map(tuple, rivals), *lone]

    def check(self, template: Template) -> None:
        """Refuse wordings that the policy's tokenizer cannot read.

        Raises:
            ValueError: naming the words, and where they can be added.
        """
        if unknown := sorted(template.unknown(" ".join(self.wording.values()))):
            raise ValueError(
                f"the policy's tokenizer does not know {unknown}, of conditions.wording; "
                f"add them with model.new_tokens=[{','.join(unknown)}], or use words that it knows"
            )

    def drawn(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
        """Each prompt with tastes of its own, a function of the seed, the prompt and its place."""
        return [
            self._told(prompt, self._choose(random.Random(derive(seed, prompt.id, place))))
            for place, prompt in enumerate(prompts)
        ]

    def evaluated(self, prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
        """condition -> the prompts under it: each taste alone, and one of every dimension in all combinations."""
        alone = [(stream,) for stream in self.wording]
        together = [chosen for chosen in itertools.product(*self.dimensions) if chosen not in alone]
        return {"+".join(chosen): [self._told(prompt, chosen) for prompt in prompts] for chosen in [*alone, *together]}

    def _choose(self, draw: random.Random) -> tuple[str, ...]:
        count = {"one": 1, "all": len(self.dimensions)}.get(self.per_prompt) or draw.randint(1, len(self.dimensions))
        places = sorted(draw.sample(range(len(self.dimensions)), count))
        return tuple(draw.choice(self.dimensions[place]) for place in places)

    def _told(self, prompt: Prompt, chosen: Sequence[str]) -> Prompt:
        words = " ".join(self.wording[stream] for stream in chosen)
        return prompt.conditioned(words, {stream: self.weights[stream] for stream in chosen})
