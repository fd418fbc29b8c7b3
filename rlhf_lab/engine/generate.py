"""Sampling from a policy: prompts are read once and shared by their samples, finished responses leave the batch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import join, positions
from rlhf_lab.engine import ranks
from rlhf_lab.types import Count, Fraction, NonNegative, NonNegativeCount, PromptBatch, Rollout, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPACT_BELOW = 0.75  # share of rows still alive at which the cache is worth copying


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: Count
    min_new_tokens: NonNegativeCount  # EOS cannot be drawn before
    temperature: NonNegative  # 0: greedy
    top_k: NonNegativeCount  # 0: all
    top_p: Fraction  # 1: all
    batch_size: Count  # responses in flight at once; changes memory and speed only

    def __post_init__(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"sampling.min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}"
            )

    def check_trainable(self) -> None:
        """Refuse what a policy gradient cannot learn from.

        Raises:
            ValueError: the sampled distribution is not the learner's: its ratio and KL would be of another policy.
        """
        if self.temperature == 0 or self.top_k or self.top_p < 1 or self.min_new_tokens:
            raise ValueError(
                "training samples must come from the policy that learns, found "
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}, "
                f"min_new_tokens={self.min_new_tokens}; use temperature > 0, top_k=0, top_p=1 and min_new_tokens=0 "
                "(evaluation may use its own)"
            )


def restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) logits at the sampling temperature; -inf outside the top k and outside the nucleus of mass top_p."""
    logits = logits.float() / (sampling.temperature or 1.0)
    if sampling.top_k:
        lowest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, mass_before >= sampling.top_p)
        outside.scatter_(1, order[:, :1], False)  # the likeliest token always stays
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """(B, V) log-probabilities and (B,) uniform numbers -> (B,) tokens, by inverting each row's distribution.

    A row's token depends on its own number only, so responses do not depend on how rows are batched.
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    # scaled by the total, which rounding leaves a little off 1, and right-sided: a token of probability 0 cannot be hit
    return torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True)[:, 0]


class Generator:
    """The built-in rollout engine. It reads the policy's own weights, so there is nothing to synchronise.

    Attributes:
        stops: the template's EOS and those of the model's generation_config.
        max_positions: what the model can address, prompt and response together.
    """

    def __init__(self, model: "PreTrainedModel", template: Template, sampling: Sampling) -> None:
        self.model, self.template, self.sampling = model, template, sampling
        own = getattr(model.generation_config, "eos_token_id", None)
        listed = own if isinstance(own, list) else [own] if own is not None else []
        self.stops = torch.tensor(sorted({template.eos, *listed}), device=model.device)
        self.max_positions = getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def generate(self, prompts: PromptBatch, samples: int, seed: int) -> Rollout:
        """`samples` responses to each prompt; responses to one prompt are neighbours.

        Each rank answers its share of the prompts, with the numbers that these prompts have alone.

        Args:
            seed: of the uniform numbers that choose the tokens; equal seeds give equal responses.

        Raises:
            ValueError: a prompt and its response would not fit the model.
        """
        longest, limit = prompts.tokens.shape[1] + self.sampling.max_new_tokens, self.max_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"a prompt of {prompts.tokens.shape[1]} tokens and {self.sampling.max_new_tokens} new ones need "
                f"{longest} positions, the model has {limit}; "
                "lower sampling.max_new_tokens or dataset.max_prompt_tokens"
            )
        total, steps = len(prompts) * samples, self.sampling.max_new_tokens
        uniform = torch.rand(total, steps, generator=torch.Generator().manual_seed(seed))
        responses = torch.arange(total).view(len(prompts), samples)  # the rows of each prompt
        mine = ranks.share(torch.arange(len(prompts)))
        uniform = uniform[responses[mine].view(-1)]
        tokens = torch.full((len(uniform), steps), self.template.pad)
        logprobs = torch.zeros(len(uniform), steps)
        mask = torch.zeros(len(uniform), steps, dtype=torch.bool)
        finished = torch.zeros(len(uniform), dtype=torch.bool)

        at_once = max(1, self.sampling.batch_size // samples)
        for part in batches(len(mine), at_once):
            rows = slice(part.start * samples, part.stop * samples)
            self._respond(prompts.tokens[mine[part]], prompts.attention_mask[mine[part]], samples, uniform[rows],
                          tokens[rows], logprobs[rows], mask[rows], finished[rows])  # fmt: skip

        back = ranks.dealt(responses).view(-1).argsort()  # from the order of the ranks to that of the rows
        tokens, logprobs, mask, finished = (ranks.gather_rows(x)[back] for x in (tokens, logprobs, mask, finished))
        width = int(mask.any(0).sum())
        tokens, logprobs, mask = tokens[:, :width], logprobs[:, :width], mask[:, :width]
        repeat = torch.arange(len(prompts)).repeat_interleave(samples)
        return Rollout(
            prompts=[prompts.prompts[i] for i in repeat.tolist()],
            sequences=join(prompts.tokens[repeat], prompts.attention_mask[repeat], tokens, mask),
            group=repeat,
            finished=finished,
            responses=[self.template.text(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)],
            logprobs=logprobs,
        )

    def _respond(
        self,
        prompts: Tensor,
        prompt_mask: Tensor,
        samples: int,
        uniform: Tensor,
        tokens: Tensor,
        logprobs: Tensor,
        mask: Tensor,
        finished: Tensor,
    ) -> None:
        """Fill tokens, logprobs, mask (B, T) and finished (B,) of the responses to one batch of prompts."""
        device, sampling = self.model.device, self.sampling
        used = int(prompt_mask.any(0).nonzero()[0])  # columns that are padding in every row of this batch
        prompts, prompt_mask = prompts[:, used:].to(device), prompt_mask[:, used:].to(device)
        cache = transformers.DynamicCache(config=self.model.config)
        logits = self.model(
            input_ids=prompts,
            attention_mask=prompt_mask,
            position_ids=positions(prompt_mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_repeat_interleave(samples)
        logits = logits.repeat_interleave(samples, 0)
        attention = prompt_mask.repeat_interleave(samples, 0)
        rows = torch.arange(len(attention))  # the response that each row in flight belongs to
        alive = torch.ones(len(rows), dtype=torch.bool)

        for t in range(sampling.max_new_tokens):
            if t < sampling.min_new_tokens:
                logits = logits.index_fill(1, self.stops, -torch.inf)
            step = restrict(logits, sampling).log_softmax(-1)
            greedy = sampling.temperature == 0
            chosen = step.argmax(-1) if greedy else draw(step, uniform[rows, t].to(device))
            picked = step.gather(1, chosen[:, None])[:, 0]
            here = rows[alive]
            tokens[here, t], logprobs[here, t] = chosen.cpu()[alive], picked.float().cpu()[alive]
            mask[here, t] = True
            ended = torch.isin(chosen, self.stops).cpu() & alive
            finished[rows[ended]] = True
            alive = alive & ~ended
            if not alive.any() or t + 1 == sampling.max_new_tokens:
                return
            attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)
            if alive.float().mean() < COMPACT_BELOW:
                kept = alive.nonzero()[:, 0]
                on_device = kept.to(device)
                cache.batch_select_indices(on_device)
                attention, chosen = attention[on_device], chosen[on_device]
                rows, alive = rows[kept], alive[kept]
            logits = self.model(
                input_ids=chosen[:, None],
                attention_mask=attention,
                position_ids=positions(attention)[:, -1:],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
