"""The data that flows. Row i is row i in every field of every type, from the prompt to the last table.

    PromptBatch -generate-> Rollout -score-> ScoredRollout -prepare-> Experience -forward, loss-> [Term] -learner->
    record -tokenise-> TextBatch | PairBatch | SafetyPairBatch ------(offline: straight to forward, loss)-->

Shapes: B rows, P prompt positions (padded left), T response positions (padded right), M ensemble members.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from rlhf_lab.records import Prompt

Fraction = Annotated[float, Interval(ge=0, le=1)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Gt(0)]
NonNegativeCount = Annotated[int, Ge(0)]

Metrics = dict[str, float]

GAUSSIAN = ("mean", "log_variance")  # outputs of a value model that says how sure it is, by the names it is saved with


def _map(value: Any, change: Any) -> Any:
    """Apply `change` to every row-wise leaf (tensor or list) of a nested batch."""
    if isinstance(value, Batch):
        return value.map(change)
    if isinstance(value, tuple):
        return tuple(_map(entry, change) for entry in value)
    if isinstance(value, Mapping):
        return {key: _map(entry, change) for key, entry in value.items()}
    if isinstance(value, Processing):  # of all rows alike
        return value
    return change(value)


@dataclass(frozen=True, kw_only=True)
class Processing:
    """How a model's logits become the distribution that tokens are drawn from, and that they are scored under.

    Repetition penalty and least length follow from the tokens before, for any model. What top k and top p leave depends
    on the policy that sampled, so its rollout says what that was (`Kept`), and all models speak of these tokens alone.
    """

    temperature: float = 1.0
    repetition_penalty: float = 1.0  # of tokens of the prompt and of the response so far
    min_new_tokens: int = 0  # none of the `stops` can be drawn before
    stops: tuple[int, ...] = ()
    restricted: bool = False  # by top k or top p, and `Sequences.kept` says to what


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A frozen record of columns that share their first dimension."""

    def map(self, change: Any) -> Self:
        """The same record with `change` applied to every tensor and every list of it, nested batches included."""
        return type(self)(**{field.name: _map(getattr(self, field.name), change) for field in fields(self)})

    def select(self, index: Tensor) -> Self:
        """The rows `index` (int64), in that order."""
        rows = index.tolist()
        return self.map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else [leaf[row] for row in rows])

    def to(self, device: torch.device) -> Self:
        """The same record with every tensor on `device`."""
        return self.map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


@dataclass(frozen=True, kw_only=True)
class Kept(Batch):
    """The tokens among which each response token was drawn: what top k and top p left of the vocabulary.

    Memory: 4 bytes for each token that was left, on the CPU until they are read; 512 x 512 response tokens drawn from
    50 each take 52 MB (a bit for each of 128k tokens would be 4.3 GB). At worst, a flat distribution at a top_p near 1,
    4 V bytes a response token.

    Source: the same set for the policy that samples and the one that learns, "keep sampling mask" of DeepSeek-V3.2,
    arXiv:2512.02556.
    """

    sizes: Tensor  # (B, T) int64: how many; 0 where masked
    ids: list[Tensor]  # int32, those of a row: of its first response token, then of its second, …


