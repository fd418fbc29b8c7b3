"""Secrets stay in the environment: how to know one, and what is written in its place."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

PLACE = "[a secret, left out]"
SHORTEST = 8  # characters; what is shorter would hide ordinary words
_WORDS = {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"}
# keys as their issuers spell them: OpenAI and Anthropic, Hugging Face, GitHub, Slack, AWS, Google
_SPELLINGS = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,})"
)

_RANDOM = re.compile(r"(?=.*\d)[\w.+/=-]{16,}")
_ASSIGNED = re.compile(r"\b(\w+)=[\"']?([\w+=-][\w.+/=-]+)")  # as in a line of shell; a path is no secret


def secrets(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """name -> value of the environment variables that hold secrets, by their names; a path is none."""
    return {
        name: value
        for name, value in environment.items()
        if _is_secret_name(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", "."))
    }


def redact(text: str) -> str:
    """The text with every secret of the environment, and whatever is spelled like one, left out."""
    for value in sorted(secrets().values(), key=len, reverse=True):  # one may be part of another
        text = text.replace(value, PLACE)
    return _SPELLINGS.sub(PLACE, text)


def refuse_secrets(config: Mapping[str, Any], what: str) -> None:
    """Refuse a configuration that holds a secret, wherever it came from, before any of it is written.

    Raises:
        ValueError: naming the key, and not the secret.
    """
    for key, value in _leaves(config, ""):
        named = [(key, value), *_ASSIGNED.findall(value)]
        if redact(value) != value or any(
            _words(name)[-1] in _WORDS and _RANDOM.fullmatch(said) for name, said in named
        ):
            raise ValueError(
                f"{key} of the {what} holds a secret, which would be written into the run directory; take it away, and "
                "set the environment variable that the service reads (WANDB_API_KEY, OPENAI_API_KEY, HF_TOKEN, …)"
            )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, path)
    elif isinstance(value, str):
        yield path, value


def _is_secret_name(name: str) -> bool:
    """`WANDB_API_KEY` and `api_key`, but neither `TOKENIZERS_PARALLELISM` nor `max_new_tokens`."""
    return not _WORDS.isdisjoint(_words(name))


def _words(name: str) -> list[str]:
    return re.split(r"[\W_]+", name.upper())
