"""Model x batch -> Forward: log-probabilities, values and scores at the positions that count; logits never leave."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lab.engine.models import Critics
from rlhf_lab.types import PairForward, PolicyForward, QuadrupleForward, ScoreForward, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# entries of a float32 slice of logits: 64 MiB; without gradient one is alive at a time, with it autograd keeps them all
LOGITS_AT_ONCE = 2**24


def _inputs(sequences: Sequences) -> tuple[dict[str, Tensor], slice]:
    """Model inputs without the columns that are padding in every row, and which of the T response columns are left."""
    used = sequences.attention_mask.any(0).nonzero()
    first, last = int(used[0]), int(used[-1]) + 1
    inputs = {
        "input_ids": sequences.tokens[:, first:last],
        "attention_mask": sequences.attention_mask[:, first:last],
        "position_ids": sequences.position_ids[:, first:last],
    }
    return inputs, slice(0, last - sequences.prompt_width)


def _widen(x: Tensor, mask: Tensor, width: int) -> Tensor:
    """(B, T') -> (B, T), 0 where masked."""
    padded = x.new_zeros(len(x), width)
    padded[:, : x.shape[1]] = x.where(mask, 0)
    return padded


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` and entropies of their distributions, in float32, a slice of rows at a time.

    Args:
        logits: (B, T, V) in any precision; divided by the temperature in float32, as in sampling.
        tokens: (B, T) int64.

    Returns:
        (B, T) each, in nats; the entropy carries no gradient.
    """
    rows = max(1, LOGITS_AT_ONCE // max(1, logits[0].numel()))
    chosen, entropies = [], []
    for part, picked in zip(logits.split(rows), tokens.split(rows), strict=True):
        logprobs = (part.float() / temperature).log_softmax(-1)
        chosen.append(logprobs.gather(-1, picked[..., None])[..., 0])
        with torch.no_grad():
            entropies.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(chosen), torch.cat(entropies)


def policy_forward(
    model: "PreTrainedModel", sequences: Sequences, *, temperature: float = 1.0, critics: Critics | None = None
) -> PolicyForward:
    """Log-probability and entropy of each response token under `model` at `temperature`, and each critic's value."""
    inputs, columns = _inputs(sequences)
    mask = sequences.response_mask[:, columns]
    width = sequences.response_mask.shape[1]
    tokens = sequences.tokens[:, sequences.prompt_width :][:, columns]
    logits = model(**inputs, use_cache=False, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]
    logprobs, entropy = token_logprobs(logits, tokens, temperature)
    values = {} if critics is None else critic_values(critics, sequences)
    return PolicyForward(_widen(logprobs, mask, width), _widen(entropy, mask, width), values)


def critic_values(critics: Critics, sequences: Sequences) -> dict[str, Tensor]:
    """critic -> (B, T): the value of the state before each response token."""
    inputs, columns = _inputs(sequences)
    mask = sequences.response_mask[:, columns]
    hidden = critics.trunk(**inputs, use_cache=False).last_hidden_state[:, -mask.shape[1] - 1 : -1]
    values = critics.heads(hidden).float()  # (B, T', K)
    width = sequences.response_mask.shape[1]
    return {name: _widen(values[..., k], mask, width) for k, name in enumerate(critics.names)}


def _read(model: "PreTrainedModel", sequences: Sequences, token_scores: bool) -> tuple[Tensor, Tensor]:
    """(B, D) outputs at the last real token of each row, found from the mask and never from pad ids; (B, T) scores."""
    inputs, columns = _inputs(sequences)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    head = model.get_submodule("score")
    ends = head(hidden[torch.arange(len(hidden)), last]).float()
    if not token_scores:
        return ends, ends[:, :0]
    response_mask = sequences.response_mask[:, columns]
    scores = head(hidden[:, hidden.shape[1] - response_mask.shape[1] :]).float()[..., 0]
    return ends, _widen(scores, response_mask, sequences.response_mask.shape[1])


def raw_outputs(model: "PreTrainedModel", sequences: Sequences) -> Tensor:
    """(B, D): what a value model says after the last real token of each row; the first output is the score."""
    return _read(model, sequences, False)[0]


def raw_scores(model: "PreTrainedModel", sequences: Sequences) -> Tensor:
    """(B,): a value model's raw score of each row."""
    return raw_outputs(model, sequences)[:, 0]


def text_scores(model: "PreTrainedModel", texts: tuple[Sequences, ...], *, token_scores: bool = False) -> ScoreForward:
    """A value model's raw outputs for each response of each row, and its scores after each token if asked for."""
    said = [_read(model, text, token_scores) for text in texts]
    return ScoreForward(
        scores=tuple(ends[:, 0] for ends, _ in said),
        token_scores=tuple(scores for _, scores in said) if token_scores else (),
        log_variances=tuple(ends[:, 1] for ends, _ in said) if said[0][0].shape[1] > 1 else (),
    )


def text_logprobs(
    model: "PreTrainedModel", texts: tuple[Sequences, ...]
) -> PolicyForward | PairForward | QuadrupleForward:
    """What a policy says of the response, or of the two or four responses, of each row."""
    said = [policy_forward(model, text) for text in texts]
    if len(said) == 1:
        return said[0]
    if len(said) == 2:
        return PairForward(*said)
    return QuadrupleForward(PairForward(*said[:2]), PairForward(*said[2:]))
