"""Which engine samples from the policy: the choices of `rollout=`, checked before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlhf_lab.data.templates import Template
from rlhf_lab.engine import ranks
from rlhf_lab.engine.continuous_batching import ContinuousBatcher
from rlhf_lab.engine.critics import Critics
from rlhf_lab.engine.distribution import through
from rlhf_lab.engine.forward import policy_logprobs
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.prefixes import shares_prefixes
from rlhf_lab.engine.score import by_length
from rlhf_lab.engine.vllm import VLLMEngine, Worker, check_python, environment, shared
from rlhf_lab.functional.mismatch import mismatch, truncated_weights
from rlhf_lab.interfaces import RolloutEngine
from rlhf_lab.types import Count, Fraction, Metrics, Positive, Rollout, Term

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED_ROWS = 8  # of each rollout of the built-in engine: enough to see that its mismatch is rounding


def measure(rollout: Rollout, policy: "PreTrainedModel", tokens_at_once: int) -> Tensor:
    """(B, T) log-probabilities of a rollout's tokens under the policy, as the learner computes them."""
    return by_length(
        rollout.sequences,
        tokens_at_once,
        policy.device,
        through(policy, lambda rows: policy_logprobs(policy, rows, processing=rollout.processing)),
        together=shares_prefixes(policy),
    )


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """`Generator`: the policy itself, so that what it recorded are the learner's log-probabilities, up to rounding."""

    def check(self, sampling: Sampling, model: ModelPaths, hardware: Hardware) -> None:
        """It can do everything."""

    def check_trainable(self, sampling: Sampling) -> None:
        """It records whatever the learner needs to know of its distribution."""

    def engine(
        self, model: "PreTrainedModel", template: Template, sampling: Sampling, critics: Critics | None = None
    ) -> RolloutEngine:
        """An engine that samples from `model` and reads its critics on the way."""
        return Generator(model, template, sampling, critics)

    def measured(self, rollout: Rollout, policy: "PreTrainedModel", tokens_at_once: int) -> tuple[Rollout, Metrics]:
        """The same rollout, and how far a few of its rows are from what the learner says of them."""
        few = rollout.select(torch.arange(min(len(rollout), MEASURED_ROWS)))
        learner = measure(few, policy, tokens_at_once)
        return rollout, mismatch(few.logprobs, learner, few.sequences.response_mask)

    def corrected(self, terms: Sequence[Term], rollout: Rollout) -> Sequence[Term]:
        """The same terms: there is nothing to correct."""
        return terms


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """An engine that computes otherwise than the learner: its samples come from a slightly different policy.

    `logprobs` of its rollouts become the learner's, so that ratios start at 1 and the KL is the learner's; what the
    samples' origin changes in the loss is corrected by truncated importance weights.
    """

    importance_cap: Positive | None

    def check_trainable(self, sampling: Sampling) -> None:
        """Refuse in training what the learner could not score as it was drawn; evaluation may use it.

        Raises:
            ValueError: top k or top p, of which such an engine does not say which tokens they left; or a least length,
                of which nobody has seen that what the engine records is of the distribution without its stops.
        """
        wrong = {
            f"sampling.top_k={sampling.top_k}": sampling.top_k > 0,
            f"sampling.top_p={sampling.top_p}": sampling.top_p < 1,
            f"sampling.min_new_tokens={sampling.min_new_tokens}": sampling.min_new_tokens > 0,
        }
        if found := [what for what, there in wrong.items() if there]:
            raise ValueError(
                f"training with {', '.join(found)} needs to know among which tokens each one was drawn, which "
                f"{type(self).__name__} does not record; use rollout=built_in, or top_k=0, top_p=1 and "
                "min_new_tokens=0 (evaluation_sampling may use its own)"
            )

    @staticmethod
    def refuse(name: str, wrong: Mapping[str, bool], model: ModelPaths, hardware: Hardware) -> None:
        """Refuse settings that the engine of this name does not honour (said -> whether it is so).

        Nor does any of them read adapters or shards, or share its work with other processes.

        Raises:
            ValueError: naming the settings.
        """
        common = {
            f"model.peft={model.peft}": model.peft is not None,
            f"hardware.distribution={hardware.distribution}": hardware.distribution != "ddp",
            f"num_processes={ranks.expected()}": ranks.expected() > 1,
        }
        if found := [what for what, there in {**wrong, **common}.items() if there]:
            raise ValueError(f"rollout={name} does not work with {', '.join(found)}; use rollout=built_in")

    def measured(self, rollout: Rollout, policy: "PreTrainedModel", tokens_at_once: int) -> tuple[Rollout, Metrics]:
        """The rollout with the learner's log-probabilities in place of the engine's, and how far these were."""
        learner = measure(rollout, policy, tokens_at_once)
        figures = mismatch(rollout.logprobs, learner, rollout.sequences.response_mask)
        return replace(rollout, logprobs=learner, log_ratio=(learner - rollout.logprobs,)), figures

    def corrected(self, terms: Sequence[Term], rollout: Rollout) -> Sequence[Term]:
        """Each term that moves the policy, weighted by how much likelier the learner was to say what the engine said.

        A token's term gets its token's weight, a response's that of the whole response, both cut at `importance_cap`.
        Values and what is only reported stay.
        """
        if self.importance_cap is None:
            return terms
        (log_ratio,) = rollout.log_ratio
        weights = {
            "token": truncated_weights(log_ratio, self.importance_cap),
            "row": truncated_weights(log_ratio.sum(1), self.importance_cap),
        }
        return [
            replace(term, values=term.values * weights[term.per])
            if term.weight and not term.name.startswith("value/")
            else term
            for term in terms
        ]


