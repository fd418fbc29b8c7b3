"""Making rankings: sample several responses to each prompt, have a judge order them, save a table."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.tables import read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.models import load_frozen
from rlhf_lab.engine.tokenizer import load_tokenizer, new_token_ids
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive, generator
from rlhf_lab.stages.shards import Shard, sharded, tokens_of, write_splits
from rlhf_lab.types import Count, Fraction, Metrics, batches


class Rank:
    """Several responses to each prompt, ordered by a gold score, as `data/<split>.parquet`.

    Columns: id, prompt, responses (a list, the best first), and gold (their scores, in that order). Of equal responses
    one is kept, and of equally good ones too, so rankings may be of unequal lengths; empty ones and rankings of fewer
    than two are left out, and these are counted.

    Args:
        samples_per_prompt: responses drawn.
        ranked_by: the gold score that orders them, the highest best.
        noise: share of the training rankings in which two neighbours, drawn at random, change places, exactly.
        prompts_per_shard: prompts between two saves; a killed run continues after its last shard.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        sampling: Sampling,
        hardware: Hardware,
        samples_per_prompt: Count,
        ranked_by: str,
        noise: Fraction,
        prompts_per_shard: Count,
    ) -> None:
        self.model, self.dataset, self.sampling, self.hardware = model, dataset, sampling, hardware
        self.samples_per_prompt, self.ranked_by = samples_per_prompt, ranked_by
        self.noise, self.prompts_per_shard = noise, prompts_per_shard

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        self.dataset.check(promised, is_copied=True)
        if self.ranked_by not in self.dataset.gold:
            raise ValueError(
                f"stage.ranked_by={self.ranked_by}, but {self.dataset.path} has the gold scores "
                f"{sorted(self.dataset.gold)}"
            )
        if self.samples_per_prompt < 2:
            raise ValueError(f"stage.samples_per_prompt={self.samples_per_prompt}; a ranking needs 2 or more")

    def run(self, run: Run) -> Metrics:
        names = self.dataset.made
        device = self.hardware.start()
        template = Template(load_tokenizer(self.model.policy, self.model.new_tokens), self.dataset.template_style)
        policy = load_frozen(
            self.model.policy,
            device=device,
            dtype=self.hardware.dtype,
            adapters=self.model.adapters,
            seed=run.seed,
            new_tokens=new_token_ids(template.tokenizer, self.model.new_tokens),
        )
        engine = Generator(policy, template, self.sampling)
        run.resume()  # there are no checkpoints: the shards are what it continues from
        asked = {split: self.dataset.prompts(split, template) for split in names}
        for note in self.dataset.notes:
            run.warn(0, note)
        metrics: Metrics = {}
        tables: dict[str, list[dict[str, Any]]] = {}
        for split, prompts in asked.items():
            parts = list(batches(len(prompts), self.prompts_per_shard))
            shards = [partial(self._shard, engine, split, i, prompts[part], run.seed) for i, part in enumerate(parts)]
            made = sharded(run, split, f"sampling rankings of {split}", shards)
            rows = [row for file in made for row in read_table(file)]
            kept = [row for row in rows if len(row["responses"]) > 1]
            if not kept:
                raise ValueError(f"no prompt of {split} has two responses that {self.ranked_by} tells apart; draw more")
            name = names[split]
            tables[name] = self._noisy(kept, run.seed) if name == "train" else kept
            metrics |= {
                f"{name}/rankings": float(len(kept)),
                f"{name}/too_short": float(len(rows) - len(kept)),
                f"{name}/responses": sum(len(row["responses"]) for row in kept) / len(kept),
            }
            run.console.say(f"{split}: {len(kept)} rankings; left out {len(rows) - len(kept)} of fewer than two")
        run.make("data", partial(write_splits, tables))
        run.log(0, metrics)
        return metrics

    def _shard(self, engine: Generator, split: str, i: int, prompts: Sequence[Prompt], seed: int) -> Shard:
        batch = prompt_batch(engine.template, prompts)
        rollout = engine.generate(batch, self.samples_per_prompt, derive(seed, "sampling", split, i))
        gold = Gold(self.dataset.gold[self.ranked_by]).score(rollout).value.tolist()
        return Shard(self._rows(prompts, rollout.responses, gold), tokens_of(rollout))

    def _rows(self, prompts: Sequence[Prompt], responses: Sequence[str], gold: Sequence[float]) -> list[dict[str, Any]]:
        """A row for each prompt; of responses that score alike the first is kept, so equal ones are too."""
        rows: list[dict[str, Any]] = []
        for prompt, part in zip(prompts, batches(len(responses), self.samples_per_prompt), strict=True):
            by_score: dict[float, str] = {}
            for response, score in zip(responses[part], gold[part], strict=True):
                if response.strip():
                    by_score.setdefault(score, response)
            scores = sorted(by_score, reverse=True)
            rows.append(
                {
                    "id": prompt.id,
                    "prompt": prompt.written,
                    "responses": [by_score[score] for score in scores],
                    "gold": scores,
                }
            )
        return rows

    def _noisy(self, rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
        """The rows with two neighbours, and their scores, exchanged in exactly the stated share of them."""
        draw = generator(seed, "noise")
        order = torch.randperm(len(rows), generator=draw)
        changed = list(rows)
        for i in order[: round(self.noise * len(rows))].tolist():
            places = list(range(len(rows[i]["responses"])))
            first = int(torch.randint(len(places) - 1, (), generator=draw))
            places[first], places[first + 1] = places[first + 1], places[first]
            changed[i] = rows[i] | {key: [rows[i][key][place] for place in places] for key in ("responses", "gold")}
        return changed
