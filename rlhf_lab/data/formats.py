"""Conversations as text and back: what a format reads from a text is what was written into it, or it is refused."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from rlhf_lab.records import Message

Messages = Sequence[Message]


class Format(Protocol):
    """One way to write a conversation, up to the point where the assistant is to speak."""

    @property
    def markers(self) -> Sequence[str]:
        """What tells the turns apart; a text that holds one would be read as more turns than it is."""
        ...

    def write(self, messages: Messages) -> str:
        """The conversation as text.

        Raises:
            ValueError: it has a role, or a number of turns, that the format has no place for.
        """
        ...

    def parse(self, text: str) -> tuple[Message, ...]:
        """The conversation that a text was written of.

        Raises:
            ValueError: the text is not of this format.
        """
        ...


def held(markers: Sequence[str], texts: Sequence[str]) -> str:
    """The first marker that one of the texts holds, "" if none does."""
    return next((marker for marker in markers for text in texts if marker in text), "")


def build(form: Format, messages: Messages) -> str:
    """The conversation as text, of which `form.parse` is the conversation.

    Raises:
        ValueError: a message holds a marker of the format.
    """
    if marker := held(form.markers, [message["content"] for message in messages]):
        raise ValueError(
            f"a message holds {marker!r}, which tells the turns apart; leave it out, or choose another format"
        )
    text = form.write(messages)
    if form.parse(text) != tuple(messages):
        raise ValueError(
            f"a message would be read otherwise than it was written, in {text[:80]!r}…; choose another format"
        )
    return text


def _known(messages: Messages, roles: Sequence[str], name: str) -> None:
    if unknown := sorted({message["role"] for message in messages} - set(roles)):
        raise ValueError(
            f"dataset.template={name} knows the roles {' and '.join(roles)}, found {unknown[0]}; "
            "choose another dataset.template"
        )


def _alone(messages: Messages, name: str) -> str:
    """The one request of a conversation."""
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise ValueError(
            f"dataset.template={name} has a place for one request and no earlier turns, found "
            f"{[message['role'] for message in messages]}; use dataset.template=dialogue"
        )
    return messages[0]["content"]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Turns that begin with the name of who speaks, with an empty line between them.

    Fields:
        labels: role -> name, such as user: Human.
        begins_apart: whether the first turn has an empty line before it too.
    """

    labels: Mapping[str, str]
    begins_apart: bool

    @property
    def markers(self) -> Sequence[str]:
        return [f"\n\n{label}:" for label in self.labels.values()]

    @cached_property
    def _turn(self) -> re.Pattern[str]:
        names = "|".join(map(re.escape, self.labels.values()))
        return re.compile(rf"\n\n({names}): ?")

    def write(self, messages: Messages) -> str:
        _known(messages, list(self.labels), "dialogue")
        turns = [f"{self.labels[message['role']]}: {message['content']}" for message in messages]
        return "\n\n" * self.begins_apart + "\n\n".join([*turns, f"{self.labels['assistant']}:"])

    def parse(self, text: str) -> tuple[Message, ...]:
        turns = self.turns(text)
        last = turns.pop()
        if last != {"role": "assistant", "content": ""}:
            raise ValueError(
                f"the text does not end where the {self.labels['assistant']} is to speak, but {text[-40:]!r}"
            )
        return tuple(turns)

    def turns(self, text: str) -> list[Message]:
        """All turns of a transcript, an unfinished or finished last one included; their words exactly as they stand.

        Raises:
            ValueError: nobody is named where it begins.
        """
        whole = text if self.begins_apart else f"\n\n{text}"
        roles = {label: role for role, label in self.labels.items()}
        found = list(self._turn.finditer(whole))
        if not found or found[0].start() != 0:
            raise ValueError(f"a conversation begins with {text[:40]!r}; expected {self.labels['user']}: …")
        ends = [*(match.start() for match in found[1:]), len(whole)]
        return [
            {"role": roles[match[1]], "content": whole[match.end() : end]}
            for match, end in zip(found, ends, strict=True)
        ]


DIALOGUE = Labelled(labels={"system": "System", "user": "User", "assistant": "Assistant"}, begins_apart=False)
# Source: the strings of Anthropic's HH-RLHF, Bai et al. 2022, arXiv:2204.05862
HUMAN_ASSISTANT = Labelled(labels={"user": "Human", "assistant": "Assistant"}, begins_apart=True)


