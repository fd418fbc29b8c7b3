"""A policy on every held-out split, in shards: scores, gold, KL, lengths, refusals, and against reference responses."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.tables import Rows, read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.models import load_frozen
from rlhf_lab.evaluation.evaluator import leave_table
from rlhf_lab.evaluation.policies import split_metrics
from rlhf_lab.evaluation.refusals import RefusalPhrases, Verdicts, world_refusals
from rlhf_lab.evaluation.text_overlap import TextOverlap
from rlhf_lab.interfaces import Conditions, Engines, Judge, RolloutEngine
from rlhf_lab.judges.price import account
from rlhf_lab.records import Comparison, Prompt
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.evaluate import Bench, Evaluate
from rlhf_lab.stages.shards import Shard, sharded
from rlhf_lab.types import Count, Metrics, batches

Refuses = Callable[[Prompt, str], Verdicts]


class EvaluatePolicy(Evaluate):
    """Leaves `generations.parquet`, every response with all that was measured on it, and `eval/<split>/…` metrics.

    Args:
        rollout: which engine samples.
        samples_per_prompt: responses to each; intervals are over prompts all the same.
        prompts_per_shard: prompts between two saves; a killed run continues after its last shard.
        refusals: whether responses that refuse are counted: in the embedded world by its grammar, elsewhere by phrases.
        refusal_phrases: how.
        references: whether the prompts are those of the data's responses, with which the policy's are compared.
        overlap: how alike a response and its references are.
        judge: who says how often the policy's response is better than the reference; the first, if there are several.
        criteria: by which; none for no judge.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        rewards: Mapping[str, Any],
        evaluation_sampling: Sampling,
        rollout: Engines,
        hardware: Hardware,
        tokens_at_once: Count,
        conditions: Conditions,
        samples_per_prompt: Count,
        prompts_per_shard: Count,
        refusals: bool,
        refusal_phrases: RefusalPhrases,
        references: bool,
        overlap: TextOverlap,
        judge: Judge,
        criteria: Sequence[str],
    ) -> None:
        super().__init__(
            model=model,
            dataset=dataset,
            rewards=rewards,
            evaluation_sampling=evaluation_sampling,
            hardware=hardware,
            tokens_at_once=tokens_at_once,
            conditions=conditions,
        )
        self.samples_per_prompt, self.prompts_per_shard = samples_per_prompt, prompts_per_shard
        self.rollout = rollout
        self.refuses: Refuses | None = None
        if refusals:
            self.refuses = world_refusals if dataset.is_world else refusal_phrases
        self.has_references, self.overlap = references, overlap
        self.judge, self.criteria = judge, tuple(criteria)
        self.references: dict[str, list[str]] = {}  # prompt id -> what the data answer to it

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        super().check(promised)
        self.rollout.check(self.sampling, self.model, self.hardware)
        if self.criteria and not self.has_references:
            raise ValueError(
                f"stage.criteria={list(self.criteria)} are for a judge who compares responses with those of the data; "
                "set stage.references=true, or compare two policies with stage=win_rates"
            )
        if self.criteria:
            self.judge.check(self.criteria, promised)
        if self.has_references:
            self.dataset.check(promised, "demonstrations")
            self.overlap.check()
        if self.samples_per_prompt > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"evaluation_sampling.temperature=0 draws one response {self.samples_per_prompt} times; set "
                "stage.samples_per_prompt=1, or a temperature above 0"
            )

    def prompts(self, split: str, template: Template) -> Sequence[Prompt]:
        """The prompts of a split: those that the data answer, each once, if their answers are wanted."""
        if not self.has_references:
            return super().prompts(split, template)
        asked: dict[str, Prompt] = {}
        for record in self.dataset.demonstrations(split, template):
            asked[record.prompt.id] = record.prompt.plain
            answers = self.references.setdefault(record.prompt.id, [])
            answers += [record.response] if record.response not in answers else []
        return list(asked.values())

    def run(self, run: Run) -> Metrics:
        bench = self.bench(self.model.policy, run.seed)
        bench = replace(bench, evaluator=replace(bench.evaluator, samples_per_prompt=self.samples_per_prompt))
        policy = load_frozen(self.model.policy, **bench.options)
        engine = self.rollout.engine(policy, bench.evaluator.template, self.sampling)
        engine.sync()
        judge = self.judge.load(self.hardware, bench.evaluator.template) if self.criteria else None
        if self.has_references:
            self.overlap.load()
        run.resume()  # there are no checkpoints: the shards are what it continues from
        for note in self.dataset.notes:
            run.warn(0, note)
        if self.model.policy == self.model.reference:
            run.warn(0, "the reference is the policy itself: its KL is 0; name what it started from, model.reference=")
        metrics: Metrics = {}
        rows: Rows = []
        for split, prompts in bench.evaluator.prompts.items():
            makers = [
                partial(self._shard, engine, bench, judge, split, prompts[part], self._seed(run.seed, split, i))
                for i, part in enumerate(batches(len(prompts), self.prompts_per_shard))
            ]
            made = sharded(run, split.replace("/", "_"), f"evaluating {split}", makers)
            sampled = [json.loads(row["row"]) for file in made for row in read_table(file)]
            metrics |= split_metrics(split, sampled)
            rows += sampled
        if judge is not None:
            account(judge, run.console.say)
        for name, number in metrics.items():
            if name.endswith("/excluded") and number and "/win_rate/" in name:
                run.warn(0, f"{name.removesuffix('/excluded')}: {number:.0f} verdicts could not be read; left out")
        run.write_rows("samples/step_000000.jsonl", rows)
        leave_table(run, 0, rows, bench.scorer, bench.sampling)
        run.log(0, metrics)
        return metrics

    @staticmethod
    def _seed(seed: int, split: str, shard: int) -> int:
        """Of the first shard that of `Evaluator`, so that a split of one shard is what training runs report."""
        return derive(seed, "evaluation", split, *([shard] if shard else []))

    def _shard(
        self, engine: RolloutEngine, bench: Bench, judge: Judge | None, split: str, prompts: Sequence[Prompt], seed: int
    ) -> Shard:
        """The rows as JSON, since what they hold is nested."""
        rows = bench.evaluator.sample(engine, bench.scorer, split, prompts, seed)
        asked = [prompt for prompt in prompts for _ in range(self.samples_per_prompt)]
        for row, prompt in zip(rows, asked, strict=True):
            row["texts"] = self.refuses(prompt, row["response"]) if self.refuses else {}
            if self.has_references:
                row["texts"] |= self.overlap(row["response"], self.references[prompt.id])
            row["verdicts"] = {}
        if judge is not None:
            pairs = [
                Comparison(prompt=prompt, responses=(row["response"], self.references[prompt.id][0]))
                for row, prompt in zip(rows, asked, strict=True)
            ]
            for criterion in self.criteria:
                for row, verdict in zip(rows, judge.compare(pairs, criterion), strict=True):
                    row["verdicts"][criterion] = verdict.wins
        return Shard([{"row": json.dumps(row)} for row in rows], sum(row["tokens"] for row in rows))
