"""Rows of conversations: as one text, as turns, or as messages; see `shapes`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_lab.data.formats import HUMAN_ASSISTANT
from rlhf_lab.data.shapes import Dropped, Row, number, text, turns
from rlhf_lab.records import Message, Prompt


def _written(messages: list[Message]) -> str | list[Message]:
    """A conversation as a column holds it."""
    return Prompt.from_messages(messages).written


@dataclass(frozen=True, kw_only=True)
class Transcripts:
    r"""Two dialogues as texts, `\n\nHuman: … \n\nAssistant: …`, that part ways at the last answer.

    Becomes prompt, the turns before that; chosen, rejected; and response, the chosen answer, to be imitated.

    Fields:
        chosen, rejected: columns of the two texts.

    Source: Anthropic's HH-RLHF, Bai et al. 2022, arXiv:2204.05862.
    """

    chosen: str
    rejected: str

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        both = text(row, self.chosen), text(row, self.rejected)
        try:
            better, worse = map(HUMAN_ASSISTANT.turns, both)
        except ValueError as error:
            raise Dropped("a text that is no dialogue of Human and Assistant") from error
        *before, last = better
        if [turn["role"] for turn in (last, worse[-1])] != ["assistant", "assistant"]:
            raise Dropped("a dialogue that does not end with the assistant")
        if before != worse[:-1]:
            raise Dropped("dialogues that part ways before the last answer")
        if not before or before[-1]["role"] != "user":
            raise Dropped("an answer to nobody")
        pair = {"chosen": last["content"], "rejected": worse[-1]["content"]}
        return [{"prompt": _written(before), "response": last["content"], **pair}]


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """A list of turns, `role` and `text`, and two answers to it of the same form.

    Source: PKU-Alignment/processed-hh-rlhf, made for Dai et al. 2023, arXiv:2310.12773.
    """

    context: str
    chosen: str
    rejected: str
    roles: Mapping[str, str]  # as they are called there -> user, assistant

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        spoken: list[Message] = []
        for role, words in turns(row, self.context, role="role", words="text"):
            if role not in self.roles:
                raise ValueError(f"a turn has the role {role!r}; dataset.shape.roles knows {sorted(self.roles)}")
            spoken.append({"role": self.roles[role], "content": words})
        if not spoken or spoken[-1]["role"] != "user":
            raise Dropped("an answer to nobody")
        pair = {"chosen": text(row, f"{self.chosen}.text"), "rejected": text(row, f"{self.rejected}.text")}
        return [{"prompt": _written(spoken), "response": pair["chosen"], **pair}]


@dataclass(frozen=True, kw_only=True)
class Talks:
    """A conversation of messages, or two that part ways at the last, with their scores where there are any.

    Becomes prompt and response, or prompt, chosen, rejected, score_chosen, score_rejected and margin, their difference.

    Fields:
        messages: column of the conversation to imitate, null for none.
        chosen, rejected: columns of two conversations, null for none.
        score_chosen, score_rejected: columns of their scores, null for none.

    Source: UltraFeedback, Cui et al. 2023, arXiv:2310.01377, as binarized for Zephyr, Tunstall et al. 2023,
    arXiv:2310.16944.
    """

    messages: str | None
    chosen: str | None
    rejected: str | None
    score_chosen: str | None
    score_rejected: str | None

    def __post_init__(self) -> None:
        if (self.chosen is None) != (self.rejected is None) or (self.messages is None and self.chosen is None):
            raise ValueError("dataset.shape needs messages, or chosen and rejected, or all three")
        if (self.score_chosen is None) != (self.score_rejected is None):
            raise ValueError("dataset.shape has a score of one side; name both, or neither")

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        made: dict[str, Any] = {}
        if self.messages is not None:
            before, made["response"] = self._parted(row, self.messages)
            made["prompt"] = _written(before)
        if self.chosen is not None and self.rejected is not None:
            before, made["chosen"] = self._parted(row, self.chosen)
            beside, made["rejected"] = self._parted(row, self.rejected)
            if before != beside or made.get("prompt", _written(before)) != _written(before):
                raise Dropped("answers to different requests")
            made |= {"prompt": _written(before), "response": made.get("response", made["chosen"])}
        if self.score_chosen is not None and self.score_rejected is not None:
            scores = number(row, self.score_chosen), number(row, self.score_rejected)
            made |= {"score_chosen": scores[0], "score_rejected": scores[1], "margin": scores[0] - scores[1]}
        return [made]

    def _parted(self, row: Row, path: str) -> tuple[list[Message], str]:
        spoken: list[Message] = [
            {"role": role, "content": words} for role, words in turns(row, path, role="role", words="content")
        ]
        if [turn["role"] for turn in spoken[-2:]] != ["user", "assistant"]:
            raise Dropped("a conversation that does not end with the assistant's answer to the user")
        return spoken[:-1], spoken[-1]["content"]
