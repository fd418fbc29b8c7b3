"""Making preference data: sample responses from a policy, have a judge compare them, add label noise, save a table."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

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


class Annotate:
    """Two responses to each prompt, compared by gold scores, as `data/<split>.parquet`.

    Columns: id, prompt, response_0, response_1, better and safer (0 or 1), safe_0, safe_1, gold_<name>_0, gold_<name>_1
    for every gold score, and clean_better, clean_safer, clean_safe_0, clean_safe_1 before the noise. The training
    split alone is noisy. A pair of equal responses, or with an empty one, is left out and counted.

    Args:
        better_by, safer_by: gold scores that decide; safer is the lower cost. A tie of costs is decided by a coin.
        ties: of the scores `better_by`: "coin" decides them by one; "drop" leaves the pair out and counts it, for a
            score that most pairs tie in, whose coins would drown the rest.
        safe_below: a response whose cost is at most this is safe.
        preference_noise, safety_noise: share of the training pairs' better/safer labels that are flipped, exactly, of
            the pairs that differ; those with an empty response leave afterwards.
        verdict_noise: share of the training responses' safe labels that are flipped, in the same way.
        prompts_per_shard: prompts between two saves; a killed run continues after its last shard.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        sampling: Sampling,
        hardware: Hardware,
        better_by: str,
        safer_by: str,
        ties: Literal["coin", "drop"],
        safe_below: float,
        preference_noise: Fraction,
        safety_noise: Fraction,
        verdict_noise: Fraction,
        prompts_per_shard: Count,
    ) -> None:
        self.model, self.dataset, self.sampling, self.hardware = model, dataset, sampling, hardware
        self.better_by, self.safer_by, self.safe_below = better_by, safer_by, safe_below
        self.ties = ties
        self.preference_noise, self.safety_noise = preference_noise, safety_noise
        self.verdict_noise, self.prompts_per_shard = verdict_noise, prompts_per_shard

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        self.dataset.check(promised, is_copied=True)
        for key, name in (("better_by", self.better_by), ("safer_by", self.safer_by)):
            if name not in self.dataset.gold:
                raise ValueError(
                    f"stage.{key}={name}, but {self.dataset.path} has the gold scores {sorted(self.dataset.gold)}"
                )

    def run(self, run: Run) -> Metrics:
        names = self.dataset.made
        device = self.hardware.start()
        template = Template(load_tokenizer(self.model.policy, self.model.new_tokens), self.dataset.template_style)
        new_tokens = new_token_ids(template.tokenizer, self.model.new_tokens)
        options = {"device": device, "dtype": self.hardware.dtype, "seed": run.seed, "new_tokens": new_tokens}
        options |= {"adapters": self.model.adapters}
        policy = load_frozen(self.model.policy, **options)
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
            rows = [
                row for file in sharded(run, split, f"sampling pairs of {split}", shards) for row in read_table(file)
            ]
            unequal = [row for row in rows if row["response_0"] != row["response_1"]]
            different = [row for row in unequal if self.ties == "coin" or not self._is_tie(row)]
            name = names[split]
            if name == "train":
                self._add_noise(different, run.seed)
            kept = [row for row in different if row["response_0"].strip() and row["response_1"].strip()]
            tables[name] = kept
            metrics |= {
                f"{name}/pairs": float(len(kept)),
                f"{name}/equal_pairs": float(len(rows) - len(unequal)),
                f"{name}/tied_pairs": float(len(unequal) - len(different)),
                f"{name}/empty_pairs": float(len(different) - len(kept)),
            }
            run.console.say(
                f"{split}: {len(kept)} pairs; left out {len(rows) - len(unequal)} of equal responses, "
                f"{len(unequal) - len(different)} tied and {len(different) - len(kept)} with an empty one"
            )
            if not kept:
                raise ValueError(
                    f"no pair of {split} is left of {len(rows)}: {self.better_by} ties in {len(unequal)} pairs of "
                    "unequal responses; draw more prompts, or decide ties by a coin (stage.ties=coin)"
                )
            for gold in self.dataset.gold:
                both = [row[f"gold_{gold}_{side}"] for row in kept for side in (0, 1)]
                metrics[f"{name}/gold/{gold}/mean"] = sum(both) / len(both)
        run.make("data", partial(write_splits, tables))
        run.log(0, metrics)
        return metrics

    def _shard(self, engine: Generator, split: str, i: int, prompts: Sequence[Prompt], seed: int) -> Shard:
        rollout = engine.generate(prompt_batch(engine.template, prompts), 2, derive(seed, "sampling", split, i))
        gold = {name: Gold(measure).score(rollout).value for name, measure in self.dataset.gold.items()}
        rows = self._rows(rollout.responses, prompts, gold, generator(seed, "coin", split, i))
        return Shard(rows, tokens_of(rollout))

    def _is_tie(self, row: dict[str, Any]) -> bool:
        return row[f"gold_{self.better_by}_0"] == row[f"gold_{self.better_by}_1"]

    def _rows(
        self, responses: Sequence[str], prompts: Sequence[Prompt], gold: dict[str, Tensor], coin: torch.Generator
    ) -> list[dict[str, Any]]:
        flips = torch.randint(2, (2, len(prompts)), generator=coin).tolist()
        rows: list[dict[str, Any]] = []
        for i, prompt in enumerate(prompts):
            first, second = 2 * i, 2 * i + 1
            good, bad = gold[self.better_by], gold[self.safer_by]
            better = flips[0][i] if good[first] == good[second] else int(good[second] > good[first])
            safer = flips[1][i] if bad[first] == bad[second] else int(bad[second] < bad[first])
            labels = {
                "better": better,
                "safer": safer,
                "safe_0": bool(bad[first] <= self.safe_below),
                "safe_1": bool(bad[second] <= self.safe_below),
            }
            rows.append(
                {
                    "id": prompt.id,
                    "prompt": prompt.written,
                    "response_0": responses[first],
                    "response_1": responses[second],
                    **labels,
                    **{f"clean_{name}": label for name, label in labels.items()},
                    **{f"gold_{n}_{side}": gold[n][2 * i + side].item() for n in gold for side in (0, 1)},
                }
            )
        return rows

    def _add_noise(self, rows: list[dict[str, Any]], seed: int) -> None:
        """Flip exactly the stated share of each label, other rows for each."""
        noise = {
            "better": self.preference_noise,
            "safer": self.safety_noise,
            "safe_0": self.verdict_noise,
            "safe_1": self.verdict_noise,
        }
        for label, share in noise.items():
            order = torch.randperm(len(rows), generator=generator(seed, "noise", label))
            for i in order[: round(share * len(rows))].tolist():
                rows[i][label] = type(rows[i][label])(not rows[i][label])
