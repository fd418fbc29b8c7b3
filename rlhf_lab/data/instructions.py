"""Rows of an instruction and what it is about, with responses; see `shapes`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_lab.data.shapes import Dropped, Row, choice, listed, text


def _asked(row: Row, instruction: str, given: str | None, joined: str) -> str:
    """An instruction with what it is about below it, if there is anything."""
    below = text(row, given) if given is not None else ""
    return text(row, instruction) + (joined + below if below else "")


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """An instruction, with an input below it where there is one, and a response, or two of which one is preferred.

    Becomes prompt; with `response` also response; with `answers` also response_0, response_1, better, and the preferred
    one as the response.

    Fields:
        instruction, input: columns; null where there is no input.
        joined: what stands between the two.
        response: column of the response, null for none.
        answers: two columns, null for none.
        preference: column that says which answer is better.
        counts_from: what it says for the first: 1 or 0.
        condition: column of what is read after the request, such as a preference; null for none.
        leave_out: texts; a row that holds one of them in prompt or response, in any case, is left out.

    Source: Stanford Alpaca, Taori et al. 2023; AlpacaFarm, Dubois et al. 2023, arXiv:2305.14387.
    """

    instruction: str
    input: str | None
    joined: str
    response: str | None
    answers: Sequence[str] | None
    preference: str | None
    counts_from: Literal[0, 1]
    condition: str | None
    leave_out: Sequence[str]

    def __post_init__(self) -> None:
        if (self.answers is None) != (self.preference is None) or (self.answers is not None and len(self.answers) != 2):
            raise ValueError(
                f"dataset.shape.answers={self.answers}, preference={self.preference}: name two columns of answers and "
                "the one that says which is better, or neither"
            )

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        made: dict[str, Any] = {"prompt": _asked(row, self.instruction, self.input, self.joined)}
        if self.response is not None:
            made["response"] = text(row, self.response)
        if self.answers is not None and self.preference is not None:
            better = choice(row, self.preference, self.counts_from)
            answers = [text(row, path) for path in self.answers]
            made |= {"response_0": answers[0], "response_1": answers[1], "better": better}
            made.setdefault("response", answers[better])
        texts = [str(value).casefold() for value in made.values()]
        if self.condition is not None:
            made["condition"] = text(row, self.condition)
        for phrase in self.leave_out:
            if any(phrase.casefold() in each for each in texts):
                raise Dropped(f"the words {phrase!r}")
        return [made]


@dataclass(frozen=True, kw_only=True)
class GoldGenerations:
    """A request and many responses to it, each with a gold score: a row for each response.

    Fields:
        instruction, input, joined: as of `Instructions`.
        answers, scores: columns of lists.
        most: responses of a request that are read, the first ones; null for all.

    Source: Coste et al. 2023, arXiv:2310.02743; 12,600 responses to each request.
    """

    instruction: str
    input: str | None
    joined: str
    answers: str
    scores: str
    most: int | None

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        prompt = _asked(row, self.instruction, self.input, self.joined)
        answers, scores = listed(row, self.answers), listed(row, self.scores)
        if len(answers) != len(scores):
            raise ValueError(f"{self.answers} has {len(answers)} responses, {self.scores} {len(scores)} scores")
        return [
            {"prompt": prompt, "response": answer, "sample": place, "gold_reward": float(score)}
            for place, (answer, score) in enumerate(zip(answers[: self.most], scores, strict=False))
        ]
