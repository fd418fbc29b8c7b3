"""Sampling from a policy: prompts are read once and shared by their samples, finished responses leave the batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from rlhf_lab.types import (
    Count,
    Fraction,
    Kept,
    NonNegative,
    NonNegativeCount,
    Positive,
    Processing,
    PromptBatch,
    Rollout,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_lab.engine.critics import Critics

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

    @property
    def restricts(self) -> bool:
        """Whether top k or top p cut tokens off, which ones depends on the policy that samples."""
        return self.top_k > 0 or self.top_p < 1

    def processing(self, stops: Sequence[int], *, records: bool) -> Processing:
        """What is done to logits before a token is drawn, as those have to do it who score the response.

        Args:
            stops: ids that end a response.
            records: whether the engine leaves in its rollouts which tokens top k and top p kept; without, others can
                only speak of the whole vocabulary.
        """
        return Processing(
            temperature=self.temperature or 1.0,
            repetition_penalty=self.repetition_penalty,
            min_new_tokens=self.min_new_tokens,
            stops=tuple(stops) if self.min_new_tokens else (),
            restricted=records and self.restricts,
        )

    def check_trainable(self) -> None:
        """Refuse what a policy gradient cannot learn from; see `Processing` for why all else passes.

        Raises:
            ValueError: temperature 0, which draws nothing: each token is the only one that could come.
        """
        if self.temperature == 0:
            raise ValueError(
                "sampling.temperature=0 draws the likeliest token alone, so that no choice of the policy's is left to "
                "learn from; use a temperature above 0 (evaluation_sampling may use its own)"
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
    processing: Processing,
    values: Mapping[str, Tensor] = NO_VALUES,
    kept: tuple[Kept, ...] = (),
) -> Rollout:
    """What an engine drew, side by side with its prompts; columns that no response reaches are dropped.

    Args:
        tokens, logprobs: (B, T), on the CPU; row i is a sample of prompt i // samples, padding and 0 beyond its length.
        lengths, finished: (B,); a response keeps the stop that finished it.
        processing: of the distribution that `logprobs` are of.
        values: critic -> (B, T), as `logprobs`.
        kept: with sizes (B, T), 0 beyond a response's length, if processing says that it was restricted.
    """
    width = int(lengths.max())
    tokens, logprobs = tokens[:, :width], logprobs[:, :width]
    mask = torch.arange(width) < lengths[:, None]
    repeat = torch.arange(len(prompts)).repeat_interleave(samples)
    said = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    sequences = join(prompts.tokens[repeat], prompts.attention_mask[repeat], tokens, mask)
    if kept:
        sequences = replace(sequences, kept=tuple(replace(one, sizes=one.sizes[:, :width]) for one in kept))
    return Rollout(
        prompts=[prompts.prompts[i] for i in repeat.tolist()],
        sequences=sequences,
        group=repeat,
        finished=finished,
        responses=template.texts(said),
        logprobs=logprobs,
        processing=processing,
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
        kept = (_gathered(*drawn.kept_of_responses(), back),) if self.sampling.restricts else ()
        processing = self.sampling.processing(self.stops.tolist(), records=True)
        return rollout_from(
            self.template, prompts, samples, tokens, logprobs, lengths, finished, processing, values, kept
        )

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


def _gathered(sizes: Tensor, ids: Tensor, back: Tensor) -> Kept:
    """What top k and top p left in all ranks' responses, in the order of the rows that `back` finds again."""
    sizes, ids = ranks.gather_rows(sizes), ranks.gather_rows(ids)
    rows = ids.split(sizes.sum(1).tolist())
    return Kept(sizes=sizes[back], ids=[rows[i] for i in back.tolist()])
