"""What a language model is asked when it compares: files to be read and changed, and the messages they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf_lab.judges.reading import Format, demonstrated
from rlhf_lab.records import Comparison, Message, Prompt

OWN = (
    ".yaml",
    ".yml",
)  # how the name of a person's own file ends; others are names of those that come with the package


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A comparison with what is to be answered: `verdict` A, B or tie, or `scores` of both."""

    question: str
    request: str
    first: str
    second: str
    reasoning: str
    verdict: Literal["A", "B", "tie"] | None = None
    scores: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """One kind of question.

    Fields:
        asks: for a `choice` between A, B and tie, or for `scores` of both.
        range: lowest and highest score.
        system: how to judge.
        question: what is asked; `{criterion}` stands for the wording of a criterion.
        request: what the prompt is called: request, post, article.
    """

    name: str
    asks: Literal["choice", "scores"]
    range: tuple[float, float] | None
    system: str
    question: str
    request: str
    demonstrations: tuple[Demonstration, ...]

    @classmethod
    def read(cls, name: str) -> "Rubric":
        """A rubric that comes with the package, by its name, or a YAML file of the person's own, by its path.

        Raises:
            ValueError: there is no such file, or a part of it is missing, unknown or contradicts another.
        """
        place = Path(name).expanduser() if name.endswith(OWN) else None
        shipped = files("rlhf_lab.judges") / "rubrics"
        try:
            text = place.read_text() if place else (shipped / f"{name}.yaml").read_text()
        except FileNotFoundError as error:
            there = sorted(path.name.removesuffix(".yaml") for path in shipped.iterdir())
            raise ValueError(
                f"judge.rubrics names {name}, which is not there; there are {', '.join(there)}, or a path to a .yaml"
            ) from error
        try:
            return cls._of(name, yaml.safe_load(text))
        except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"rubric {name}: {type(error).__name__} {error}; it needs asks, system, question, request, "
                "demonstrations (each: request, first, second, reasoning, verdict or scores), and range for scores"
            ) from error

    @classmethod
    def _of(cls, name: str, said: dict[str, Any]) -> "Rubric":
        scored = said["asks"] == "scores"
        if said["asks"] not in ("choice", "scores") or scored != ("range" in said):
            raise ValueError(
                f"rubric {name}: asks is {said['asks']!r}; expected choice, or scores together with a range"
            )
        if scored and not said["range"][0] < said["range"][1]:
            raise ValueError(f"rubric {name}: range is {said['range']}; expected the lowest score, then a higher one")
        shown = [
            Demonstration(
                **{"question": said["question"]} | each | ({"scores": tuple(each["scores"])} if scored else {})
            )
            for each in said.pop("demonstrations")
        ]
        for each in shown:
            if (each.scores is None) == scored or (each.verdict is None) != scored:
                raise ValueError(
                    f"rubric {name}: a demonstration answers {each.verdict or each.scores}; it asks {said['asks']}"
                )
        bounds = said.pop("range", None)
        return cls(name=name, range=tuple(bounds) if bounds else None, demonstrations=tuple(shown), **said)

    @property
    def reads_wording(self) -> bool:
        """Whether its question needs the wording of a criterion."""
        return "{criterion}" in self.question

    def messages(
        self, comparisons: Sequence[Comparison], wording: str, form: Format, demonstrations: bool
    ) -> list[Message]:
        """What is sent to have these comparisons judged in one call, each with its first response as A."""
        sent: list[Message] = [{"role": "system", "content": f"{self.system}\n\n{form.instruction(self)}"}]
        for each in self.demonstrations if demonstrations else ():
            pair = Comparison(prompt=Prompt.from_text(each.request), responses=(each.first, each.second))
            sent.append({"role": "user", "content": self._shown([pair], each.question, form)})
            sent.append({"role": "assistant", "content": demonstrated(each, form)})
        question = self.question.replace("{criterion}", wording)
        sent.append({"role": "user", "content": self._shown(comparisons, question, form)})
        return sent

    def _shown(self, comparisons: Sequence[Comparison], question: str, form: Format) -> str:
        parts = [f"Question: {question}"]
        for number, each in enumerate(comparisons, start=1):
            texts = (
                (self.request, conversation(each.prompt)),
                ("response_a", each.responses[0]),
                ("response_b", each.responses[1]),
            )
            shown = "\n\n".join(f"<{tag}>\n{text}\n</{tag}>" for tag, text in texts)
            parts.append(f'<pair number="{number}">\n{shown}\n</pair>' if form.batched else shown)
        return "\n\n".join(parts)


def conversation(prompt: Prompt) -> str:
    """The request as the user made it, without what a policy was told beside it; of a conversation all turns, named."""
    if len(prompt.messages) == 1:
        return prompt.request
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt.messages)
