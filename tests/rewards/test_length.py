"""Length as a score: counted by its mask, whatever the tokens are."""

import torch

from rlhf_lab.data.tokenise import join, pad
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.length import Length
from rlhf_lab.types import Rollout


def test_length_counts_response_tokens_in_its_unit():
    responses = [[5], [7, 0, 0], [1, 2, 3, 4]]  # a token equal to the pad is a token
    rollout = Rollout(
        prompts=[Prompt.from_text("why ?")] * 3,
        sequences=join(*pad([[9, 9], [9], [9, 9, 9]], 0, "left"), *pad(responses, 0, "right")),
        group=torch.arange(3),
        finished=torch.ones(3, dtype=torch.bool),
        responses=["", "", ""],
        logprobs=torch.zeros(3, 4),
    )
    score = Length(2.0).score(rollout)
    assert score.value.tolist() == [0.5, 1.5, 2.0]
    assert score.members.tolist() == [[0.5], [1.5], [2.0]]
