"""Records -> tokens with masks and positions, made once and in one place."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_lab.data.templates import Template
from rlhf_lab.records import Demonstration, PreferencePair, Prompt, Quadruple, Ranking, SafetyPair
from rlhf_lab.types import (
    PairBatch,
    PromptBatch,
    QuadrupleBatch,
    RankingBatch,
    Rollout,
    SafetyPairBatch,
    Sequences,
    TextBatch,
)


def pad(rows: Sequence[Sequence[int]], fill: int, side: str) -> tuple[Tensor, Tensor]:
    """Rows of unequal length -> (B, L) tokens and (B, L) mask, padded on the "left" or the "right"."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = True
    return tokens, mask


def positions(attention_mask: Tensor) -> Tensor:
    """(B, L) int64: 0 at the first real token of each row, counting real tokens; padding holds 0."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def join(prompts: Tensor, prompt_mask: Tensor, responses: Tensor, response_mask: Tensor) -> Sequences:
    """Left-padded prompts (B, P) and right-padded responses (B, T) -> sequences (B, P + T)."""
    attention_mask = torch.cat([prompt_mask, response_mask], dim=1)
    return Sequences(
        tokens=torch.cat([prompts, responses], dim=1),
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        response_mask=response_mask,
    )


def sequences(
    template: Template, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool] | None = None
) -> Sequences:
    """Prompts and their responses as text -> tokens; `finished` False leaves a response without EOS."""
    ended = [True] * len(prompts) if finished is None else finished
    written = [template.prompt_tokens(prompt) for prompt in prompts]
    spoken = [template.response_tokens(text, finished=end) for text, end in zip(responses, ended, strict=True)]
    return join(*pad(written, template.pad, "left"), *pad(spoken, template.pad, "right"))


def prompt_batch(template: Template, prompts: Sequence[Prompt]) -> PromptBatch:
    """Prompts, padded left."""
    tokens, mask = pad([template.prompt_tokens(prompt) for prompt in prompts], template.pad, "left")
    return PromptBatch(prompts=list(prompts), tokens=tokens, attention_mask=mask)


def rollout_of(template: Template, prompts: Sequence[Prompt], responses: Sequence[str]) -> Rollout:
    """Responses that are given, for sources of scores; nobody sampled them, so their log-probabilities are 0."""
    written = sequences(template, prompts, responses)
    return Rollout(
        prompts=list(prompts),
        sequences=written,
        group=torch.arange(len(prompts)),
        finished=torch.ones(len(prompts), dtype=torch.bool),
        responses=list(responses),
        logprobs=torch.zeros(written.response_mask.shape),
    )


def text_batch(template: Template, records: Sequence[Demonstration]) -> TextBatch:
    """Demonstrations, the loss on their responses, and on earlier turns of the assistant where they are imitated."""
    prompts, responses = [record.prompt for record in records], [record.response for record in records]
    if not any(record.every_turn for record in records):
        return TextBatch(sequences=sequences(template, prompts, responses))
    before: list[list[int]] = []
    after: list[list[int]] = []
    learnt: list[list[bool]] = []
    for record in records:
        written, spoken = template.prompt_tokens(record.prompt), template.response_tokens(record.response)
        said = template.said_before(record.prompt) if record.every_turn else [False] * len(written)
        first = said.index(True) if any(said) else len(written)
        before.append(written[:first])
        after.append([*written[first:], *spoken])
        learnt.append([*said[first:], *[True] * len(spoken)])
    whole = join(*pad(before, template.pad, "left"), *pad(after, template.pad, "right"))
    # what others said between two of the assistant's turns is read, and not learnt
    mask, _ = pad(learnt, False, "right")
    return TextBatch(sequences=replace(whole, response_mask=mask.bool()))


def pair_batch(template: Template, records: Sequence[PreferencePair]) -> PairBatch:
    """Preference pairs."""
    prompts = [record.prompt for record in records]
    return PairBatch(
        chosen=sequences(template, prompts, [record.chosen for record in records]),
        rejected=sequences(template, prompts, [record.rejected for record in records]),
        margin=torch.tensor([record.margin for record in records]),
        gaps={name: torch.tensor([record.gaps[name] for record in records]) for name in records[0].gaps},
    )


def quadruple_batch(template: Template, records: Sequence[Quadruple]) -> QuadrupleBatch:
    """Stronger pairs and weaker ones, side by side."""
    return QuadrupleBatch(
        strong=pair_batch(template, [record.strong for record in records]),
        weak=pair_batch(template, [record.weak for record in records]),
    )


def ranking_batch(template: Template, records: Sequence[Ranking]) -> RankingBatch:
    """Rankings of unequal lengths; what is not there is an empty response that did not end."""
    prompts = [record.prompt for record in records]
    width = max(len(record.responses) for record in records)
    present = [[place < len(record.responses) for place in range(width)] for record in records]
    columns = [
        [record.responses[place] if there[place] else "" for record, there in zip(records, present, strict=True)]
        for place in range(width)
    ]
    return RankingBatch(
        responses=tuple(
            sequences(template, prompts, column, [there[place] for there in present])
            for place, column in enumerate(columns)
        ),
        present=torch.tensor(present),
    )


def safety_pair_batch(template: Template, records: Sequence[SafetyPair]) -> SafetyPairBatch:
    """Safety pairs; the verdicts become signs, +1 unsafe and -1 safe."""
    prompts = [record.prompt for record in records]
    return SafetyPairBatch(
        safer=sequences(template, prompts, [record.safer for record in records]),
        unsafer=sequences(template, prompts, [record.unsafer for record in records]),
        safer_sign=torch.tensor([1.0 if record.safer_is_unsafe else -1.0 for record in records]),
        unsafer_sign=torch.tensor([1.0 if record.unsafer_is_unsafe else -1.0 for record in records]),
    )
