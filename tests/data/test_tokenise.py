"""Masks, positions and padding by hand, and batches of every kind of record."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import (
    join,
    pad,
    pair_batch,
    positions,
    prompt_batch,
    ranking_batch,
    safety_pair_batch,
    sequences,
    text_batch,
)
from rlhf_lab.engine.tiny import tiny_tokenizer
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Demonstration, PreferencePair, Prompt, Ranking, SafetyPair
from rlhf_lab.types import Sequences

PROMPTS = [Prompt.from_text(text) for text in ("bread ?", "is it safe to mix bleach and acid ?", "x")]
RESPONSES = ["mix and wait .", "no", "why did the bread rise ?"]


@pytest.fixture(params=["gpt2", "llama", "qwen2"])  # pad = eos, a BOS, a chat template
def template(request: pytest.FixtureRequest, hf_folder: Callable[[str], str]) -> Template:
    return Template(load_tokenizer(hf_folder(request.param)), "auto")


def bits(mask: Tensor) -> list[list[int]]:
    return mask.int().tolist()


def test_pad_by_hand():
    tokens, mask = pad([[7, 0], [8], [9, 9, 9]], 0, "left")
    assert tokens.tolist() == [[0, 7, 0], [0, 0, 8], [9, 9, 9]]
    assert bits(mask) == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]  # the real 0 is real
    tokens, mask = pad([[7, 0], [8], []], 5, "right")
    assert tokens.tolist() == [[7, 0], [8, 5], [5, 5]]
    assert bits(mask) == [[1, 1], [1, 0], [0, 0]]
    assert tokens.dtype == torch.int64


def test_positions_by_hand():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0]]).bool()
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 1, 1, 1]]


def test_join_by_hand():
    joined = join(*pad([[1, 2], [3]], 0, "left"), *pad([[4], [5, 6, 0]], 0, "right"))
    assert joined.tokens.tolist() == [[1, 2, 4, 0, 0], [0, 3, 5, 6, 0]]
    assert bits(joined.attention_mask) == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert bits(joined.response_mask) == [[1, 0, 0], [1, 1, 1]]
    assert joined.position_ids[0, :3].tolist() == [0, 1, 2]
    assert joined.position_ids[1].tolist() == [0, 0, 1, 2, 3]
    assert joined.prompt_width == 2
    assert joined.lengths.tolist() == [3, 4]


def check(found: Sequences, template: Template, prompts: list[Prompt], responses: list[str], ended: list[bool]) -> None:
    for i, (prompt, response, end) in enumerate(zip(prompts, responses, ended, strict=True)):
        written, spoken = template.prompt_tokens(prompt), template.response_tokens(response, finished=end)
        real = found.attention_mask[i]
        assert found.tokens[i, real].tolist() == written + spoken
        assert found.position_ids[i, real].tolist() == list(range(len(written) + len(spoken)))
        assert found.tokens[i, found.prompt_width :][found.response_mask[i]].tolist() == spoken
        assert real[: found.prompt_width].sum() == len(written)
        assert not real[: found.prompt_width - len(written)].any()
        assert (found.tokens[i, ~real] == template.pad).all()
        assert (spoken[-1:] == [template.eos]) == end


def test_sequences_hold_prompts_and_responses_and_leave_out_the_eos_of_what_was_cut(template: Template):
    check(sequences(template, PROMPTS, RESPONSES), template, PROMPTS, RESPONSES, [True] * 3)
    ended = [True, False, False]
    check(sequences(template, PROMPTS, RESPONSES, ended), template, PROMPTS, RESPONSES, ended)
    empty = sequences(template, PROMPTS[:2], ["", "no"], [False, True])
    assert empty.response_mask.sum(1).tolist()[0] == 0


def test_prompts_are_padded_left(template: Template):
    batch = prompt_batch(template, PROMPTS)
    assert batch.prompts == PROMPTS
    assert batch.attention_mask[:, -1].all()
    for i, prompt in enumerate(PROMPTS):
        assert batch.tokens[i, batch.attention_mask[i]].tolist() == template.prompt_tokens(prompt)


def test_demonstrations_and_pairs(template: Template):
    records = [Demonstration(prompt=p, response=r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    demonstrations = text_batch(template, records)
    check(demonstrations.sequences, template, PROMPTS, RESPONSES, [True] * 3)
    assert torch.equal(demonstrations.token_mask, demonstrations.sequences.response_mask)

    margins = [0.0, 1.5, 2.0]
    pairs = pair_batch(
        template,
        [
            PreferencePair(prompt=p, chosen=r, rejected=r + " or not", margin=m)
            for p, r, m in zip(PROMPTS, RESPONSES, margins, strict=True)
        ],
    )
    check(pairs.chosen, template, PROMPTS, RESPONSES, [True] * 3)
    check(pairs.rejected, template, PROMPTS, [r + " or not" for r in RESPONSES], [True] * 3)
    assert pairs.margin.tolist() == margins
    assert pairs.lengths.tolist() == (pairs.chosen.lengths + pairs.rejected.lengths).tolist()


def test_safety_pairs_carry_a_sign_per_response(template: Template):
    verdicts = [(True, True), (False, True), (False, False)]
    batch = safety_pair_batch(
        template,
        [
            SafetyPair(prompt=p, safer=r, unsafer="mix " + r, safer_is_unsafe=a, unsafer_is_unsafe=b)
            for p, r, (a, b) in zip(PROMPTS, RESPONSES, verdicts, strict=True)
        ],
    )
    assert batch.safer_sign.tolist() == [1.0, -1.0, -1.0]  # +1 unsafe
    assert batch.unsafer_sign.tolist() == [1.0, 1.0, -1.0]
    check(batch.safer, template, PROMPTS, RESPONSES, [True] * 3)
    check(batch.unsafer, template, PROMPTS, ["mix " + r for r in RESPONSES], [True] * 3)


def test_a_batch_may_be_cut_and_reordered_row_by_row(template: Template):
    whole = sequences(template, PROMPTS, RESPONSES)
    order = [2, 0]
    check(
        whole.select(torch.tensor(order)),
        template,
        [PROMPTS[i] for i in order],
        [RESPONSES[i] for i in order],
        [True] * 2,
    )


def test_rankings_of_unequal_lengths_are_filled_up_with_prompts_without_a_response():
    prompts = [Prompt.from_text("how do i"), Prompt.from_text("please")]
    template = Template(tiny_tokenizer(), "auto")
    batch = ranking_batch(
        template,
        [
            Ranking(prompt=prompts[0], responses=("enjoy", "good luck", "have fun")),
            Ranking(prompt=prompts[1], responses=("good luck", "enjoy")),
        ],
    )
    assert batch.present.tolist() == [[True, True, True], [True, True, False]]
    assert len(batch) == 2
    third = batch.texts[2]
    assert third.response_mask.sum(1).tolist() == [3, 0]
    assert template.text(third.tokens[0, third.prompt_width :].tolist()) == "have fun"
    assert batch.lengths.tolist() == [sum(int(text.lengths[i]) for text in batch.texts) for i in (0, 1)]
    picked = batch.select(torch.tensor([1]))
    assert picked.present.tolist() == [[True, True, False]]
    assert torch.equal(picked.texts[0].tokens[0], batch.texts[0].tokens[1])
