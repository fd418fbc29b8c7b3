"""A policy on held-out prompts: every score and the gold ones, each split on its own, every mean with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine.score import Scorer
from rlhf_lab.evaluation.metrics import completion_metrics, half_width
from rlhf_lab.functional.kl import kl_estimate
from rlhf_lab.interfaces import Conditions, RewardSource, RolloutEngine
from rlhf_lab.records import Prompt
from rlhf_lab.seeds import derive
from rlhf_lab.types import Metrics, Score, ScoredRollout


def under_conditions(prompts: Mapping[str, Sequence[Prompt]], conditions: Conditions) -> dict[str, Sequence[Prompt]]:
    """split -> prompts becomes split:condition -> the same prompts under that condition."""
    return {
        f"{split}:{name}" if name else split: told
        for split, each in prompts.items()
        for name, told in conditions.evaluated(each).items()
    }


def sample_rows(split: str, scored: ScoredRollout, gold: Mapping[str, Score]) -> list[dict[str, Any]]:
    """One row per response with everything that was measured on it."""
    kl = kl_estimate(scored.logprobs, scored.ref_logprobs, "k1").sum(1)
    rollout = scored.rollout
    return [
        {
            "split": split,
            "id": rollout.prompts[i].id,
            "prompt": rollout.prompts[i].request,
            "response": rollout.responses[i],
            "finished": bool(rollout.finished[i]),
            "tokens": int(scored.response_mask[i].sum()),
            "kl": kl[i].item(),
            "scores": {name: score.value[i].item() for name, score in scored.scores.items()},
            "members": {n: s.members[i].tolist() for n, s in scored.scores.items() if s.members.shape[1] > 1},
            "variances": {n: s.variances[0][i].tolist() for n, s in scored.scores.items() if s.variances},
            "gold": {name: score.value[i].item() for name, score in gold.items()},
        }
        for i in range(len(rollout))
    ]


@dataclass(frozen=True)
class Evaluator:
    """Held-out evaluation with the same random numbers each time, so that before and after differ by the policy only.

    Fields:
        prompts: split -> its prompts.
        gold: the true scores, if the data have them.
    """

    prompts: Mapping[str, Sequence[Prompt]]
    gold: Mapping[str, RewardSource]
    template: Template
    seed: int

    def evaluate(self, engine: RolloutEngine, scorer: Scorer) -> tuple[Metrics, list[dict[str, Any]]]:
        """One response per prompt.

        Returns:
            `eval/<split>/…` metrics, means with `ci95`, the half width of their Student-t interval over prompts;
            and one row per response.
        """
        metrics: Metrics = {}
        rows: list[dict[str, Any]] = []
        for split, prompts in self.prompts.items():
            batch = prompt_batch(self.template, prompts)
            scored = scorer.score(engine.generate(batch, 1, derive(self.seed, "evaluation", split)))
            gold = {name: source.score(scored.rollout) for name, source in self.gold.items()}
            kl = kl_estimate(scored.logprobs, scored.ref_logprobs, "k1").sum(1)
            columns = {
                **{f"rewards/{name}": score.value for name, score in scored.scores.items()},
                **{f"gold/{name}": score.value for name, score in gold.items()},
                "kl": kl,
            }
            for name, values in columns.items():
                key = f"eval/{split}/{name}" if name == "kl" else f"eval/{split}/{name}/mean"
                metrics[key] = values.mean().item()
                metrics[f"eval/{split}/{name}/ci95"] = half_width(values)
            lengths = completion_metrics(scored)
            metrics |= {f"eval/{split}/{k}": v for k, v in lengths.items() if k.startswith("completions/")}
            rows += sample_rows(split, scored, gold)
        return metrics, rows