@dataclass(frozen=True, kw_only=True)
class Sequences(Batch):
    """Prompts padded left to P and responses padded right to T, side by side.

    Masks and positions are made once, where the tokens are made, and never inferred from pad ids:
    a tokenizer whose pad token is its EOS loses nothing.
    """

    tokens: Tensor  # (B, P + T) int64
    attention_mask: Tensor  # (B, P + T) bool, True on real tokens
    position_ids: Tensor  # (B, P + T) int64, 0 at the first real token of a row
    response_mask: Tensor  # (B, T) bool, True on response tokens, the EOS included
    kept: tuple[Kept, ...] = ()  # one, of responses that were drawn with top k or top p

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt_width(self) -> int:
        """P, the first response column."""
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: real tokens of each row."""
        return self.attention_mask.sum(1)


@dataclass(frozen=True, kw_only=True)
class PromptBatch(Batch):
    """Prompts, tokenised and padded left."""

    prompts: list[Prompt]  # as the data set holds them, for scorers that read another tokenizer or template
    tokens: Tensor  # (B, P) int64
    attention_mask: Tensor  # (B, P) bool

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class Rollout(Batch):
    """Responses sampled from a policy.

    Example: two prompts, two samples each, T = 3, the third response cut at the length limit:
        group         = [0, 0, 1, 1]
        response_mask = [[1,1,0], [1,1,1], [1,1,1], [1,0,0]]
        finished      = [True, True, False, True]
    """

    prompts: list[Prompt]  # repeated: row i is the prompt that response i answers
    sequences: Sequences
    group: Tensor  # (B,) int64; rows with one value answer one prompt
    finished: Tensor  # (B,) bool, False if cut at the length limit
    responses: list[str]  # decoded, without special tokens
    logprobs: Tensor  # (B, T) of the sampled tokens, under the distribution they were sampled from; 0 where masked
    processing: Processing = Processing()  # which distribution of a model's that is
    # (B, T), one, from an engine that is not the policy: `logprobs`, which are then the policy's, less the engine's
    log_ratio: tuple[Tensor, ...] = ()
    # critic -> (B, T), of the states that the tokens were drawn from; from an engine that reads them on its way
    values: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.responses)


@dataclass(frozen=True, kw_only=True)
class Score(Batch):
    """What one source says of a rollout, raw and in its own units; an ensemble keeps what its members said."""

    value: Tensor  # (B,)
    members: Tensor  # (B, M); M = 1 for a source that is not an ensemble
    variances: tuple[Tensor, ...] = ()  # (B, M), one: each member's own, if its members say how sure they are


@dataclass(frozen=True, kw_only=True)
class ScoredRollout(Batch):
    """A rollout with everything that was measured on it before any learning."""

    rollout: Rollout
    scores: dict[str, Score]
    ref_logprobs: Tensor  # (B, T) of the sampled tokens under the reference, processed as in sampling; 0 where masked
    values: dict[str, Tensor]  # critic -> (B, T), at the state before each response token; 0 where masked

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def columns(self) -> dict[str, Tensor]:
        """source -> (B,) its scores."""
        return {name: score.value for name, score in self.scores.items()}

    @property
    def logprobs(self) -> Tensor:
        return self.rollout.logprobs

    @property
    def response_mask(self) -> Tensor:
        return self.rollout.sequences.response_mask


@dataclass(frozen=True, kw_only=True)
class Experience(Batch):
    """A scored rollout with what the policy is to learn from it."""

    scored: ScoredRollout
    advantages: Tensor  # (B, T), 0 where masked
    returns: dict[str, Tensor]  # critic -> (B, T), its regression target; 0 where masked

    def __len__(self) -> int:
        return len(self.scored)

    @property
    def token_mask(self) -> Tensor:
        return self.scored.response_mask

    @property
    def lengths(self) -> Tensor:
        return self.scored.rollout.sequences.lengths


@dataclass(frozen=True, kw_only=True)
class TextBatch(Batch):
    """Responses to imitate."""

    sequences: Sequences

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def texts(self) -> tuple[Sequences, ...]:
        return (self.sequences,)

    @property
    def token_mask(self) -> Tensor:
        return self.sequences.response_mask

    @property
    def lengths(self) -> Tensor:
        return self.sequences.lengths


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """Two responses a row, the first preferred."""

    chosen: Sequences
    rejected: Sequences
    margin: Tensor  # (B,) by how much, in the units of the data; 0 when they do not say
    reference: tuple[
        Tensor, ...
    ] = ()  # (B,) log-probability of each response under the reference, if a method reads it
    gaps: dict[str, Tensor] = field(default_factory=dict)  # score -> (B,) that of the preferred less that of the other

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def texts(self) -> tuple[Sequences, ...]:
        return self.chosen, self.rejected

    @property
    def lengths(self) -> Tensor:
        return self.chosen.lengths + self.rejected.lengths

    def beside(self, reference: tuple[Tensor, ...]) -> Self:
        """The same pairs with (B,) log-probabilities of each text under the reference."""
        return replace(self, reference=reference)


@dataclass(frozen=True, kw_only=True)
class QuadrupleBatch(Batch):
    """Two pairs a row, of which the first is the stronger preference."""

    strong: PairBatch
    weak: PairBatch

    def __len__(self) -> int:
        return len(self.strong)

    @property
    def texts(self) -> tuple[Sequences, ...]:
        return *self.strong.texts, *self.weak.texts

    @property
    def lengths(self) -> Tensor:
        return self.strong.lengths + self.weak.lengths

    def beside(self, reference: tuple[Tensor, ...]) -> Self:
        """The same pairs with (B,) log-probabilities of each text under the reference."""
        return replace(self, strong=self.strong.beside(reference[:2]), weak=self.weak.beside(reference[2:]))


@dataclass(frozen=True, kw_only=True)
class RankingBatch(Batch):
    """K responses a row, the best first; a row that has fewer is filled up with rows that are not there."""

    responses: tuple[Sequences, ...]  # K, each (B, ...)
    present: Tensor  # (B, K) bool

    def __len__(self) -> int:
        return len(self.present)

    @property
    def texts(self) -> tuple[Sequences, ...]:
        return self.responses

    @property
    def lengths(self) -> Tensor:
        return torch.stack([text.lengths for text in self.responses]).sum(0)


@dataclass(frozen=True, kw_only=True)
class SafetyPairBatch(Batch):
    """Two responses a row, the first safer, each with its own verdict: +1 unsafe, -1 safe."""

    safer: Sequences
    unsafer: Sequences
    safer_sign: Tensor  # (B,) float
    unsafer_sign: Tensor  # (B,) float

    def __len__(self) -> int:
        return len(self.safer)

    @property
    def texts(self) -> tuple[Sequences, ...]:
        return self.safer, self.unsafer

    @property
    def lengths(self) -> Tensor:
        return self.safer.lengths + self.unsafer.lengths


@dataclass(frozen=True)
class PolicyForward:
    """What a policy (and its critics) says of a batch of sequences; carries gradient, never logits."""

    logprobs: Tensor  # (B, T) of the response tokens; 0 where masked
    entropy: Tensor  # (B, T) nats, without gradient; 0 where masked
    values: dict[str, Tensor]  # critic -> (B, T); 0 where masked

    @property
    def sequence_logprobs(self) -> Tensor:
        """(B,): log-probability of each whole response."""
        return self.logprobs.sum(1)


@dataclass(frozen=True)
class PairForward:
    """What a policy says of the two responses of each row; carries gradient."""

    chosen: PolicyForward
    rejected: PolicyForward

    def log_ratios(self, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(B,) each: log pi(y|x) - log pi_ref(y|x) of the chosen and of the rejected response."""
        return self.chosen.sequence_logprobs - reference[0], self.rejected.sequence_logprobs - reference[1]


