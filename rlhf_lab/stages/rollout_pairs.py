"""Responses of a policy that is told preferences, two and two, for a judge to compare."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.pairs import Pairing, paired, said
from rlhf_lab.data.preferences import JOINT
from rlhf_lab.data.tables import Rows, read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.models import load_frozen
from rlhf_lab.engine.tokenizer import load_tokenizer, new_token_ids
from rlhf_lab.interfaces import Conditions
from rlhf_lab.records import Prompt
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.shards import Shard, sharded, tokens_of, write_splits
from rlhf_lab.types import Count, Metrics, batches


class RolloutPairs:
    """Several responses to each prompt under a preference, as pairs: `data/<split>.parquet`, for `stage=judge_pairs`.

    Columns: id, prompt, preference (its name, joint names as P1A+P2B, "" for none), told (what the policy read of it),
    and of each response response_0, sample_0, finished_0, tokens_0, gold_<name>_0, and the same with _1.

    Args:
        conditions: what the policy is told; its preferences.
        told: names of conditions, such as helpful or helpful+humour; every prompt is asked under each of them. null:
            under one of its own, drawn as the conditions draw them.
        samples_per_prompt: responses to each prompt under each preference.
        pairing: "all" pairs of them, or each "once".
        prompts_per_shard: prompts between two saves; a killed run continues after its last shard.

    Source: the rollouts of Personalized Soups, Jang et al. 2023, arXiv:2310.11564: two responses under one preference.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        conditions: Conditions,
        sampling: Sampling,
        hardware: Hardware,
        told: Sequence[str] | None,
        samples_per_prompt: Count,
        pairing: Pairing,
        prompts_per_shard: Count,
    ) -> None:
        self.model, self.dataset, self.conditions = model, dataset, conditions
        self.sampling, self.hardware = sampling, hardware
        self.told = None if told is None else tuple(told)
        self.samples_per_prompt, self.prompts_per_shard = samples_per_prompt, prompts_per_shard
        self.pairing: Pairing = pairing

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        self.dataset.check(promised, is_copied=True)
        if self.samples_per_prompt < 2:
            raise ValueError(f"stage.samples_per_prompt={self.samples_per_prompt}; a pair needs 2 or more")
        if self.sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature=0 draws one response several times; pairs need a temperature above 0"
            )
        if self.told is not None:
            if not self.told or len(set(self.told)) < len(self.told):
                raise ValueError(f"stage.told={list(self.told)}; expected different names of conditions, or null")
            there = self.conditions.evaluated([])
            if unknown := [name for name in self.told if name not in there]:
                raise ValueError(f"stage.told names {unknown[0]!r}, but the conditions are {list(there)}")

    def run(self, run: Run) -> Metrics:
        names = self.dataset.made
        device = self.hardware.start()
        new_tokens = [*self.model.new_tokens, *self.conditions.new_tokens]
        template = Template(load_tokenizer(self.model.policy, new_tokens), self.dataset.template_style)
        self.conditions.check(template)
        policy = load_frozen(
            self.model.policy,
            device=device,
            dtype=self.hardware.dtype,
            adapters=self.model.adapters,
            seed=derive(run.seed, "initial weights"),
            new_tokens=new_token_ids(template.tokenizer, new_tokens),
        )
        engine = Generator(policy, template, self.sampling)
        run.resume()  # there are no checkpoints: the shards are what it continues from
        asked = {split: self._under_preferences(self.dataset.prompts(split, template), run.seed) for split in names}
        for note in self.dataset.notes:
            run.warn(0, note)
        metrics: Metrics = {}
        tables: dict[str, Rows] = {}
        for split, prompts in asked.items():
            parts = list(batches(len(prompts), self.prompts_per_shard))
            shards = [partial(self._shard, engine, split, i, prompts[part], run.seed) for i, part in enumerate(parts)]
            made = sharded(run, split, f"sampling pairs of {split}", shards)
            pairs, left_out = paired((row for file in made for row in read_table(file)), self.pairing)
            name = names[split]
            tables[name] = pairs
            metrics[f"{name}/pairs"] = float(len(pairs))
            metrics |= {f"{name}/left_out/{reason}": float(count) for reason, count in left_out.items()}
            run.console.say(f"{split}: {len(pairs)} pairs of responses to {len(prompts)} prompts; {said(left_out)}")
            if not pairs:
                raise ValueError(f"no pair of {split} is left: {said(left_out)}; draw more prompts or samples")
        run.make("data", partial(write_splits, tables))
        run.log(0, metrics)
        return metrics

    def _under_preferences(self, prompts: Sequence[Prompt], seed: int) -> list[tuple[str, Prompt]]:
        """(preference, prompt), those of one preference together if the preferences are given."""
        if self.told is None:
            drawn = self.conditions.drawn(prompts, derive(seed, "preferences"))
            return [(JOINT.join(prompt.weights), prompt) for prompt in drawn]
        under = self.conditions.evaluated(prompts)
        return [(name, prompt) for name in self.told for prompt in under[name]]

    def _shard(self, engine: Generator, split: str, i: int, asked: Sequence[tuple[str, Prompt]], seed: int) -> Shard:
        """A row for each response."""
        batch = prompt_batch(engine.template, [prompt for _, prompt in asked])
        rollout = engine.generate(batch, self.samples_per_prompt, derive(seed, "sampling", split, i))
        tokens = rollout.sequences.response_mask.sum(1).tolist()
        rows: list[dict[str, Any]] = []
        for k, (place, response) in enumerate(zip(rollout.group.tolist(), rollout.responses, strict=True)):
            preference, prompt = asked[place]
            truth = {f"gold_{name}": float(by(prompt.request, response)) for name, by in self.dataset.gold.items()}
            rows.append(
                {
                    "id": prompt.id,
                    "prompt": prompt.written,
                    "preference": preference,
                    "told": prompt.condition,
                    "sample": k % self.samples_per_prompt,
                    "response": response,
                    "finished": bool(rollout.finished[k]),
                    "tokens": tokens[k],
                    **truth,
                }
            )
        return Shard(rows, tokens_of(rollout))
