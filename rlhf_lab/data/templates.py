"""How a conversation becomes tokens: the prompt up to where the model speaks, and the response with its EOS."""

from typing import TYPE_CHECKING, Any, Literal, cast

from rlhf_lab.records import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style = Literal["auto", "chat", "dialogue", "safe_rlhf"]

_PROBE = Prompt.from_text("How do I bake 1,024 crêpes (in  Paris)?\nIt's for the children's party: flour, milk, salt …")


def _dialogue(messages: tuple[Message, ...]) -> str:
    turns = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages)
    return f"{turns}Assistant:"


def _safe_rlhf(messages: tuple[Message, ...], eos: str) -> str:
    """Source: the fixed template of the Safe RLHF release, for models that were trained with it."""
    if unknown := sorted({message["role"] for message in messages} - {"user", "assistant"}):
        raise ValueError(
            f"dataset.template=safe_rlhf knows the roles user and assistant, found {unknown[0]}; "
            "use dataset.template=dialogue"
        )
    turns = (f"USER: {m['content']} ASSISTANT:" if m["role"] == "user" else m["content"] + eos for m in messages)
    return "BEGINNING OF CONVERSATION: " + "".join(turns)


class Template:
    """A tokenizer and the way it writes conversations.

    Args:
        style: "chat", the tokenizer's own chat template; "dialogue", plain `User: … Assistant:` turns; "safe_rlhf";
            "auto": chat if the tokenizer has a template, else dialogue. `self.style` says which it became.

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

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """The conversation up to the point where the response begins."""
        if self.style == "chat":
            messages: list[Any] = list(prompt.spoken)
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(cast(str, text), add_special_tokens=False).input_ids
        dialogue = self.style == "dialogue"
        eos = str(self.tokenizer.eos_token)
        written = _dialogue(prompt.spoken) if dialogue else _safe_rlhf(prompt.spoken, eos)
        tokens = self.tokenizer(written).input_ids  # with the BOS of tokenizers that have one
        return tokens[:-1] if tokens[-1] == self.eos else tokens

    def response_tokens(self, response: str, *, finished: bool = True) -> list[int]:
        """The response; its EOS unless it was cut before it ended."""
        return [*self.tokenizer(response, add_special_tokens=False).input_ids, *([self.eos] if finished else [])]

    def text(self, tokens: list[int]) -> str:
        """What a person reads of response tokens."""
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

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
