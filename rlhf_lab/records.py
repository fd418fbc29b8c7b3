"""What a data set holds before it is tokenised: one frozen record per row, whatever file it came from."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation, in the form that chat templates read."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation that ends with the user, waiting for a response.

    A policy may be told, after the request, what to be: rewards to reach (RiC), tastes to serve (P-MORL). That is the
    condition; it is no part of the request, so it changes neither the id nor what scorers read.

    Example: `Prompt.from_text("how do i bake bread ?")` has one message of role "user".
    """

    id: str
    messages: tuple[Message, ...]
    condition: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)  # stream -> what the condition says it weighs

    @classmethod
    def from_text(cls, text: str) -> "Prompt":
        """One user turn; the id is a digest of the text, so equal prompts have equal ids in every data set."""
        return cls.from_messages(({"role": "user", "content": text},))

    @classmethod
    def from_messages(cls, messages: Sequence[Message]) -> "Prompt":
        """A whole conversation; the id is a digest of its roles and contents."""
        spoken = "\x1e".join(f"{message['role']}\x1f{message['content']}" for message in messages)
        return cls(id=hashlib.sha256(spoken.encode()).hexdigest()[:16], messages=tuple(messages))

    @property
    def request(self) -> str:
        """What the user said last."""
        return self.messages[-1]["content"]

    @property
    def written(self) -> str | list[Message]:
        """As a table holds it: the text of one user turn, the messages of more; read back, its id is the same."""
        if len(self.messages) == 1 and self.messages[0]["role"] == "user":
            return self.request
        return [{"role": message["role"], "content": message["content"]} for message in self.messages]

    @property
    def spoken(self) -> tuple[Message, ...]:
        """The conversation as a policy reads it: the condition follows the last request."""
        if not self.condition:
            return self.messages
        *before, last = self.messages
        return (*before, {"role": last["role"], "content": f"{last['content']} {self.condition}"})

    @property
    def plain(self) -> "Prompt":
        """The same request without a condition."""
        return replace(self, condition="", weights={}) if self.condition or self.weights else self

    def conditioned(self, condition: str, weights: Mapping[str, float]) -> "Prompt":
        """The same request under this condition."""
        return replace(self, condition=condition, weights=dict(weights))


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A prompt and a response to imitate; with `every_turn` also what the assistant said earlier in the prompt."""

    prompt: Prompt
    response: str
    every_turn: bool = False


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two responses to a prompt, the first preferred. `margin` is by how much, 0 when the data do not say."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float
    gaps: Mapping[str, float] = field(default_factory=dict)  # score -> by how much the preferred response's is higher

    @property
    def responses(self) -> tuple[str, str]:
        return self.chosen, self.rejected


@dataclass(frozen=True, kw_only=True)
class Quadruple:
    """Two pairs, the first the stronger preference: its preferred response wins by more.

    Source: preferences over preferences, Chittepu et al. 2025, arXiv:2509.22851.
    """

    strong: PreferencePair
    weak: PreferencePair


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Two or more responses to a prompt, the best first."""

    prompt: Prompt
    responses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SafetyPair:
    """Two responses to a prompt, ordered by safety, each with its own verdict.

    Source: the two questions of Safe RLHF's annotation, Dai et al. 2023, arXiv:2310.12773, section 3.1.
    """

    prompt: Prompt
    safer: str
    unsafer: str
    safer_is_unsafe: bool
    unsafer_is_unsafe: bool

    @property
    def responses(self) -> tuple[str, str]:
        return self.safer, self.unsafer

    @property
    def is_torn(self) -> bool:
        """Whether the labels contradict each other: the safer response is unsafe, and the other is not."""
        return self.safer_is_unsafe and not self.unsafer_is_unsafe

    @property
    def swapped(self) -> "SafetyPair":
        """The same with the other response as the safer one."""
        return SafetyPair(
            prompt=self.prompt,
            safer=self.unsafer,
            unsafer=self.safer,
            safer_is_unsafe=self.unsafer_is_unsafe,
            unsafer_is_unsafe=self.safer_is_unsafe,
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two responses to a prompt that a judge is asked to compare, in either order."""

    prompt: Prompt
    responses: tuple[str, str]

    @property
    def swapped(self) -> "Comparison":
        """The same with the other response first."""
        return Comparison(prompt=self.prompt, responses=(self.responses[1], self.responses[0]))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge says of a comparison by one criterion.

    Fields:
        by_order: 1 where the comparison's first response is better, 0 where its second is, 0.5 for a tie: said when the
            first was shown first, and when it was shown second. None where that order was not asked, or the reply
            could not be read.
        scores: of the comparison's first and second response, for criteria that give numbers; averaged over the orders
            that were read; None for those that do not.
        reasons: what the judge wrote, by order; "" for nothing.
        asked: how many orders were asked.
    """

    by_order: tuple[float | None, float | None]
    scores: tuple[float, float] | None = None
    reasons: tuple[str, str] = ("", "")
    asked: int

    @property
    def wins(self) -> float | None:
        """How far the first response wins, averaged over the orders that were asked; None unless all could be read."""
        read = [value for value in self.by_order if value is not None]
        return sum(read) / len(read) if read and len(read) == self.asked else None

    @property
    def is_consistent(self) -> bool:
        """Whether both orders were read and say the same."""
        return None not in self.by_order and self.by_order[0] == self.by_order[1]
