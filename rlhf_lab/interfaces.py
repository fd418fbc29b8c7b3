"""The protocols that parts meet through. A class satisfies one by having its members; nothing is inherited."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from rlhf_lab.records import Comparison, Prompt, Verdict
from rlhf_lab.types import Experience, Metrics, PromptBatch, Rollout, Score, ScoredRollout, Term


class Stateful(Protocol):
    """A part that changes during a run, and therefore is in the checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class OfflineAlgorithm(Protocol):
    """A method that learns from a data set.

    Hyper-parameters are its fields and mathematics its methods; it has no weights, tokens, device or config.
    """

    trains: ClassVar[str]  # what it makes of a model: policy, scorer
    reads: ClassVar[str]  # which records of a data set it learns from: demonstrations, preferences, …
    # A method may also have `uses_reference: ClassVar[bool]`: its pairs then carry the reference's log-probabilities;
    # `token_scores`: it then reads a score after every token; `outputs: ClassVar[tuple[str, ...]]`, of a value model's
    # head, if that is more than a score; and be `Observant`, if a part of it changes from step to step.

    def loss(self, new: Any, batch: Any) -> Sequence[Term]:
        """The summands of the loss of one microbatch, unaveraged; pure."""
        ...


@runtime_checkable
class Observant(Protocol):
    """An offline method with parts that change during a run."""

    @property
    def stateful(self) -> Mapping[str, Stateful]:
        """These parts, by name."""
        ...

    def observe(self, means: Metrics) -> Metrics:
        """After each optimiser step, with the means of the loss's terms; what it did, as metrics."""
        ...


@runtime_checkable
class Guided(Protocol):
    """A method on quadruples that takes a margin from the weaker pair, as a policy sees it before the step.

    The batch of its loss is then the stronger pairs with that margin.
    """

    @property
    def ema_decay(self) -> float:
        """Of that policy, a moving average of the one that learns; 0 is the latter itself."""
        ...

    def weak_margin(self, said: Any, weak: Any) -> Tensor:
        """(B,), from what that policy says of the weaker pairs; without gradient."""
        ...


class OnlineAlgorithm(Protocol):
    """A method that learns from its own samples."""

    least_samples: ClassVar[int]  # responses per prompt that it needs

    @property
    def objective(self) -> "Objective":
        """What it maximises."""
        ...

    @property
    def critics(self) -> tuple[str, ...]:
        """The value heads that it needs, by name; () for none."""
        ...

    @property
    def streams(self) -> tuple[str, ...]:
        """The scores that it reads, by name: the reward sources that must be there."""
        ...

    @property
    def stateful(self) -> Mapping[str, Stateful]:
        """Its parts that change during a run (multipliers, KL controllers), by name."""
        ...

    def prepare(self, scored: ScoredRollout) -> tuple[Experience, Metrics]:
        """Once per iteration, on the whole batch, without gradient: dual step, rewards, advantages."""
        ...

    def loss(self, new: Any, batch: Experience) -> Sequence[Term]: ...


class Bound(Protocol):
    """How large what is constrained may be, from a sample of costs."""

    least: ClassVar[int]  # costs that it needs to say anything
    assumes: ClassVar[str]  # what its confidence rests on, after "this assumes"

    def check_limit(self, limit: float) -> None:
        """Raises ValueError for a limit that is not in the bound's units."""
        ...

    def upper(self, cost: Tensor) -> float:
        """The bound from (n,) costs.

        Raises:
            ValueError: there are too few, or one is outside the range in which the bound holds.
        """
        ...

    def surrogate(self, cost: Tensor, window: Tensor) -> Tensor:
        """(B,) costs whose score-function gradient is that of the bound; its statistics and n are the (n,) window's."""
        ...

    def describe(self, cost: Tensor, window: Tensor) -> Metrics:
        """What else there is to say of it; `trapped` is the share of costs that it would price the wrong way round."""
        ...


class Dual(Stateful, Protocol):
    """How the price of a constraint answers to its violation."""

    @property
    def multiplier(self) -> float: ...

    @property
    def at_cap(self) -> bool: ...

    def step(self, violation: float) -> None:
        """Adapt to the violation of one iteration: what is bounded minus what is allowed.

        Raises:
            FloatingPointError: the multiplier would not be a number any more.
        """
        ...


