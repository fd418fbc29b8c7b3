"""Answers meet by split, prompt, condition and sample; what does not meet is refused with counts."""

import pytest

from rlhf_lab.evaluation.matches import Answer, matched
from rlhf_lab.records import Prompt


def answers(*keys, split="test"):
    """`text/condition/sample` each, answered with their own name."""
    made = []
    for key in keys:
        text, condition, sample = key.split("/")
        prompt = Prompt.from_text(text).conditioned(condition, {})
        made.append(Answer(split=split, prompt=prompt, sample=int(sample), response=f"to {key}", columns={}))
    return made


def test_answers_meet_by_what_was_asked_whatever_their_order():
    one = answers("a//0", "a//1", "b//0", "b/terse/0")
    matches, left_out = matched({"one": one, "two": one[::-1], "three": one[2:] + one[:2]}, "error")
    assert left_out == {}
    assert [match.key for match in matches] == [answer.key for answer in one]
    for match, answer in zip(matches, one, strict=True):
        assert [each.response for each in match.answers] == [answer.response] * 3
        assert match.prompt == answer.prompt


def test_mismatches_are_refused_with_counts_and_can_be_left_out():
    one, two = answers("a//0", "b//0", "c//0"), answers("b//0", "c//0", "c//1", "d/terse/0")
    with pytest.raises(ValueError, match=r"unmatched are 1 of 3 by one; 2 of 4 by two \(first: prompt .* of test, sa"):
        matched({"one": one, "two": two}, "error")
    matches, left_out = matched({"one": one, "two": two}, "drop")
    assert [match.prompt.request for match in matches] == ["b", "c"]
    assert left_out == {"one": 1, "two": 2}


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_nothing_in_common_is_refused_and_so_is_answering_twice(policy):
    with pytest.raises(ValueError, match=r"unmatched are 1 of 1 by one; 1 of 1 by two.*none in common"):
        matched({"one": answers("a//0"), "two": answers("a/terse/0")}, policy)
    with pytest.raises(ValueError, match="unmatched are 1 of 1 by one"):
        matched({"one": answers("a//0"), "two": answers("a//0", split="ood")}, policy)
    with pytest.raises(ValueError, match="two has 1 of 2 answers whose split, prompt"):
        matched({"one": answers("a//0"), "two": answers("a//0", "a//0")}, policy)