@dataclass(frozen=True, kw_only=True)
class SafeRlhf:
    """The fixed template of the Safe RLHF release, for models that were trained with it; answers end with `eos`.

    Source: Dai et al. 2023, arXiv:2310.12773, as their code writes conversations.
    """

    eos: str
    opening = "BEGINNING OF CONVERSATION: "
    user = "USER: "
    assistant = " ASSISTANT:"

    @property
    def markers(self) -> Sequence[str]:
        return [self.assistant, self.eos]

    def write(self, messages: Messages) -> str:
        _known(messages, ["user", "assistant"], "safe_rlhf")
        return self.opening + "".join(
            f"{self.user}{message['content']}{self.assistant}"
            if message["role"] == "user"
            else message["content"] + self.eos
            for message in messages
        )

    def parse(self, text: str) -> tuple[Message, ...]:
        turns: list[Message] = []
        opening, rest = text[: len(self.opening)], text[len(self.opening) :]
        while rest.startswith(self.user):
            request, speaks, after = rest.removeprefix(self.user).partition(self.assistant)
            answer, ends, after = after.partition(self.eos)
            if not speaks or (answer and not ends):
                break
            turns.append({"role": "user", "content": request})
            if ends:
                turns.append({"role": "assistant", "content": answer})
            rest = after
        if opening != self.opening or rest or not turns or turns[-1]["role"] != "user":
            raise ValueError(f"{text[:60]!r} is no conversation that ends with {self.assistant}")
        return tuple(turns)


@dataclass(frozen=True)
class Alpaca:
    """One instruction, with what it is about below it where there is any.

    A request with its input below a heading, `joined`, is written in the second of the two ways.

    Source: the release of Stanford Alpaca, Taori et al. 2023, which AlpacaFarm (arXiv:2305.14387) writes alike.
    """

    heading = "\n\n### Input:\n"
    speaks = "\n\n### Response:"
    plain = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n"
    )
    paired = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\n"
    )

    @property
    def markers(self) -> Sequence[str]:
        return [self.speaks, "\n\n### Instruction:\n"]

    def write(self, messages: Messages) -> str:
        request = _alone(messages, "alpaca")
        return (self.paired if self.heading in request else self.plain) + request + self.speaks

    def parse(self, text: str) -> tuple[Message, ...]:
        request = text.removesuffix(self.speaks)
        for opening in (self.plain, self.paired):
            if text != request and request.startswith(opening):
                return ({"role": "user", "content": request.removeprefix(opening)},)
        raise ValueError(f"{text[:60]!r}… is not one of the two ways in which Alpaca writes an instruction")


@dataclass(frozen=True)
class Plain:
    """The request as it stands; one that ends with `TL;DR:` says itself what is to follow, after a space.

    Source: TL;DR, Stiennon et al. 2020, arXiv:2009.01325, as Kirk et al. 2023, arXiv:2310.06452, write it.
    """

    markers: Sequence[str] = ()

    def write(self, messages: Messages) -> str:
        return _alone(messages, "tldr")

    def parse(self, text: str) -> tuple[Message, ...]:
        return ({"role": "user", "content": text},)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A tokenizer's own chat template; its turns are told apart by what it writes between probes.

    Fields:
        render: messages -> the text up to where the assistant is to speak.
        special: texts that the tokenizer reads as tokens of its own.
    """

    render: Callable[[Messages], str]
    special: tuple[str, ...]

    def write(self, messages: Messages) -> str:
        return self.render(messages)

    @property
    def markers(self) -> Sequence[str]:
        between = [piece for frame in self._frames for piece in (*frame.opens[1:], frame.answered, frame.asked)]
        return list(dict.fromkeys([*self.special, *between]))

    def parse(self, text: str) -> tuple[Message, ...]:
        for frame in self._frames:
            messages = frame.parse(text)
            if messages is not None and self.render(messages) == text:
                return tuple(messages)
        raise ValueError(f"{text[:60]!r}… is no conversation that the tokenizer's chat template writes")

    @cached_property
    def _frames(self) -> list["_Frame"]:
        """What the template writes around the turns, with the system's words first where it has a place for them."""
        from jinja2 import TemplateError

        turns = ["user", "assistant", "user", "assistant", "user"]
        frames: list[_Frame] = []
        for roles in (turns, ["system", *turns]):
            probes = [f"probe{place}q" for place in range(len(roles))]
            try:
                text = self.render([{"role": r, "content": c} for r, c in zip(roles, probes, strict=True)])
            except TemplateError:  # it has no place for a system's words, and says so
                continue
            pieces = re.split("|".join(probes), text)
            if re.findall("|".join(probes), text) == probes:
                *opens, answered, asked, answered_again, asked_again, ends = pieces
                if (answered, asked) == (answered_again, asked_again) and answered.strip() and asked.strip():
                    frames.append(_Frame(tuple(opens), answered, asked, ends))
        return frames


@dataclass(frozen=True)
class _Frame:
    """What stands before the first words and after the system's; after a request; after an answer; and at the end."""

    opens: tuple[str, ...]
    answered: str
    asked: str
    ends: str

    def parse(self, text: str) -> list[Message] | None:
        """The turns between, None if this frame is not around them; another text may have been written for the same."""
        begins, *system = self.opens
        if not text.startswith(begins) or not text.endswith(self.ends):
            return None
        rest = text[len(begins) :]
        turns: list[Message] = []
        for piece in system:
            words, found, rest = rest.partition(piece)
            if not found:
                return None
            turns.append({"role": "system", "content": words})
        while True:
            request, found, after = rest.partition(self.answered)
            answer, more, later = after.partition(self.asked)
            if not found or not more:
                turns.append({"role": "user", "content": rest.removesuffix(self.ends)})
                return turns
            turns.append({"role": "user", "content": request})
            turns.append({"role": "assistant", "content": answer})
            rest = later