class Constraint(Stateful, Protocol):
    """`bound(cost) <= limit`, priced by a multiplier that learns."""

    limit: float

    @property
    def violated_above(self) -> float:
        """A single cost above this counts as a violation, in units of the cost."""
        ...

    def step(self, cost: Tensor) -> Metrics:
        """Dual step on the (B,) costs of one iteration; what it did, under metric names without prefix."""
        ...

    def surrogate(self, cost: Tensor) -> Tensor:
        """(B,) costs to be priced, of the iteration that `step` has seen; see `Bound.surrogate`."""
        ...

    @property
    def multiplier(self) -> float: ...


class KLController(Stateful, Protocol):
    """How the weight of the KL penalty moves during a run."""

    @property
    def factor(self) -> float:
        """What the configured coefficient is multiplied by now."""
        ...

    def step(self, logprobs: Tensor, ref_logprobs: Tensor) -> None:
        """Adapt to the responses of one iteration; (B, T) each, 0 where masked."""
        ...


class Objective(Protocol):
    """Named scores -> what is maximised."""

    streams: tuple[str, ...]

    def __call__(self, scores: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> Tensor:
        """(B,) each, and the B prompts, whose conditions may weigh the streams -> (B,) reward."""
        ...


class Conditions(Protocol):
    """What the policy is told beside each request."""

    streams: tuple[str, ...]  # the scores that the weights of its prompts speak of

    @property
    def new_tokens(self) -> Sequence[str]:
        """Words of its own that every model of the run has to know beside `model.new_tokens`."""
        ...

    def check(self, template: Any) -> None:
        """Refuse what the policy's tokenizer cannot read."""
        ...

    def drawn(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
        """The prompts of one iteration, each under a condition drawn for it."""
        ...

    def evaluated(self, prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
        """condition -> the same prompts, all under it; "" for none."""
        ...


class RolloutEngine(Protocol):
    """Samples from a policy."""

    def sync(self) -> None:
        """Take over the weights that the policy has now; what is generated before is of older ones."""
        ...

    def generate(self, prompts: PromptBatch, samples: int, seed: int) -> Rollout:
        """`samples` responses to each prompt; responses to one prompt are neighbours."""
        ...


class Engines(Protocol):
    """Which rollout engine a run samples with, and what its being another than the learner asks of the loss."""

    def check(self, sampling: Any, model: Any, hardware: Any) -> None:
        """Refuse settings that the engine cannot apply, and models that it cannot read, before any are loaded."""
        ...

    def engine(self, model: Any, template: Any, sampling: Any, critics: Any = None) -> RolloutEngine:
        """An engine that samples from `model`; one that can leaves the values of critics on its trunk in rollouts."""
        ...

    def check_trainable(self, sampling: Any) -> None:
        """Refuse settings with which what the engine records would not be what the learner can score."""
        ...

    def measured(self, rollout: Rollout, policy: Any, tokens_at_once: int) -> tuple[Rollout, Metrics]:
        """The rollout with the learner's log-probabilities, and how far those of the engine are from them."""
        ...

    def corrected(self, terms: Sequence[Term], rollout: Rollout) -> Sequence[Term]:
        """The terms of a loss on such a rollout, weighted for its having been sampled by the engine."""
        ...


class RewardSource(Protocol):
    """Says how good (or, for a cost, how bad: higher is worse) each response is, in its own units."""

    def score(self, rollout: Rollout) -> Score: ...


class Aggregate(Protocol):
    """(B, M) normalised member scores -> (B,) the ensemble's score."""

    def __call__(self, members: Tensor) -> Tensor: ...


class GaussianAggregate(Protocol):
    """(B, M) normalised member means and (B, M) variances -> (B,) the ensemble's score."""

    def __call__(self, members: Tensor, variances: Tensor) -> Tensor: ...


class Judge(Protocol):
    """Compares responses, one pair at a time, by a named criterion."""

    def check(self, criteria: Collection[str], promised: Collection[str] = ()) -> None:
        """Refuse criteria that it does not know, and settings that cannot work; before any weights are loaded.

        `promised` paths will be there by the time it is loaded.
        """
        ...

    def load(self, hardware: Any, template: Any) -> "Judge":
        """Ready to compare: with its weights, if it has any."""
        ...

    def compare(self, comparisons: Sequence[Comparison], criterion: str) -> list[Verdict]:
        """One verdict for each comparison, in their order. What was paid for is asked once, even after a crash."""
        ...


class Tracker(Protocol):
    """A mirror of the metrics outside the run directory.

    A run that is continued logs all steps again that it has kept, before it goes on.
    """

    def start(self, directory: Path, config: dict[str, Any]) -> None: ...
    def log(self, step: int, metrics: Metrics) -> None: ...
    def finish(self, state: Literal["finished", "stopped", "failed"]) -> None: ...
