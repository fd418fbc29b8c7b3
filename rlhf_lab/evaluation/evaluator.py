"""A policy on held-out prompts: every score and the gold ones, each split on its own, every mean with its interval."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from rlhf_lab.data.generations import FILE, write
from rlhf_lab.data.tables import Rows
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine import ranks
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.score import Scorer
from rlhf_lab.evaluation.policies import split_metrics
from rlhf_lab.functional.kl import kl_estimate
from rlhf_lab.interfaces import Conditions, RewardSource, RolloutEngine
from rlhf_lab.records import Prompt
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.types import Metrics, Score, ScoredRollout


def under_conditions(prompts: Mapping[str, Sequence[Prompt]], conditions: Conditions) -> dict[str, Sequence[Prompt]]:
    """split -> prompts becomes split:condition -> the same prompts under that condition."""
    return {
        f"{split}:{name}" if name else split: told
        for split, each in prompts.items()
        for name, told in conditions.evaluated(each).items()
    }


def distances(scored: ScoredRollout) -> dict[str, Tensor]:
    """(B,) each estimate of KL(policy || reference): a sum over the tokens of a response, nats."""
    return {k: kl_estimate(scored.logprobs, scored.ref_logprobs, k).sum(1) for k in ("k1", "k2", "k3")}


def sample_rows(split: str, scored: ScoredRollout, gold: Mapping[str, Score]) -> Rows:
    """One row per response with everything that was measured on it, as samples/ holds them.

    `turns` is the conversation of which `prompt` is the last turn, null for a single one.
    """
    kl = {k: values.tolist() for k, values in distances(scored).items()}
    rollout = scored.rollout
    logprob = scored.logprobs.sum(1).tolist()
    drawn: dict[int, int] = {}
    rows: Rows = []
    for i, prompt in enumerate(rollout.prompts):
        group, finished = int(rollout.group[i]), bool(rollout.finished[i])
        drawn[group] = drawn.get(group, -1) + 1
        rows.append(
            {
                "split": split,
                "id": prompt.id,
                "prompt": prompt.request,
                "turns": None if prompt.written == prompt.request else prompt.written,
                "condition": prompt.condition,
                "sample": drawn[group],
                "response": rollout.responses[i],
                "finished": finished,
                "finish_reason": "stop" if finished else "length",
                "tokens": int(scored.response_mask[i].sum()),
                "logprob": logprob[i],
                "kl": kl["k1"][i],
                "kl_k2": kl["k2"][i],
                "kl_k3": kl["k3"][i],
                "scores": {name: score.value[i].item() for name, score in scored.scores.items()},
                "members": {n: s.members[i].tolist() for n, s in scored.scores.items() if s.members.shape[1] > 1},
                "variances": {n: s.variances[0][i].tolist() for n, s in scored.scores.items() if s.variances},
                "gold": {name: score.value[i].item() for name, score in gold.items()},
            }
        )
    return rows


def generation_rows(rows: Rows, run: str, step: int) -> Iterator[dict[str, Any]]:
    """The same rows as the generation table holds them, see `data/generation_writer.py`."""
    for row in rows:
        yield {
            "run": run,
            "step": step,
            "split": row["split"],
            "condition": row["condition"],
            "prompt_id": row["id"],
            "prompt": row["turns"] or row["prompt"],
            **{name: row[name] for name in ("sample", "response", "finished", "finish_reason", "tokens", "logprob")},
            "kl_k1": row["kl"],
            "kl_k2": row["kl_k2"],
            "kl_k3": row["kl_k3"],
            **{f"score_{name}": value for name, value in row["scores"].items()},
            **{f"members_{name}": row["members"].get(name, [value]) for name, value in row["scores"].items()},
            **{f"variances_{name}": values for name, values in row["variances"].items()},
            **({"objective": row["objective"]} if "objective" in row else {}),
            **{f"gold_{name}": value for name, value in row["gold"].items()},
            **{f"text_{name}": value for name, value in row.get("texts", {}).items()},
            **{f"verdict_{name}": value for name, value in row.get("verdicts", {}).items()},
        }


def described(rewards: Mapping[str, RewardSource], sampling: Sampling) -> dict[str, Any]:
    """What a table of responses says of all of them: how they were drawn, and in which units each source scores."""
    return {
        "sampling": asdict(sampling),
        "units": {name: getattr(source, "units", "its own") for name, source in rewards.items()},
    }


def leave_table(run: Run, step: int, rows: Rows, scorer: Scorer, sampling: Sampling) -> None:
    """Write the rows as the generation table of the run, of its policy after `step`; nothing if there are none."""
    if rows and ranks.is_first():
        write(run.directory / FILE, generation_rows(rows, run.name, step), described(scorer.rewards, sampling))


@dataclass(frozen=True)
class Evaluator:
    """Held-out evaluation with the same random numbers each time, so that before and after differ by the policy only.

    Fields:
        prompts: split -> its prompts.
        gold: the true scores, if the data have them.
        samples_per_prompt: responses to each; intervals are over prompts all the same.
    """

    prompts: Mapping[str, Sequence[Prompt]]
    gold: Mapping[str, RewardSource]
    template: Template
    seed: int
    samples_per_prompt: int = 1

    def evaluate(self, engine: RolloutEngine, scorer: Scorer) -> tuple[Metrics, Rows]:
        """Sample, score, and take means.

        Returns:
            `eval/<split>/…` metrics, means with `ci95`, the half width of their Student-t interval over prompts;
            and one row per response.
        """
        metrics: Metrics = {}
        rows: Rows = []
        for split, prompts in self.prompts.items():
            sampled = self.sample(engine, scorer, split, prompts, derive(self.seed, "evaluation", split))
            metrics |= split_metrics(split, sampled)
            rows += sampled
        return metrics, rows

    def sample(self, engine: RolloutEngine, scorer: Scorer, split: str, prompts: Sequence[Prompt], seed: int) -> Rows:
        """One row per response to these prompts, of one split, with everything that was measured on it."""
        scored = scorer.score(engine.generate(prompt_batch(self.template, prompts), self.samples_per_prompt, seed))
        return sample_rows(split, scored, {name: source.score(scored.rollout) for name, source in self.gold.items()})
