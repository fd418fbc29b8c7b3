"""When two prompts or rows are the same: letter for letter, or but for case and white space."""

import hashlib
from typing import Literal

from rlhf_lab.records import Prompt

Same = Literal["exact", "normalised"]


def plain(text: str) -> str:
    """The text without what a copyist changes: case, and how much white space there is."""
    return " ".join(text.casefold().split())


def prompt_key(prompt: Prompt, same: Same) -> str:
    """Equal for prompts that are the same; the id of the prompt if they are to be so letter for letter."""
    if same == "exact":
        return prompt.id
    said = [{"role": m["role"], "content": plain(m["content"])} for m in prompt.messages]
    return Prompt.from_messages([{"role": m["role"], "content": m["content"]} for m in said]).id


def digest(prompt: Prompt, texts: tuple[str, ...], same: Same) -> bytes:
    """16 bytes that stand for a row: a set of them takes little memory, whatever the rows hold."""
    spoken = texts if same == "exact" else tuple(map(plain, texts))
    parts = "\x1d".join((prompt_key(prompt, same), prompt.condition, *spoken))
    return hashlib.blake2b(parts.encode("utf-8", "surrogatepass"), digest_size=16).digest()
