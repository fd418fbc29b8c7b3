"""The tokenizer of a model, and the words that it is given beside its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import transformers

from rlhf_lab.engine.tiny import is_embedded, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str, new_tokens: Sequence[str] = ()) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model; one without a pad token pads with its EOS, which masks make harmless.

    Args:
        new_tokens: are added, as plain words that decoding shows, where they are not there yet.

    Raises:
        ValueError: it has no EOS token, so no response could end.
    """
    tokenizer = (
        tiny_tokenizer()
        if is_embedded(path)
        else transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    )
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {path} has no EOS token; a response could never end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens([transformers.AddedToken(token, normalized=False) for token in new_tokens])
    return tokenizer


def new_token_ids(tokenizer: "PreTrainedTokenizerBase", new_tokens: Sequence[str]) -> dict[str, int]:
    """token -> its id in the policy's tokenizer, by which every model of a run finds its row.

    Tokens that the policy was given in an earlier run are among them: a reference from before that lacks them too.
    """
    vocabulary, added = tokenizer.get_vocab(), cast(Any, tokenizer).get_added_vocab()
    return {token: vocabulary[token] for token in dict.fromkeys([*added, *new_tokens])}
