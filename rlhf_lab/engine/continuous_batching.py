"""transformers' continuous batching as a rollout engine: paged keys and values, requests come and go at every step."""

from typing import TYPE_CHECKING

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from rlhf_lab.data.templates import Template
from rlhf_lab.engine.generate import Sampling, check_room, rollout_from, stop_tokens
from rlhf_lab.types import PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ContinuousBatcher:
    """Samples through `model.generate_batch`; the weights are the policy's own, so there is nothing to synchronise.

    The manager reads one prompt per response and shares pages of equal prefixes where they fill whole pages.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        template: Template,
        sampling: Sampling,
        *,
        page_size: int,
        max_batch_tokens: int,
        pages: int,
    ) -> None:
        self.model, self.template, self.sampling = model, template, sampling
        self.page_size, self.max_batch_tokens, self.pages = page_size, max_batch_tokens, pages
        self.stops = stop_tokens(model, template)

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's own."""

    def generate(self, prompts: PromptBatch, samples: int, seed: int) -> Rollout:
        """`samples` responses to each prompt; responses to one prompt are neighbours.

        Raises:
            ValueError: a prompt and its response would not fit the model.
            RuntimeError: the library's manager gave up on a response.
        """
        sampling = self.sampling
        check_room(prompts, sampling, getattr(self.model.config, "max_position_embeddings", None))
        written = [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.attention_mask, strict=True)]
        inputs = [tokens for tokens in written for _ in range(samples)]
        greedy = sampling.temperature == 0
        drawn = (
            {} if greedy else {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        )
        config = transformers.GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            eos_token_id=self.stops,
            pad_token_id=self.template.pad,
            **drawn,
        )
        implementation = self.model.config._attn_implementation
        assert implementation is not None
        state = torch.get_rng_state()  # the manager seeds the process
        try:
            # of which the manager has a paged form, whatever the learner computes with
            self.model.set_attn_implementation("sdpa")
            found = self.model.generate_batch(  # pyright: ignore[reportCallIssue]
                inputs,
                generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=self.page_size,
                    num_blocks=self.pages,
                    max_batch_tokens=self.max_batch_tokens,
                    max_requests_per_batch=sampling.batch_size,
                    return_logprobs=True,
                    seed=seed % 2**31,
                    drop_unsupported_processors=False,
                ),
            )
        finally:
            # the learner could not compute with the paged one
            self.model.set_attn_implementation(implementation)
            torch.set_rng_state(state)
        rows = [found[name] for name in sorted(found, key=lambda name: int(name.removeprefix("req_")))]
        if faults := [row.error for row in rows if row.error] or len(rows) != len(inputs):
            raise RuntimeError(
                f"transformers' continuous batching returned {len(rows)} of {len(inputs)} responses ({faults}); raise "
                "rollout.memory, or use rollout=built_in"
            )
        lengths = torch.tensor([len(row.generated_tokens) for row in rows])
        tokens = torch.full((len(rows), sampling.max_new_tokens), self.template.pad)
        logprobs = torch.zeros(len(rows), sampling.max_new_tokens)
        for i, row in enumerate(rows):
            tokens[i, : lengths[i]] = torch.tensor(row.generated_tokens)
            logprobs[i, : lengths[i]] = torch.tensor(row.logprobs)
        last = tokens[torch.arange(len(rows)), lengths - 1]
        finished = torch.isin(last, torch.tensor(self.stops))
        processing = sampling.processing(self.stops, records=False)
        return rollout_from(self.template, prompts, samples, tokens, logprobs, lengths, finished, processing)
