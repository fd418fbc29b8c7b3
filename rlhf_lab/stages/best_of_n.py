"""Best of n: many samples per prompt, scored once; what the best of n would be worth for every n, and the best."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.generations import FILE, Generations, write
from rlhf_lab.data.tables import Rows, prompt_of, read_table, write_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.models import load_frozen
from rlhf_lab.engine.score import Scorer
from rlhf_lab.engine.tokenizer import load_tokenizer, new_token_ids
from rlhf_lab.evaluation.best_of_n import PROXY, by_column, estimates, grid_to
from rlhf_lab.evaluation.evaluator import described, generation_rows, sample_rows, under_conditions
from rlhf_lab.evaluation.metrics import half_width
from rlhf_lab.functional.best_of_n import kl_of_best_of_n
from rlhf_lab.interfaces import Conditions, Objective, RewardSource
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.shards import Shard, sharded
from rlhf_lab.types import Count, Metrics, batches

SAMPLES_AT_ONCE = 256  # of one prompt; a constant, so that what is drawn does not depend on the hardware


class BestOfN:
    """Sample, score, and estimate without bias what choosing the best of n by the objective gives, for n up to N.

    Leaves `data/generations.parquet`, the generation table of every response, and `data/best.parquet`, the rows of it
    with the highest objective for their prompt, which `algorithm=sft` reads: rejection-sampled SFT.

    Metrics, one row per n with n as its step: `best_of_n/kl`; `eval/<split>/…` with objective, rewards/<source> and
    gold/<name>, each `mean` and `ci95`, the half width of its Student-t interval over prompts; and
    `best_of_n/<split>/gain/…` of the same, the difference from n = 1 prompt by prompt. The last metrics hold them all,
    as `best_of_n/<n>/…`, beside those of n = N.

    Args:
        rewards: name -> source; null leaves one out.
        objective: what the best is best by.
        samples_per_prompt: N.
        prompts: of each held-out split; null for all.
        prompts_per_shard: prompts between two saves; a killed run continues after its last shard.
        tokens_at_once: budget of one scoring forward.
        conditions: what the policy is told beside each request; each is a split of its own, `<split>:<condition>`.

    Source: Gao et al. 2022, arXiv:2210.10760; with ensembles, Coste et al. 2024, arXiv:2310.02743.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        rewards: Mapping[str, Any],
        objective: Objective,
        sampling: Sampling,
        hardware: Hardware,
        samples_per_prompt: Count,
        prompts: Count | None,
        prompts_per_shard: Count,
        tokens_at_once: Count,
        conditions: Conditions,
    ) -> None:
        self.model, self.dataset, self.sampling, self.hardware = model, dataset, sampling, hardware
        self.conditions = conditions
        self.rewards = {name: source for name, source in rewards.items() if source is not None}
        self.objective, self.samples_per_prompt, self.prompts = objective, samples_per_prompt, prompts
        self.prompts_per_shard, self.tokens_at_once = prompts_per_shard, tokens_at_once

    @property
    def grid(self) -> list[int]:
        """Every n of which the best is estimated."""
        return grid_to(self.samples_per_prompt)

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        self.model.check(("policy", "reference"), promised)
        self.dataset.check(promised)
        for source in self.rewards.values():
            source.check(promised)
        if missing := [name for name in self.objective.streams if name not in self.rewards]:
            raise ValueError(
                f"the objective reads {list(self.objective.streams)}, but the reward sources are "
                f"{sorted(self.rewards)}; add reward.sources.{missing[0]} or change objective.weights"
            )
        if missing := [name for name in self.conditions.streams if name not in self.rewards]:
            raise ValueError(
                f"conditions weigh {list(self.conditions.streams)}, but the reward sources are {sorted(self.rewards)}; "
                f"add reward.sources.{missing[0]} or change conditions"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 draws one response N times; best of n needs a temperature above 0")
        if self.dataset.is_world and not self.dataset.splits:
            raise ValueError("dataset.eval_splits is empty; name the splits to sample, e.g. dataset.eval_splits=[test]")

    def run(self, run: Run) -> Metrics:
        device = self.hardware.start()
        new_tokens = [*self.model.new_tokens, *self.conditions.new_tokens]
        template = Template(load_tokenizer(self.model.policy, new_tokens), self.dataset.template_style)
        self.conditions.check(template)
        options = {
            "device": device,
            "dtype": self.model.dtype(self.hardware),
            "adapters": self.model.adapters,
            "seed": derive(run.seed, "initial weights"),
            "new_tokens": new_token_ids(template.tokenizer, new_tokens),
        }
        engine = Generator(load_frozen(self.model.policy, **options), template, self.sampling)
        scorer = Scorer(
            rewards={name: source.load(self.hardware, template) for name, source in self.rewards.items()},
            reference=load_frozen(self.model.reference, **options),
            critics=None,
            tokens_at_once=self.tokens_at_once,
        )
        gold = {name: Gold(measure) for name, measure in self.dataset.gold.items()}
        run.resume()  # there are no checkpoints: the shards are what it continues from
        plain = {split: self.dataset.prompts(split, template)[: self.prompts] for split in self.dataset.splits}
        asked = under_conditions(plain, self.conditions)
        for note in self.dataset.notes:
            run.warn(0, note)
        shards: list[Path] = []
        for split, prompts in asked.items():
            parts = list(batches(len(prompts), self.prompts_per_shard))
            sample = partial(self._sample, run.name, engine, scorer, gold, split)
            to_make = [partial(sample, prompts[part], derive(run.seed, split, i)) for i, part in enumerate(parts)]
            shards += sharded(run, split, f"best of {self.samples_per_prompt} on {split}", to_make)
        first, best = self._ends(shards)
        kept = [row for row in best if row["response"].strip()]
        if len(kept) < len(best):
            run.warn(0, f"the best response to {len(best) - len(kept)} of {len(best)} prompts is empty; left out")

        def fill(folder: Path) -> None:
            rows = (row for shard in shards for row in read_table(shard))
            write(folder / FILE, rows, described(self.rewards, self.sampling))
            write_table(kept, folder / "best.parquet")

        run.make("data", fill)
        for n, rows in ((1, first), (self.samples_per_prompt, best)):
            run.write_rows(f"samples/step_{n:06d}.jsonl", [self._shown(row) for row in rows])
        curves = self._curves(Generations.open(run.directory / "data" / FILE))
        final: Metrics = {}
        for n, metrics in curves.items():
            run.log(n, metrics)
            final |= {f"best_of_n/{n}/{name.split('/', 1)[1]}": value for name, value in metrics.items()}
        return run.last | final

    def _sample(
        self,
        name: str,
        engine: Generator,
        scorer: Scorer,
        gold: Mapping[str, RewardSource],
        split: str,
        prompts: Sequence[Prompt],
        seed: int,
    ) -> Shard:
        """N rows of the generation table for each prompt, side by side."""
        batch = prompt_batch(engine.template, prompts)
        by_prompt: list[Rows] = [[] for _ in prompts]
        for block in batches(self.samples_per_prompt, SAMPLES_AT_ONCE):
            scored = scorer.score(engine.generate(batch, block.stop - block.start, derive(seed, block.start)))
            rollout = scored.rollout
            truth = {name: source.score(rollout) for name, source in gold.items()}
            chosen_by = self.objective(scored.columns, rollout.prompts).tolist()
            rows = sample_rows(split, scored, truth)
            for row, worth, place in zip(rows, chosen_by, rollout.group.tolist(), strict=True):
                by_prompt[place].append(row | {"objective": worth, "sample": len(by_prompt[place])})
        rows = [row for each in by_prompt for row in each]
        return Shard(list(generation_rows(rows, name, 0)), sum(row["tokens"] for row in rows))

    def _ends(self, shards: Sequence[Path]) -> tuple[Rows, Rows]:
        """The first response to each prompt, and the one with the highest objective: the later of equals."""
        first: Rows = []
        best: Rows = []
        for shard in shards:
            rows = read_table(shard)
            for start in range(0, len(rows), self.samples_per_prompt):
                drawn = rows[start : start + self.samples_per_prompt]
                first.append(drawn[0])
                best.append(max(drawn, key=lambda row: (row["objective"], row["sample"])))
        return first, best

    def _shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as the samples of every run are written."""
        return {
            **{name: row[name] for name in ("split", "condition", "response", "finished", "finish_reason", "tokens")},
            "id": row["prompt_id"],
            "prompt": prompt_of(row["prompt"]).request,
            "kl": row["kl_k1"],
            "scores": {name: row[f"score_{name}"] for name in self.rewards},
            "members": {name: row[f"members_{name}"] for name in self.rewards if len(row[f"members_{name}"]) > 1},
            "gold": {name: row[f"gold_{name}"] for name in self.dataset.gold},
        }

    def _curves(self, table: Generations) -> dict[int, Metrics]:
        """n -> what the best of n by the objective has, and gains over one response."""
        columns = {f"rewards/{name}": f"score_{name}" for name in self.rewards}
        columns |= {f"gold/{name}": f"gold_{name}" for name in self.dataset.gold}
        by_n: dict[int, Metrics] = {n: {"best_of_n/kl": kl_of_best_of_n(n)} for n in self.grid}
        chooser = {"objective": by_column("objective")}
        for split in table.splits:
            found = estimates(table, split, chooser, columns, self.grid, {}, self.prompts_per_shard)["objective"]
            for what, values in found.items():
                name = "objective" if what == PROXY else what
                for g, metrics in enumerate(by_n.values()):
                    gain = values[:, g] - values[:, 0]
                    for key, each in ((f"eval/{split}/{name}", values[:, g]), (f"best_of_n/{split}/gain/{name}", gain)):
                        metrics[f"{key}/mean"] = each.mean().item()
                        metrics[f"{key}/ci95"] = half_width(each)
        return by_n
