"""What a token-wise loss compares, against a loop over the tokens of each pair."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.data.tokenise import join, pad
from rlhf_lab.functional.spans import carried, compared, diverging
from rlhf_lab.types import ScoreForward, Sequences

PAIRS = [
    ([5, 6, 7, 1], [5, 8, 1]),  # part at the second token; the second ends first
    ([5, 1], [5, 6, 6, 6, 1]),  # the first is the start of the second, but for its end
    ([9, 1], [8, 7, 1]),
    ([5, 6], [5, 6, 0, 4]),  # cut, and going on with a token that looks like padding
    ([4, 4, 1], [4, 4, 1]),
]
SPANS = [(1, 4), (1, 5), (0, 3), (2, 4), (2, 3)]


def texts(fill: tuple[int, int] = (0, 0)) -> tuple[Sequences, Sequences]:
    """The pairs, each side padded with its own id."""
    prompts = pad([[3] * (1 + i % 2) for i in range(len(PAIRS))], 0, "left")
    first = join(*prompts, *pad([pair[0] for pair in PAIRS], fill[0], "right"))
    return first, join(*prompts, *pad([pair[1] for pair in PAIRS], fill[1], "right"))


@pytest.mark.parametrize("fill", [(0, 0), (1, 6)])
def test_responses_diverge_from_the_first_token_that_differs_to_the_later_end(fill: tuple[int, int]):
    expected = [[begin <= t < end for t in range(5)] for begin, end in SPANS]
    assert diverging(*texts(fill)).tolist() == expected
    assert diverging(*texts(fill)[::-1]).tolist() == expected


def test_a_row_that_has_ended_keeps_its_last_valid_entry():
    x = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert carried(x, mask, 5).tolist() == [[1, 2, 2, 2, 2], [3, 4, 5, 5, 5]]


def test_token_comparisons_are_those_of_a_loop_and_the_last_is_of_the_ends():
    first, second = texts()
    torch.manual_seed(0)
    scores = tuple(torch.randn(text.response_mask.shape).where(text.response_mask, 0) for text in (first, second))
    ends = tuple(
        score[torch.arange(5), text.response_mask.sum(1) - 1]
        for score, text in zip(scores, (first, second), strict=True)
    )
    new = ScoreForward(scores=ends, token_scores=scores)
    left, right, weight = compared(new, (first, second), "token")
    for row, (begin, end) in enumerate(SPANS):
        lengths = [len(response) for response in PAIRS[row]]
        expected = [
            (scores[0][row, min(t, lengths[0] - 1)], scores[1][row, min(t, lengths[1] - 1)]) for t in range(begin, end)
        ]
        found = [(left[row, t], right[row, t]) for t in range(5) if weight[row, t] > 0]
        assert_close(torch.tensor(found), torch.tensor(expected), atol=0, rtol=0)
        assert_close(weight[row][weight[row] > 0], torch.full((end - begin,), 1 / (end - begin)))
        assert found[-1] == (ends[0][row], ends[1][row])


def test_sequence_comparisons_are_of_the_ends_alone():
    ends = (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    left, right, weight = compared(ScoreForward(ends), texts(), "sequence")
    assert left.tolist() == [[1], [2]]
    assert right.tolist() == [[3], [4]]
    assert weight.tolist() == [[1], [1]]
