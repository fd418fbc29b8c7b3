"""Model x batch -> Forward: log-probabilities, values and scores at the positions that count; logits never leave."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_lab.engine.backbone import AdapterView
from rlhf_lab.engine.critics import Critics
from rlhf_lab.engine.last_layer import reading, reads_apart, rows_read
from rlhf_lab.engine.limits import Limits, limits_of
from rlhf_lab.engine.prefixes import Read, Reads, plant, shares_prefixes
from rlhf_lab.types import PairForward, PolicyForward, Processing, QuadrupleForward, ScoreForward, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# entries of a float32 slice of logits: 64 MiB, of which one is alive at a time
LOGITS_AT_ONCE = 2**24
# entries of the mask under which the last layer is read apart; above them it costs more memory than it saves time
MASK_AT_MOST = 2**24
UNPROCESSED = Processing()


@dataclass(frozen=True)
class _Layout:
    """How the rows of a batch are laid before a model, and where its states are then found, all rows end to end."""

    inputs: dict[str, Any]
    before: Tensor  # (N,) of the token before each of the N response tokens, row by row
    responses: Tensor  # (N,) of the response tokens themselves
    ends: Tensor  # (B,) of the last real token of each row
    reads: Reads | None = None  # of those that were asked for, for the last layer alone


def _lay_out(model: "PreTrainedModel", sequences: Sequences, read: Read | None = None) -> _Layout:
    """One copy of each prompt if the model shares prefixes, else rows side by side without columns of padding alone.

    Args:
        read: what the last layer will be read at, if it is computed there alone.
    """
    counted = sequences.response_mask
    if shares_prefixes(model):
        tree = plant(sequences, model.dtype, read)
        asked_at = tree.asked_at[counted] if read == "before" else tree.asked_at[:, 0]
        reads = Reads(tree.asked, asked_at) if tree.asked else None
        return _Layout(tree.inputs(model.dtype), tree.before[counted], tree.responses[counted], tree.ends, reads)
    used = sequences.attention_mask.any(0).nonzero()
    first, last = int(used[0]), int(used[-1]) + 1
    mask = sequences.attention_mask[:, first:last]
    inputs = {
        "input_ids": sequences.tokens[:, first:last],
        "attention_mask": mask,
        "position_ids": sequences.position_ids[:, first:last],
    }
    rows, width = mask.shape
    starts = torch.arange(rows, device=mask.device) * width
    row, column = counted.nonzero(as_tuple=True)
    prompts = sequences.prompt_width - first
    responses = starts[row] + prompts + column
    last_ones = width - 1 - mask.flip(1).int().argmax(1)
    reads = None
    if read == "before" and prompts and rows * (width - prompts) * width <= MASK_AT_MOST:
        columns = torch.arange(prompts - 1, width - 1, device=mask.device)
        reads = rows_read(mask, columns[None], counted[:, : len(columns)], model.dtype)
    elif read == "ends":
        reads = rows_read(mask, last_ones[:, None], mask.new_ones(rows, 1), model.dtype)
    return _Layout(inputs, responses - 1, responses, starts + last_ones, reads)


def _states(trunk: Any, layout: _Layout) -> Tensor:
    """(tokens, D): what the heads read."""
    return trunk(**layout.inputs, use_cache=False).last_hidden_state.flatten(0, 1)


def _states_at(model: Any, trunk: Any, sequences: Sequences, read: Read) -> Tensor:
    """(N, D) states before each response token, row by row, or (B, D) at the end of each row."""
    layout = _lay_out(model, sequences, read if reads_apart(model, trunk) else None)
    if layout.reads is None:
        return _states(trunk, layout).index_select(0, layout.before if read == "before" else layout.ends)
    with reading(trunk, layout.reads):
        return _states(trunk, layout)


def _widen(x: Tensor, mask: Tensor) -> Tensor:
    """(N,) of the places where the mask is True -> (B, T), 0 elsewhere."""
    return x.new_zeros(mask.shape).masked_scatter(mask, x)


def token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float, *, entropies: bool = True, limits: Limits | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` and entropies of their distributions, in float32, a slice of rows at a time.

    Args:
        logits: (B, …, V) in any precision; divided by the temperature in float32, as in sampling.
        tokens: (B, …) int64.
        entropies: whether somebody reads them, which takes as long as all else here; without, they are 0.
        limits: of (N, V) logits before (N,) tokens: what sampling did to them before the temperature.

    Returns:
        (B, …) each, in nats; the entropy carries no gradient.
    """
    rows = max(1, LOGITS_AT_ONCE // max(1, logits[:1].numel()))
    cut = logits.split(rows)
    limited = [None] * len(cut) if limits is None else limits.split(rows)
    chosen, spread = [], []
    for part, picked, within in zip(cut, tokens.split(rows), limited, strict=True):
        full = part.float() if within is None else within(part.float())
        logprobs = (full / temperature).log_softmax(-1)
        chosen.append(logprobs.gather(-1, picked[..., None])[..., 0])
        with torch.no_grad():
            if within is not None:  # 0 log 0 is 0, not 0 * -inf
                logprobs = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
            spread.append(-(logprobs.exp() * logprobs).sum(-1) if entropies else torch.zeros_like(chosen[-1]))
    return torch.cat(chosen), torch.cat(spread)


def head_logprobs(
    head: Any,
    states: Tensor,
    tokens: Tensor,
    temperature: float,
    *,
    entropies: bool = True,
    limits: Limits | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and, if asked for, entropies of `tokens` (N,) after `states` (N, D), (N,) each.

    Logits above `LOGITS_AT_ONCE` entries are made piece by piece, and once more in the backward pass: autograd keeps
    states, never logits.
    """

    def piece(states: Tensor, tokens: Tensor, limits: Limits | None) -> tuple[Tensor, Tensor]:
        return token_logprobs(head(states), tokens, temperature, entropies=entropies, limits=limits)

    rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(states) <= rows:
        return piece(states, tokens, limits)
    keeps = not torch.is_grad_enabled()
    cut = states.split(rows)
    limited = [None] * len(cut) if limits is None else limits.split(rows)
    said = [
        piece(*part) if keeps else cast("tuple[Tensor, Tensor]", checkpoint(piece, *part, use_reentrant=False))
        for part in zip(cut, tokens.split(rows), limited, strict=True)
    ]
    return torch.cat([logprobs for logprobs, _ in said]), torch.cat([entropy for _, entropy in said])


_plain: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


@torch.no_grad()
def has_plain_head(model: "PreTrainedModel") -> bool:
    """Whether the logits are the output embeddings of the states and nothing more, such as a cap or a scale.

    Found by comparing them, to the bit, on the first call.
    """
    if model not in _plain:
        tokens = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
        head = model.get_output_embeddings()
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        states = model.base_model(**inputs).last_hidden_state
        _plain[model] = head is not None and torch.equal(head(states), model(**inputs).logits)
    return _plain[model]


def policy_forward(
    model: "PreTrainedModel",
    sequences: Sequences,
    *,
    processing: Processing = UNPROCESSED,
    critics: Critics | None = None,
) -> PolicyForward:
    """Log-probability and entropy of each response token under `model`, processed so, and each critic's value.

    Critics on the model's own trunk read the states of the same pass.

    Raises:
        ValueError: top k or top p restricted what was drawn, and the sequences do not say to what.
    """
    return _said(model, sequences, processing, critics, entropies=True)


def policy_logprobs(model: "PreTrainedModel", sequences: Sequences, *, processing: Processing = UNPROCESSED) -> Tensor:
    """(B, T) log-probabilities of the response tokens alone, 0 where masked."""
    return _said(model, sequences, processing, None, entropies=False).logprobs


def _said(
    model: "PreTrainedModel", sequences: Sequences, processing: Processing, critics: Critics | None, *, entropies: bool
) -> PolicyForward:
    mask = sequences.response_mask
    limits, temperature = limits_of(processing, sequences), processing.temperature
    tokens = sequences.tokens[:, sequences.prompt_width :][mask]
    values: dict[str, Tensor] = {}
    if has_plain_head(model):
        states = _states_at(model, model.base_model, sequences, "before")
        logprobs, entropy = head_logprobs(
            model.get_output_embeddings(), states, tokens, temperature, entropies=entropies, limits=limits
        )
        if critics is not None and critics.shares_trunk:
            values = _values(critics, states, mask)
    else:
        layout = _lay_out(model, sequences)
        logits = model(**layout.inputs, use_cache=False).logits.flatten(0, 1)
        before = logits.index_select(0, layout.before)
        logprobs, entropy = token_logprobs(before, tokens, temperature, entropies=entropies, limits=limits)
    if critics is not None and not values:
        values = critic_values(critics, sequences)
    return PolicyForward(_widen(logprobs, mask), _widen(entropy, mask), values)


def critic_values(critics: Critics, sequences: Sequences) -> dict[str, Tensor]:
    """critic -> (B, T): the value of the state before each response token."""
    trunk: Any = critics.trunk
    inner = trunk.base_model if isinstance(trunk, AdapterView) else trunk
    return _values(critics, _states_at(trunk, inner, sequences, "before"), sequences.response_mask)


def _values(critics: Critics, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
    values = critics.heads(states).float()  # (N, K)
    return {name: _widen(values[:, k], mask) for k, name in enumerate(critics.names)}


def _read(model: "PreTrainedModel", sequences: Sequences, token_scores: bool) -> tuple[Tensor, Tensor]:
    """(B, D) outputs at the last real token of each row, found from the mask and never from pad ids; (B, T) scores."""
    head = model.get_submodule("score")
    if not token_scores:
        ends = head(_states_at(model, model.base_model, sequences, "ends")).float()
        return ends, ends[:, :0]
    layout = _lay_out(model, sequences)
    states = _states(model.base_model, layout)
    ends = head(states.index_select(0, layout.ends)).float()
    scores = head(states.index_select(0, layout.responses)).float()[:, 0]
    return ends, _widen(scores, sequences.response_mask)


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
