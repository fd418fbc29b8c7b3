"""Sampling from a policy: prompts are read once and shared by their samples, finished responses leave the batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import join
from rlhf_lab.engine import out_of_memory, ranks
from rlhf_lab.engine.cache import is_plain
from rlhf_lab.engine.flight import Drawn, Flight
from rlhf_lab.engine.forward import has_plain_head
from rlhf_lab.types import Count, Fraction, NonNegative, NonNegativeCount, Positive, PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_lab.engine.models import Critics

NO_VALUES: Mapping[str, Tensor] = MappingProxyType({})
REFILL_AT = 0.25  # share of the batch that must be free before waiting prompts are read, which takes a step of its own


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn; in this order: repetition penalty, least length, temperature, top k, top p."""

    max_new_tokens: Count
    min_new_tokens: NonNegativeCount  # EOS cannot be drawn before
    temperature: NonNegative  # 0: greedy
    top_k: NonNegativeCount  # 0: all
    top_p: Fraction  # 1: all
    batch_size: Count  # responses in flight at once; changes memory and speed only
    repetition_penalty: Positive = (
        1.0  # of tokens of the prompt and of the response so far (Keskar et al. 2019); 1: none
    )
    stop_strings: Sequence[str] = ()  # a response ends with the token that completes one of them, and keeps it

    def __post_init__(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"sampling.min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}"
            )
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(f"sampling.stop_strings={self.stop_strings!r}; give a list of texts, none of them empty")

    def check_trainable(self) -> None:
        """Refuse what a policy gradient cannot learn from. Stop strings pass: they end a response, and that is all.

        Raises:
            ValueError: the sampled distribution is not the learner's: its ratio and KL would be of another policy.
        """
        if self.temperature == 0 or self.top_k or self.top_p < 1 or self.min_new_tokens or self.repetition_penalty != 1:
            raise ValueError(
                "training samples must come from the policy that learns, found "
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}, "
                f"min_new_tokens={self.min_new_tokens}, repetition_penalty={self.repetition_penalty}; use "
                "temperature > 0, top_k=0, top_p=1, min_new_tokens=0 and repetition_penalty=1 "
                "(evaluation may use its own)"
            )


def stop_tokens(model: "PreTrainedModel", template: Template) -> list[int]:
    """The template's EOS and those of the model's generation_config, in order."""
    own = getattr(model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own] if own is not None else []
    return sorted({template.eos, *listed})


def check_room(prompts: PromptBatch, sampling: Sampling, limit: int | None) -> None:
    """Refuse prompts that leave a model of `limit` positions no room for a response."""
    longest = prompts.tokens.shape[1] + sampling.max_new_tokens
    if limit is not None and longest > limit:
        raise ValueError(
            f"a prompt of {prompts.tokens.shape[1]} tokens and {sampling.max_new_tokens} new ones need "
            f"{longest} positions, the model has {limit}; "
            "lower sampling.max_new_tokens or dataset.max_prompt_tokens"
        )


def rollout_from(
    template: Template,
    prompts: PromptBatch,
    samples: int,
    tokens: Tensor,
    logprobs: Tensor,
    lengths: Tensor,
    finished: Tensor,
    values: Mapping[str, Tensor] = NO_VALUES,
) -> Rollout:
    """What an engine drew, side by side with its prompts; columns that no response reaches are dropped.

    Args:
        tokens, logprobs: (B, T), on the CPU; row i is a sample of prompt i // samples, padding and 0 beyond its length.
        lengths, finished: (B,); a response keeps the stop that finished it.
        values: critic -> (B, T), as `logprobs`.
    """
    width = int(lengths.max())
    tokens, logprobs = tokens[:, :width], logprobs[:, :width]
    mask = torch.arange(width) < lengths[:, None]
    repeat = torch.arange(len(prompts)).repeat_interleave(samples)
    said = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    return Rollout(
        prompts=[prompts.prompts[i] for i in repeat.tolist()],
        sequences=join(prompts.tokens[repeat], prompts.attention_mask[repeat], tokens, mask),
        group=repeat,
        finished=finished,
        responses=template.texts(said),
        logprobs=logprobs,
        values={name: of[:, :width] for name, of in values.items()},
    )


class Generator:
    """The built-in rollout engine. It reads the policy's own weights, so there is nothing to synchronise.

    Prompts are read longest first, each once for all of its samples. A response that ends leaves the batch, and when
    enough have, the next prompts take their places.

    Args:
        critics: on the model's own trunk: the values of the states that tokens are drawn from go into the rollout, so
            that nobody has to compute these states again. Without effect where logits are more than a product of them.

    Attributes:
        stops: the template's EOS and those of the model's generation_config.
        max_positions: what the model can address, prompt and response together.
    """

    def __init__(
        self, model: "PreTrainedModel", template: Template, sampling: Sampling, critics: "Critics | None" = None
    ) -> None:
        self.model, self.template, self.sampling = model, template, sampling
        self.critics = critics if critics is not None and has_plain_head(model) else None
        self.stops = torch.tensor(stop_tokens(model, template), device=model.device)
        self.max_positions = getattr(model.config, "max_position_embeddings", None)

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's own."""

    @torch.no_grad()
    def generate(self, prompts: PromptBatch, samples: int, seed: int) -> Rollout:
        """`samples` responses to each prompt; responses to one prompt are neighbours.

        Each rank answers its share of the prompts, with the numbers that these prompts have alone.

        Args:
            seed: of the uniform numbers that choose the tokens; equal seeds give equal responses.

        Raises:
            ValueError: a prompt and its response would not fit the model.
        """
        check_room(prompts, self.sampling, self.max_positions)
        total, steps = len(prompts) * samples, self.sampling.max_new_tokens
        uniform = torch.rand(total, steps, generator=torch.Generator().manual_seed(seed))
        responses = torch.arange(total).view(len(prompts), samples)  # the rows of each prompt
        mine = ranks.share(torch.arange(len(prompts)))
        drawn = Drawn(self, uniform[responses[mine].view(-1)])
        self._respond(prompts.tokens[mine], prompts.attention_mask[mine], samples, drawn)
        back = ranks.dealt(responses).view(-1).argsort()  # from the order of the ranks to that of the rows
        tokens, logprobs, lengths, finished = (ranks.gather_rows(x)[back] for x in drawn.responses())
        names = () if self.critics is None else self.critics.names
        values = dict(zip(names, (ranks.gather_rows(x)[back] for x in drawn.values_of_responses()), strict=True))
        return rollout_from(self.template, prompts, samples, tokens, logprobs, lengths, finished, values)

    def _respond(self, prompts: Tensor, mask: Tensor, samples: int, drawn: Drawn) -> None:
        """Draw all responses to (n, P) prompts."""
        plain = is_plain(self.model.config)
        at_once = max(1, self.sampling.batch_size // samples)  # prompts
        # longest first: later ones then fit where earlier ones were
        waiting = mask.sum(1).argsort(descending=True, stable=True)
        while len(waiting):
            first, waiting = waiting[:at_once], waiting[at_once:]
            with out_of_memory.sampling(len(first), samples, self.sampling.batch_size):
                flight = Flight(
                    self, drawn, samples, plain=plain, slots=len(first) * samples, refilled=len(waiting) > 0
                )
                flight.admit(prompts, mask, first)
                while flight.rows:
                    flight.step()
                    room = (flight.slots - flight.rows) // samples
                    if plain and len(waiting) and room and room >= REFILL_AT * len(first):
                        flight.admit(prompts, mask, waiting[:room])
                        waiting = waiting[room:]
