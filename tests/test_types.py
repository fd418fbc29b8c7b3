"""Row i is row i: selecting and moving nested batches, and slices that drop nothing."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.records import Prompt
from rlhf_lab.types import (
    Batch,
    Experience,
    Kept,
    PairBatch,
    PolicyForward,
    Processing,
    PromptBatch,
    Rollout,
    SafetyPairBatch,
    Score,
    ScoredRollout,
    Sequences,
    TextBatch,
    batches,
)

ROWS, PROMPT, WIDTH = 4, 2, 3
RESPONSE_MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]]).bool()  # as in the docstring of Rollout


def marked(*shape: int) -> torch.Tensor:
    """A tensor whose every entry says which row it is in."""
    return torch.arange(ROWS).reshape(ROWS, *[1] * len(shape)).expand(ROWS, *shape)


def sequences() -> Sequences:
    prompt = torch.tensor([[0, 1], [1, 1], [1, 1], [0, 1]]).bool()
    attention = torch.cat([prompt, RESPONSE_MASK], dim=1)
    return Sequences(
        tokens=marked(PROMPT + WIDTH),
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        response_mask=RESPONSE_MASK,
        kept=(Kept(sizes=marked(WIDTH), ids=[torch.tensor([row] * row) for row in range(ROWS)]),),
    )


def experience() -> Experience:
    rollout = Rollout(
        prompts=[Prompt.from_text(f"prompt {row}") for row in range(ROWS)],
        sequences=sequences(),
        group=torch.tensor([0, 0, 1, 1]),
        finished=torch.tensor([True, True, False, True]),
        responses=[f"response {row}" for row in range(ROWS)],
        logprobs=-marked(WIDTH).float(),
        processing=Processing(temperature=0.7),
    )
    scored = ScoredRollout(
        rollout=rollout,
        scores={
            name: Score(value=marked() + offset, members=marked(5) + offset) for name, offset in (("a", 10), ("b", 20))
        },
        ref_logprobs=marked(WIDTH) + 30,
        values={"reward": marked(WIDTH) + 40, "cost": marked(WIDTH) + 50},
    )
    return Experience(scored=scored, advantages=marked(WIDTH) + 60, returns={"reward": marked(WIDTH) + 70})


def leaves(value: Any) -> list[Any]:
    """Every tensor and list inside, found through the instance's dictionary rather than through `map`."""
    if isinstance(value, Batch):
        value = vars(value)
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in leaves(entry)]
    if isinstance(value, tuple):
        return [leaf for entry in value for leaf in leaves(entry)]
    if isinstance(value, Processing):  # no column
        return []
    return [value]


@pytest.mark.parametrize("rows", [[2, 0], [3], [0, 1, 2, 3], [1, 1, 1], []])
def test_select_takes_the_same_rows_in_the_same_order_everywhere(rows: list[int]):
    whole = experience()
    part = whole.select(torch.tensor(rows, dtype=torch.int64))
    assert len(part) == len(part.scored) == len(part.scored.rollout) == len(rows)
    before, after = leaves(whole), leaves(part)
    assert len(before) == len(after) == 20  # 3 lists and 17 tensors: none is forgotten
    for old, new in zip(before, after, strict=True):
        assert [str(old[row]) for row in rows] == [str(entry) for entry in new]


def test_a_selection_keeps_types_and_leaves_the_whole_alone():
    whole = experience()
    part = whole.select(torch.tensor([1]))
    assert isinstance(part.scored.rollout.sequences, Sequences)
    assert isinstance(part.scored.scores["b"], Score)
    assert part.scored.rollout.processing == Processing(temperature=0.7)
    assert len(whole) == ROWS
    with pytest.raises(FrozenInstanceError):
        part.advantages = whole.advantages  # pyright: ignore[reportAttributeAccessIssue]


def test_map_reaches_every_leaf_once():
    seen: list[Any] = []
    whole = experience()
    whole.map(lambda leaf: seen.append(leaf) or leaf)
    assert sorted(map(id, seen)) == sorted(map(id, leaves(whole)))


def test_to_moves_every_tensor_and_no_list():
    moved = experience().to(torch.device("meta"))
    tensors = [leaf for leaf in leaves(moved) if isinstance(leaf, torch.Tensor)]
    assert len(tensors) == 17
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.scored.rollout.responses == ["response 0", "response 1", "response 2", "response 3"]


def test_widths_and_lengths_are_read_off_the_masks():
    batch = experience()
    assert batch.scored.rollout.sequences.prompt_width == PROMPT
    assert batch.lengths.tolist() == [3, 5, 5, 2]  # real tokens of prompt and response
    assert_close(batch.token_mask, RESPONSE_MASK)
    text = TextBatch(sequences=sequences())
    assert (len(text), text.lengths.tolist()) == (ROWS, [3, 5, 5, 2])
    assert_close(text.token_mask, RESPONSE_MASK)


def test_pairs_count_both_of_their_responses():
    first, second = sequences(), sequences().select(torch.tensor([3, 3, 3, 3]))
    pairs = PairBatch(chosen=first, rejected=second, margin=torch.zeros(ROWS))
    verdicts = SafetyPairBatch(safer=first, unsafer=second, safer_sign=-torch.ones(ROWS), unsafer_sign=torch.ones(ROWS))
    for batch in (pairs, verdicts):
        assert len(batch) == ROWS
        assert batch.lengths.tolist() == [5, 7, 7, 4]
        assert batch.texts == (first, second)


def test_a_prompt_batch_counts_its_prompts():
    prompts = [Prompt.from_text(str(row)) for row in range(ROWS)]
    batch = PromptBatch(prompts=prompts, tokens=marked(PROMPT), attention_mask=torch.ones(ROWS, PROMPT).bool())
    assert len(batch) == ROWS
    assert batch.select(torch.tensor([3, 1])).prompts == [prompts[3], prompts[1]]


def test_the_log_probability_of_a_response_is_the_sum_over_its_tokens():
    new = PolicyForward(torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]]), torch.zeros(2, 3), {})
    assert new.sequence_logprobs.tolist() == [-3.0, -0.5]


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (8, 4), (3, 4), (1, 1), (7, 1), (0, 4)])
def test_batches_cover_every_row_once_in_order(size: int, batch_size: int):
    slices = list(batches(size, batch_size))
    assert [row for part in slices for row in range(size)[part]] == list(range(size))
    assert all(0 < part.stop - part.start <= batch_size for part in slices)
    assert all(part.stop - part.start == batch_size for part in slices[:-1])