@dataclass(frozen=True, kw_only=True)
class ContinuousBatching(Foreign):
    """transformers' `ContinuousBatchingManager`: the policy's own weights, and attention of its own over pages.

    Equal seeds give equal responses to equal batches of prompts, under one version of the library: its random numbers
    are those of the batch, not of the response. `sampling.batch_size` and what is set here therefore change them.
    """

    page_size: Count
    max_batch_tokens: Count
    memory: Count

    def check(self, sampling: Sampling, model: ModelPaths, hardware: Hardware) -> None:
        """Refuse what the library's manager does not apply, or does not read: it wants one process and a whole model.

        Raises:
            ValueError: naming the settings.
        """
        wrong = {
            f"sampling.min_new_tokens={sampling.min_new_tokens}": bool(sampling.min_new_tokens),
            f"sampling.stop_strings={list(sampling.stop_strings)}": bool(sampling.stop_strings),
            f"sampling.repetition_penalty={sampling.repetition_penalty}": sampling.repetition_penalty != 1,
        }
        self.refuse("continuous_batching", wrong, model, hardware)

    def engine(
        self, model: "PreTrainedModel", template: Template, sampling: Sampling, critics: Critics | None = None
    ) -> RolloutEngine:
        """An engine that samples from `model`; its states stay with it, so critics have to read them again."""
        return ContinuousBatcher(
            model,
            template,
            sampling,
            page_size=self.page_size,
            max_batch_tokens=self.max_batch_tokens,
            pages=-(-self.memory // self.page_size),
        )


@dataclass(frozen=True, kw_only=True)
class VLLM(Foreign):
    """vLLM in a process of its own, by the Python of an environment that has it: it pins torch and transformers.

    Engines of one model share the process; the first one's `sampling.batch_size` is how many responses are in flight.
    """

    python: str | None
    dtype: Literal["float32", "bfloat16"]
    gpu_memory_utilization: Fraction
    kv_cache_gib: Positive | None
    max_model_len: Count | None
    enforce_eager: bool
    start_timeout: Positive

    def check(self, sampling: Sampling, model: ModelPaths, hardware: Hardware) -> None:
        """Refuse what vLLM would not do as the built-in engine does, and an environment without it.

        Raises:
            ValueError: naming the settings.
        """
        wrong = {
            # which it looks for behind min_new_tokens only
            f"sampling.stop_strings={list(sampling.stop_strings)} and sampling.min_new_tokens="
            f"{sampling.min_new_tokens} together": bool(sampling.stop_strings and sampling.min_new_tokens),
        }
        self.refuse("vllm", wrong, model, hardware)
        check_python(self.python)

    def engine(
        self, model: "PreTrainedModel", template: Template, sampling: Sampling, critics: Critics | None = None
    ) -> RolloutEngine:
        """An engine that samples from `model`; its states stay with it, so critics have to read them again."""

        def worker() -> Worker:
            options = {
                "dtype": self.dtype,
                "gpu_memory_utilization": self.gpu_memory_utilization,
                "kv_cache_memory_bytes": None if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30),
                "max_model_len": -1 if self.max_model_len is None else self.max_model_len,
                "enforce_eager": self.enforce_eager,
                "max_num_seqs": sampling.batch_size,
            }
            variables = environment(model.device, torch.get_num_threads())
            return Worker(check_python(self.python), options, self.start_timeout, variables)

        return VLLMEngine(model, template, sampling, shared(model, self, worker))
