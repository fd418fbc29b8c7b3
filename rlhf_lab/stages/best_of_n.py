"""Best of n: many samples per prompt, scored once; what the best of n would be worth for every n, and the best."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.tables import join_tables, prompt_of, read_table, write_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.models import LEARNT, Hardware, ModelPaths, check_path, load_frozen, load_tokenizer, new_token_ids
from rlhf_lab.engine.score import Scorer
from rlhf_lab.evaluation.metrics import half_width
from rlhf_lab.functional.best_of_n import expected_best, kl_of_best_of_n
from rlhf_lab.functional.kl import kl_estimate
from rlhf_lab.interfaces import Objective, RewardSource
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.shards import Shard, sharded
from rlhf_lab.types import Count, Metrics, batches

SAMPLES_AT_ONCE = 256  # of one prompt; a constant, so that what is drawn does not depend on the hardware


class BestOfN:
    """Sample, score, and estimate without bias what choosing the best of n by the objective gives, for n up to N.

    Leaves `data/samples.parquet`, every response with all that was measured on it: split, id, prompt, sample, response,
    finished, tokens, kl (k1, nats), score_<source>, members_<source>, objective, gold_<name>; and `data/best.parquet`,
    the response to each prompt with the highest objective, which `algorithm=sft` reads: rejection-sampled SFT.

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
    ) -> None:
        self.model, self.dataset, self.sampling, self.hardware = model, dataset, sampling, hardware
        self.rewards = {name: source for name, source in rewards.items() if source is not None}
        self.objective, self.samples_per_prompt, self.prompts = objective, samples_per_prompt, prompts
        self.prompts_per_shard, self.tokens_at_once = prompts_per_shard, tokens_at_once

    @property
    def grid(self) -> list[int]:
        """Every n of which the best is estimated: powers of two, and N."""
        powers = [2**k for k in range(self.samples_per_prompt.bit_length())]
        return list(dict.fromkeys([*powers, self.samples_per_prompt]))

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        for role in ("policy", "reference"):
            check_path(getattr(self.model, role), f"model.{role}", promised)
        self.dataset.check(promised)
        for source in self.rewards.values():
            source.check(promised)
        if missing := [name for name in self.objective.streams if name not in self.rewards]:
            raise ValueError(
                f"the objective reads {list(self.objective.streams)}, but the reward sources are "
                f"{sorted(self.rewards)}; add reward.sources.{missing[0]} or change objective.weights"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 draws one response N times; best of n needs a temperature above 0")
        if self.dataset.is_world and not self.dataset.splits:
            raise ValueError("dataset.eval_splits is empty; name the splits to sample, e.g. dataset.eval_splits=[test]")

    def run(self, run: Run) -> Metrics:
        device = self.hardware.start()
        template = Template(load_tokenizer(self.model.policy, self.model.new_tokens), self.dataset.template_style)
        options = {
            "device": device,
            "dtype": LEARNT,
            "seed": derive(run.seed, "initial weights"),
            "new_tokens": new_token_ids(template.tokenizer, self.model.new_tokens),
        }
        engine = Generator(load_frozen(self.model.policy, **options), template, self.sampling)
        scorer = Scorer(
            rewards={name: source.load(self.hardware, template) for name, source in self.rewards.items()},
            reference=load_frozen(self.model.reference, **options),
            critics=None,
            temperature=self.sampling.temperature,
            tokens_at_once=self.tokens_at_once,
        )
        gold = {name: Gold(measure) for name, measure in self.dataset.gold.items()}
        run.resume()  # there are no checkpoints: the shards are what it continues from
        asked = {split: self.dataset.prompts(split, template)[: self.prompts] for split in self.dataset.splits}
        for note in self.dataset.notes:
            run.warn(0, note)
        shards: list[Path] = []
        first: list[dict[str, Any]] = []
        best: list[dict[str, Any]] = []
        curves: dict[int, Metrics] = {n: {"best_of_n/kl": kl_of_best_of_n(n)} for n in self.grid}
        for split, prompts in asked.items():
            parts = list(batches(len(prompts), self.prompts_per_shard))
            columns: dict[str, list[Tensor]] = {}
            sample = partial(self._sample, engine, scorer, gold, split)
            to_make = [partial(sample, prompts[part], derive(run.seed, split, i)) for i, part in enumerate(parts)]
            made = sharded(run, split, f"best of {self.samples_per_prompt} on {split}", to_make)
            shards += made
            for file in made:
                rows = read_table(file)
                for name, values in self._measured(rows).items():
                    columns.setdefault(name, []).append(values)
                first += rows[:: self.samples_per_prompt]
                best += self._best(rows)
            measured = {name: torch.cat(each) for name, each in columns.items()}
            for n, metrics in curves.items():
                metrics |= self._curve(split, measured, n)
        kept = [row for row in best if row["response"].strip()]
        if len(kept) < len(best):
            run.warn(0, f"the best response to {len(best) - len(kept)} of {len(best)} prompts is empty; left out")

        def fill(folder: Path) -> None:
            join_tables(shards, folder / "samples.parquet")
            write_table(kept, folder / "best.parquet")

        run.make("data", fill)
        for n, rows in ((1, first), (self.samples_per_prompt, best)):
            run.write_rows(f"samples/step_{n:06d}.jsonl", [self._shown(row) for row in rows])
        final: Metrics = {}
        for n, metrics in curves.items():
            run.log(n, metrics)
            final |= {f"best_of_n/{n}/{name.split('/', 1)[1]}": value for name, value in metrics.items()}
        return run.last | final

    def _sample(
        self,
        engine: Generator,
        scorer: Scorer,
        gold: Mapping[str, RewardSource],
        split: str,
        prompts: Sequence[Prompt],
        seed: int,
    ) -> Shard:
        """N rows for each prompt, side by side."""
        batch = prompt_batch(engine.template, prompts)
        rows: list[list[dict[str, Any]]] = [[] for _ in prompts]
        for block in batches(self.samples_per_prompt, SAMPLES_AT_ONCE):
            scored = scorer.score(engine.generate(batch, block.stop - block.start, derive(seed, block.start)))
            rollout = scored.rollout
            truth = {name: source.score(rollout).value for name, source in gold.items()}
            chosen_by = self.objective({name: score.value for name, score in scored.scores.items()}, rollout.prompts)
            kl = kl_estimate(scored.logprobs, scored.ref_logprobs, "k1").sum(1)
            for i, place in enumerate(rollout.group.tolist()):
                rows[place].append(
                    {
                        "split": split,
                        "id": rollout.prompts[i].id,
                        "prompt": rollout.prompts[i].written,
                        "sample": len(rows[place]),
                        "response": rollout.responses[i],
                        "finished": bool(rollout.finished[i]),
                        "tokens": int(scored.response_mask[i].sum()),
                        "kl": kl[i].item(),
                        **{f"score_{name}": score.value[i].item() for name, score in scored.scores.items()},
                        **{f"members_{name}": score.members[i].tolist() for name, score in scored.scores.items()},
                        "objective": chosen_by[i].item(),
                        **{f"gold_{name}": value[i].item() for name, value in truth.items()},
                    }
                )
        return Shard([row for each in rows for row in each], sum(row["tokens"] for each in rows for row in each))

    def _measured(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """(P, N) of everything that has a curve, under its metric's name."""
        names = {"objective": "objective"}
        names |= {f"rewards/{name}": f"score_{name}" for name in self.rewards}
        names |= {f"gold/{name}": f"gold_{name}" for name in self.dataset.gold}
        return {
            name: torch.tensor([row[column] for row in rows], dtype=torch.float64).view(-1, self.samples_per_prompt)
            for name, column in names.items()
        }

    def _best(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Of each prompt's rows the one with the highest objective, the later of equals, as the estimator has it."""
        best: list[dict[str, Any]] = []
        for start in range(0, len(rows), self.samples_per_prompt):
            row = max(rows[start : start + self.samples_per_prompt], key=lambda row: (row["objective"], row["sample"]))
            best.append(dict(row))
        return best

    def _shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as the samples of every run are written."""
        return {
            **{name: row[name] for name in ("split", "id", "response", "finished", "tokens", "kl")},
            "prompt": prompt_of(row["prompt"]).request,
            "scores": {name: row[f"score_{name}"] for name in self.rewards},
            "members": {name: row[f"members_{name}"] for name in self.rewards if len(row[f"members_{name}"]) > 1},
            "gold": {name: row[f"gold_{name}"] for name in self.dataset.gold},
        }

    @staticmethod
    def _curve(split: str, measured: Mapping[str, Tensor], n: int) -> Metrics:
        metrics: Metrics = {}
        for name, values in measured.items():
            per_prompt = expected_best(measured["objective"], values, n)
            gain = per_prompt - values.mean(1)
            for key, each in ((f"eval/{split}/{name}", per_prompt), (f"best_of_n/{split}/gain/{name}", gain)):
                metrics[f"{key}/mean"] = each.mean().item()
                metrics[f"{key}/ci95"] = half_width(each)
        return metrics
