"""How a conversation becomes tokens: the prompt up to where the model speaks, and the response with its EOS."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from rlhf_lab.data.formats import DIALOGUE, Alpaca, Chat, Format, Plain, SafeRlhf, held
from rlhf_lab.records import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style = Literal["auto", "chat", "dialogue", "safe_rlhf", "alpaca", "tldr"]

_PROBE = Prompt.from_text("How do I bake 1,024 crêpes (in  Paris)?\nIt's for the children's party: flour, milk, salt …")


class Template:
    """A tokenizer and the way it writes conversations.

    Args:
        style: "chat", the tokenizer's own chat template; "dialogue", plain `User: … Assistant:` turns; "safe_rlhf" and
            "alpaca", as these releases write conversations and instructions; "tldr", the request as it stands and a
            space before the response; "auto": chat if the tokenizer has a template, else dialogue. `self.style` says
            which it became.

    Raises:
        ValueError: "chat" for a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", style: Style) -> None:
        has_template = bool(tokenizer.chat_template)
        if style == "chat" and not has_template:
            raise ValueError(
                f"dataset.template=chat, but the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "use dataset.template=dialogue"
            )
        self.tokenizer = tokenizer
        self.style: Style = ("chat" if has_template else "dialogue") if style == "auto" else style
        self.eos = cast(int, tokenizer.eos_token_id)
        self.pad = cast(int, tokenizer.pad_token_id)
        # texts that become one token of a meaning of its own wherever they stand; the unknown one means nothing
        self.special = tuple(text for text in tokenizer.all_special_tokens if text != tokenizer.unk_token)
        self.format = self._format()

    def _format(self) -> Format:
        if self.style == "chat":
            return Chat(render=self._rendered, special=self.special)
        if self.style == "safe_rlhf":
            return SafeRlhf(eos=str(self.tokenizer.eos_token))
        return {"alpaca": Alpaca(), "tldr": Plain()}.get(self.style, DIALOGUE)

    @cached_property
    def _markers(self) -> Sequence[str]:
        return [*self.format.markers, *self.special]

    def _rendered(self, messages: Sequence[Message]) -> str:
        spoken: list[Any] = list(messages)
        return cast(str, self.tokenizer.apply_chat_template(spoken, tokenize=False, add_generation_prompt=True))

    def fault(self, prompt: Prompt, responses: Sequence[str]) -> str:
        """Why a row cannot be told from another once it is written, "" if it can.

        A text that holds what stands between turns, or a token of a meaning of its own, would be read as something that
        nobody said: a turn, or an end.
        """
        requests = [message["content"] for message in prompt.messages]
        if marker := held(self._markers, requests):
            return f"a prompt that holds {marker!r}, which the template {self.style} writes itself"
        if marker := held(self.special, responses):
            return f"a response that holds {marker!r}, which the tokenizer reads as more than its letters"
        return ""

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """The conversation up to the point where the response begins."""
        # a chat template writes its own BOS; the others take that of tokenizers that have one
        tokens = self.tokenizer(self._written(prompt.spoken), add_special_tokens=self.style != "chat").input_ids
        return tokens[:-1] if self.style != "chat" and tokens[-1] == self.eos else tokens

    def prompts_tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """`prompt_tokens` of each, many at once, which is several times as fast."""
        if not prompts:
            return []
        written = [self._written(prompt.spoken) for prompt in prompts]
        many = self._tokens_of(written, add_special_tokens=self.style != "chat")
        return [each[:-1] if self.style != "chat" and each[-1] == self.eos else each for each in many]

    def responses_tokens(self, responses: Sequence[str]) -> list[list[int]]:
        """`response_tokens` of each, of responses that ended, many at once."""
        spoken = [self._spoken(response) for response in responses]
        return [[*each, self.eos] for each in self._tokens_of(spoken, add_special_tokens=False)] if spoken else []

    def _tokens_of(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return cast(list[list[int]], self.tokenizer(list(texts), add_special_tokens=add_special_tokens).input_ids)
        # what the tokenizer sets itself before each call; it then builds offsets and masks, which take the most time
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [each.ids for each in encoded]

    def said_before(self, prompt: Prompt) -> list[bool]:
        """Which of `prompt_tokens` the assistant said in earlier turns, with the EOS where one follows.

        Raises:
            ValueError: the template writes an earlier turn otherwise than as a response (without its thoughts, say),
                so a policy would learn there what it never has to say.
        """
        messages = prompt.spoken
        text = self._written(messages)
        spans: list[tuple[int, int]] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, content = self._written(messages[:turn]), message["content"].strip()
            start = text.find(content, len(before))
            if not text.startswith(before) or start < 0 or text[len(before) : start].strip():
                raise ValueError(
                    f"the template {self.style} writes turn {turn} of a conversation otherwise than as a response, so "
                    "only the last can be learnt from; use stage.turns=last"
                )
            spans.append((start, start + len(content)))
        encoded = self.tokenizer(text, add_special_tokens=self.style != "chat", return_offsets_mapping=True)
        said = [any(begin < e and b < end for b, e in spans) for begin, end in encoded["offset_mapping"]]
        tokens = self.prompt_tokens(prompt)
        return [
            mine or (k > 0 and said[k - 1] and token == self.eos)
            for k, (mine, token) in enumerate(zip(said[: len(tokens)], tokens, strict=True))
        ]

    def _written(self, messages: tuple[Message, ...]) -> str:
        """The conversation as text, up to the point where the response begins."""
        return self.format.write(messages)

    def _spoken(self, response: str) -> str:
        """A response as it follows the prompt; after a `TL;DR:` comes a space."""
        return f" {response}" if self.style == "tldr" and response and not response[0].isspace() else response

    def response_tokens(self, response: str, *, finished: bool = True) -> list[int]:
        """The response; its EOS unless it was cut before it ended."""
        return [
            *self.tokenizer(self._spoken(response), add_special_tokens=False).input_ids,
            *([self.eos] if finished else []),
        ]

    def unknown(self, text: str) -> list[str]:
        """The words of a text that the tokenizer can only write as its unknown token."""
        unk = self.tokenizer.unk_token_id
        words = dict.fromkeys(text.split())
        return [word for word in words if unk in self.tokenizer(word, add_special_tokens=False).input_ids]

    def text(self, tokens: list[int]) -> str:
        """What a person reads of response tokens."""
        return self.texts([tokens])[0]

    def texts(self, rows: Sequence[list[int]]) -> list[str]:
        """`text` of each."""
        return [text.strip() for text in self.raw_texts(rows)]

    def raw_texts(self, rows: Sequence[list[int]]) -> list[str]:
        """What the tokens of each row spell, with the space around it."""
        return cast(list[str], self.tokenizer.batch_decode(list(rows), skip_special_tokens=True)) if rows else []

    def writes_like(self, other: "Template") -> bool:
        """Whether both turn the same conversation into the same tokens."""
        mine, theirs = self.tokenizer, other.tokenizer
        return (
            self.style == other.style
            and type(mine) is type(theirs)
            and mine.chat_template == theirs.chat_template
            and mine.get_vocab() == theirs.get_vocab()
            # merges, normalisation and BOS are settings of the tokenizer's own; see them at work
            and self.prompt_tokens(_PROBE) == other.prompt_tokens(_PROBE)
            and self.response_tokens(_PROBE.request) == other.response_tokens(_PROBE.request)
        )
