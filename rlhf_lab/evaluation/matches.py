"""Responses of several contestants to the same prompts, side by side: joined by id, never by position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_lab.records import Prompt

Unmatched = Literal["error", "drop"]
Key = tuple[str, str, str, int]  # split, prompt id, condition, sample


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response of one contestant.

    Fields:
        sample: its number among those to this prompt under this condition.
        columns: numbers that a table holds of it, by column.
    """

    split: str
    prompt: Prompt
    sample: int
    response: str
    columns: Mapping[str, float]

    @property
    def key(self) -> Key:
        return self.split, self.prompt.id, self.prompt.condition, self.sample


@dataclass(frozen=True, kw_only=True)
class Match:
    """The responses of all contestants, in their order, to one prompt under one condition."""

    key: Key
    prompt: Prompt
    answers: tuple[Answer, ...]

    @property
    def row(self) -> dict[str, str | int]:
        """What it is called in a table."""
        split, prompt_id, condition, sample = self.key
        return {"split": split, "condition": condition, "prompt_id": prompt_id, "sample": sample}


def matched(answers: Mapping[str, Sequence[Answer]], unmatched: Unmatched) -> tuple[list[Match], dict[str, int]]:
    """Put the contestants' answers side by side, in the order of the first one's.

    Args:
        answers: contestant -> its answers, in any order.
        unmatched: "error" refuses answers to what another contestant was not asked; "drop" leaves them out.

    Returns:
        The matches; and contestant -> how many of its answers were left out, of those that had any.

    Raises:
        ValueError: a contestant answers a question twice, there are unmatched answers, or no matched ones.
    """
    by_key = {name: {answer.key: answer for answer in each} for name, each in answers.items()}
    for name, each in answers.items():
        if twice := len(each) - len(by_key[name]):
            raise ValueError(
                f"{name} has {twice} of {len(each)} answers whose split, prompt, condition and sample another one has "
                "too; give a table of one policy at one step"
            )
    shared = set.intersection(*(set(each) for each in by_key.values()))
    left_out = {name: len(each) - len(shared) for name, each in by_key.items() if len(each) > len(shared)}
    if left_out and (unmatched == "error" or not shared):
        counts = "; ".join(f"{count} of {len(by_key[name])} by {name}" for name, count in left_out.items())
        name = next(iter(left_out))
        split, prompt_id, condition, sample = next(key for key in by_key[name] if key not in shared)
        told = f" under {condition!r}" if condition else ""
        remedy = "leave them out with contestants.unmatched=drop" if shared else "they have none in common"
        raise ValueError(
            f"the contestants did not answer the same questions: unmatched are {counts} (first: prompt {prompt_id} of "
            f"{split}{told}, sample {sample}); compare them on the same prompts, conditions and splits "
            f"(contestants.splits), or {remedy}"
        )
    first = next(iter(by_key.values()))
    matches = [
        Match(key=key, prompt=answer.prompt, answers=tuple(each[key] for each in by_key.values()))
        for key, answer in first.items()
        if key in shared
    ]
    return matches, left_out