@dataclass(frozen=True)
class QuadrupleForward:
    """What a policy says of the two pairs of each row; carries gradient."""

    strong: PairForward
    weak: PairForward


@dataclass(frozen=True)
class ScoreForward:
    """What a value model says of the responses of each row, raw and before any normalisation; carries gradient."""

    scores: tuple[Tensor, ...]  # (B,) of each response
    token_scores: tuple[Tensor, ...] = ()  # (B, T) of each, after every token of it, if a method reads them
    log_variances: tuple[Tensor, ...] = ()  # (B,) of each, of a model that says how sure it is

    @property
    def first(self) -> Tensor:
        return self.scores[0]

    @property
    def second(self) -> Tensor:
        return self.scores[1]


@dataclass(frozen=True)
class Term:
    """One summand of a loss, not yet averaged: only the Learner knows the minibatch and divides."""

    name: str
    values: Tensor  # (B, T) if per token, (B,) if per row
    per: Literal["token", "row"]
    weight: float = 1.0  # 0: reported, not minimised

    def per_row(self, share: Tensor | int = 1) -> "Term":
        """A token's summand, 0 where masked, as a row's: its sum over the row, divided by the (B,) `share`."""
        return Term(self.name, self.values.sum(1) / share, "row", self.weight)


def batches(size: int, batch_size: int) -> Iterator[slice]:
    """Consecutive slices of at most `batch_size` that cover `size` rows; the last may be shorter, none is dropped."""
    for start in range(0, size, batch_size):
        yield slice(start, min(start + batch_size, size))
