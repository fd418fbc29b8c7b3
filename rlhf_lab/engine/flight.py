"""Responses on their way: a batch of them, one token each a step, and what was drawn so far."""

from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor, nn

from rlhf_lab.data.tokenise import positions
from rlhf_lab.engine.cache import GrowingCache, InPlaceCache
from rlhf_lab.engine.decoder import Decoder, decoder
from rlhf_lab.functional.sampled import draw, penalised, restricted

if TYPE_CHECKING:
    from rlhf_lab.engine.generate import Generator

LOOK_EVERY = 8  # steps between two questions to a GPU which rows have ended: it waits for the answer


class Drawn:
    """What was drawn so far of a rank's R responses, on the device of the model.

    Rows that have ended go on until somebody looks; what they draw beyond their end is dropped here.
    """

    def __init__(self, engine: "Generator", uniform: Tensor) -> None:
        device = engine.model.device
        self.engine, self.steps = engine, uniform.shape[1]
        # a row may run on until the next look
        self.look_every = LOOK_EVERY if device.type == "cuda" and not engine.sampling.stop_strings else 1
        self.uniform = nn.functional.pad(uniform, (0, self.look_every)).to(device)
        self.tokens = torch.full(self.uniform.shape, engine.template.pad, device=device)
        self.logprobs = torch.zeros(self.uniform.shape, device=device)
        names = () if engine.critics is None else engine.critics.names
        self.values = torch.zeros(*self.uniform.shape, len(names), device=device)
        self.cut = torch.full((len(uniform),), self.steps + 1, device=device)  # length of those that a text ended
        # places of tokens, how many tokens each was drawn among, and their ids; none of a rank without prompts
        nothing = torch.zeros(0, dtype=torch.int64)
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = [(nothing, nothing, nothing.int())]

    def responses(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(R, T) tokens and their log-probabilities, (R,) lengths, and (R,) whether it ended by itself."""
        ended = self._ended()
        inside = self._places <= ended[:, None]
        return (
            self.tokens[:, : self.steps].where(inside, self.engine.template.pad),
            self.logprobs[:, : self.steps].where(inside, 0),
            ended.clamp(max=self.steps),
            ended <= self.steps,
        )

    def values_of_responses(self) -> list[Tensor]:
        """(R, T) of each critic, 0 beyond a response's end."""
        inside = self._places <= self._ended()[:, None]
        return [of.where(inside, 0) for of in self.values[:, : self.steps].unbind(-1)]

    def keep(self, response: Tensor, count: Tensor, left: Tensor) -> None:
        """Record among which tokens, (n, V) bool, the next one of each response is drawn."""
        place = response * self.tokens.shape[1] + count
        # off the device at once: it waits for these ids anyway, to know how many they are
        self.kept.append((place.cpu(), left.sum(1).cpu(), left.nonzero()[:, 1].int().cpu()))

    def kept_of_responses(self) -> tuple[Tensor, Tensor]:
        """(R, T) how many tokens were left of the vocabulary, 0 beyond a response's end, and their ids end to end."""
        width = self.tokens.shape[1]
        place, size, ids = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        inside = torch.arange(width) < self._ended().clamp(max=self.steps).cpu()[:, None]
        sizes = torch.zeros(inside.shape, dtype=torch.int64)
        sizes.view(-1)[place] = size
        owner = place.repeat_interleave(size)
        order = owner.argsort(stable=True)
        ids = ids[order][inside.view(-1)[owner[order]]]
        return sizes.where(inside, 0)[:, : self.steps], ids

    @property
    def _places(self) -> Tensor:
        return torch.arange(1, self.steps + 1, device=self.tokens.device)

    def _ended(self) -> Tensor:
        """(R,) length with the stop that ended it; one more than there may be for those that nothing has."""
        stopped = torch.isin(self.tokens[:, : self.steps], self.engine.stops)
        return self._places.where(stopped, self.steps + 1).amin(1).minimum(self.cut)


class Flight:
    """A batch of responses that are being drawn, one token each a step."""

    def __init__(
        self, engine: "Generator", drawn: Drawn, samples: int, *, plain: bool, slots: int, refilled: bool
    ) -> None:
        """
        Args:
            plain: whether the model's cache can be written in place, so that rows can be added later.
            refilled: whether rows will be added later: they start where the others are, and need columns beyond.
        """
        self.engine, self.drawn, self.samples = engine, drawn, samples
        self.plain, self.slots, self.refilled = plain, slots, refilled
        self.device = engine.model.device
        vocabulary = cast(nn.Embedding, engine.model.get_input_embeddings()).num_embeddings
        self.is_stop = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        self.is_stop[engine.stops[engine.stops < len(self.is_stop)]] = True
        self.store: InPlaceCache | GrowingCache | None = None
        self.decoder: Decoder | None = None
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.response = none  # (n,) of `drawn`, in flight here
        self.count = none  # (n,) tokens drawn so far
        self.start = none  # (n,) column of the first token of the prompt
        self.ended = none.bool()
        self.logits = torch.zeros(0, len(self.is_stop), device=self.device)
        self.values = self.drawn.values[0, :0]  # (n, K) of the states that the logits are of
        self.seen = none.bool().view(0, len(self.is_stop))  # (n, V) tokens so far, for the repetition penalty
        self.steps = 0

    @property
    def rows(self) -> int:
        return self.response.shape[0]

    def admit(self, prompts: Tensor, mask: Tensor, chosen: Tensor) -> None:
        """Read prompts, once each, and add their samples to the batch."""
        used = int(mask[chosen].any(0).nonzero()[0])  # columns that are padding in every row
        tokens, mask = prompts[chosen, used:].to(self.device), mask[chosen, used:].to(self.device)
        read = transformers.DynamicCache(config=self.engine.model.config)
        values, logits = self._read(tokens, mask, positions(mask), read)
        width, sampling = tokens.shape[1], self.engine.sampling
        if self.store is None:
            room = sampling.max_new_tokens + self.drawn.look_every
            # with twice the room, what is in use moves back to the first columns once in `room` steps
            columns = width + room * (2 if self.refilled else 1)
            self.store = InPlaceCache(read, self.slots, columns) if self.plain else GrowingCache(read)
            self.decoder = decoder(self.engine.model, columns) if self.plain else None
        self.store.add(read, self.samples)
        of = chosen.to(self.device)[:, None] * self.samples + torch.arange(self.samples, device=self.device)
        new = of.view(-1)
        start = self.store.end - mask.sum(1).repeat_interleave(self.samples)
        self.response = torch.cat([self.response, new])
        self.count = torch.cat([self.count, torch.zeros_like(new)])
        self.start = torch.cat([self.start, start])
        self.ended = torch.cat([self.ended, torch.zeros_like(new, dtype=torch.bool)])
        self.logits = torch.cat([self.logits, logits.repeat_interleave(self.samples, 0)])
        self.values = torch.cat([self.values, values.repeat_interleave(self.samples, 0)])
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(len(tokens), self.seen.shape[1], dtype=torch.bool, device=self.device)
            rows, columns = mask.nonzero(as_tuple=True)
            seen[rows, tokens[rows, columns]] = True
            self.seen = torch.cat([self.seen, seen.repeat_interleave(self.samples, 0)])
        self._measure()

    def step(self) -> None:
        """Draw a token for every row, let rows go that have ended, and read on."""
        assert self.store is not None
        sampling, drawn = self.engine.sampling, self.drawn
        logprobs = self._processed().log_softmax(-1)
        greedy = sampling.temperature == 0
        tokens = logprobs.argmax(-1) if greedy else draw(logprobs, drawn.uniform[self.response, self.count])
        drawn.tokens[self.response, self.count] = tokens
        drawn.logprobs[self.response, self.count] = logprobs.gather(1, tokens[:, None])[:, 0]
        if sampling.restricts:
            drawn.keep(self.response, self.count, logprobs > -torch.inf)
        if self.engine.critics is not None:
            drawn.values[self.response, self.count] = self.values
        self.count += 1
        self.ended |= self.is_stop[tokens]
        self.steps += 1
        if sampling.stop_strings:
            self._read_texts()
        if self.steps % drawn.look_every == 0:
            alive = ~(self.ended | (self.count >= drawn.steps))
            if not alive.all():
                tokens = self._keep(alive, tokens)
        if not self.rows:
            return
        if sampling.repetition_penalty != 1:
            self.seen[torch.arange(self.rows, device=self.device), tokens] = True
        if isinstance(self.store, InPlaceCache) and self.store.end == self.store.columns:
            self.start -= self.store.shift()
        end = self.store.end
        attention = None
        if self.padded:
            attention = torch.arange(self.store.begin, end + 1, device=self.device) >= self.start[:, None]
        positions = end - self.start
        if self.decoder is not None and isinstance(self.store, InPlaceCache):
            states, self.logits = self.decoder(tokens, positions, attention, self.store)
            self.values = self._valued(states)
            return
        self.values, self.logits = self._read(tokens[:, None], attention, positions[:, None], self.store.cache)

    def _read(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: transformers.Cache
    ) -> tuple[Tensor, Tensor]:
        """(n, K) values and (n, V) logits after the last of (n, T) tokens, which are added to the cache."""
        model = self.engine.model
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        inputs |= {"past_key_values": cache, "use_cache": True}
        if self.engine.critics is None:
            logits = model(**inputs, logits_to_keep=1).logits[:, -1]
            return self._valued(logits), logits
        states = model.base_model(**inputs).last_hidden_state[:, -1]
        return self._valued(states), cast(nn.Module, model.get_output_embeddings())(states)

    def _valued(self, states: Tensor) -> Tensor:
        """(n, K) of (n, D); K = 0 without critics, which read nothing."""
        critics = self.engine.critics
        return states.new_empty(len(states), 0) if critics is None else critics.heads(states).float()

    def _processed(self) -> Tensor:
        """(n, V) logits of the distribution that is sampled."""
        sampling, logits = self.engine.sampling, self.logits.float()
        if sampling.repetition_penalty != 1:
            logits = penalised(logits, self.seen, sampling.repetition_penalty)
        if sampling.min_new_tokens:
            early = (self.count < sampling.min_new_tokens)[:, None] & self.is_stop
            logits = logits.masked_fill(early, -torch.inf)
        return restricted(logits, sampling.temperature or 1.0, sampling.top_k, sampling.top_p)

    def _read_texts(self) -> None:
        """End the rows whose text holds a stop string now."""
        drawn, strings = self.drawn, self.engine.sampling.stop_strings
        # enough tokens to hold the longest, at up to four tokens a character; what is found there is then read whole
        window = 4 * max(map(len, strings)) + 4
        counts, rows = self.count.tolist(), self.response.tolist()
        tails = [drawn.tokens[row, max(0, n - window) : n].tolist() for row, n in zip(rows, counts, strict=True)]
        found = [any(text in tail for text in strings) for tail in self.engine.template.raw_texts(tails)]
        for i in (i for i, there in enumerate(found) if there):
            whole = self.engine.template.raw_texts([drawn.tokens[rows[i], : counts[i]].tolist()])[0]
            if any(text in whole for text in strings):
                self.ended[i] = True
                drawn.cut[rows[i]] = counts[i]

    def _keep(self, alive: Tensor, tokens: Tensor) -> Tensor:
        """Let the others go: rows from the end of the batch take their places. The tokens of those that stay."""
        assert self.store is not None
        left = int(alive.sum())
        order = torch.arange(left, device=self.device)
        order[~alive[:left]] = alive[left:].nonzero()[:, 0] + left
        self.response, self.count, self.start = self.response[order], self.count[order], self.start[order]
        self.ended, tokens = self.ended[order], tokens[order]
        self.logits, self.values = self.logits[:0], self.values[:0]
        if self.engine.sampling.repetition_penalty != 1:
            self.seen = self.seen[order]
        self.store.keep(order, int(self.start.min()) if left else self.store.end)
        self._measure()
        return tokens

    def _measure(self) -> None:
        """Whether any row starts right of the first column in use."""
        assert self.store is not None
        self.padded = bool((self.start > self.store.begin).any()) or not self.plain
