"""Diversity of the responses in generation tables: of each prompt's, across prompts, at equal length, of best of n."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import csv, parquet

from rlhf_lab.data.generations import Generations
from rlhf_lab.data.tables import Rows, write_table
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import check_path
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.evaluation.diversity import (
    GramSettings,
    Measure,
    Summary,
    gram_measures,
    of_all,
    of_each,
    over_prompts,
)
from rlhf_lab.evaluation.embeddings import check_sentence_model
from rlhf_lab.evaluation.entailment import Entailment
from rlhf_lab.evaluation.response_sets import BestOf, Held, LengthControl, View, hold, views
from rlhf_lab.functional.diversity import Text, entropy_per_token
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.diversity_models import Asking
from rlhf_lab.types import Count, Metrics

POLICY = "policy"  # the name of a table that is given none
ENTROPY = "entropy"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one measure says of one view of a table's split; and, prompt by prompt, of each set if it is not pooled."""

    view: View
    measure: str
    summary: Summary
    keys: Sequence[tuple[str, str]]
    values: NDArray[np.float64] | None


class Diversity:
    """Measure how diverse responses are, of one policy or of several on the same prompts.

    Views: `per_input`, the K responses to each prompt, averaged over prompts, with percentile-bootstrap intervals over
    them; `across_inputs`, the first response to each; `overall`, responses of all prompts pooled; each of the first two
    also `_at_<w>_words`, cut to one length, and of `_best_of_<n>` beside `_one_of_<n>`. Of one set of texts the
    interval comes from leaving out groups of prompts. Measures: distinct_words, ead_words, distinct_tokens, ead_tokens,
    ngram_cosine, sentence_bert, nli, entropy (nats per token): higher is more diverse; self_bleu: lower is.

    Metrics: `diversity/<split>/<view>/<table>/<measure>/{mean,low,high,ci95,excluded}`, `excluded` the prompts of which
    it could not be said; of the second and further tables `…/gain/…` too, the difference from the first table prompt by
    prompt, where views are per input. Leaves `data/diversity.parquet` and `.csv`, a row for each of these, with how
    the responses were sampled; and `data/per_input.parquet`, a row for each set.

    Args:
        generations: a generation table or a run that left one; or name -> such a path, the first to compare with.
        splits: null for all.
        prompts: of each split, drawn by the seed; null for all.
        samples_per_prompt: K, the first of each prompt; null for all.
        grams: which n-grams are counted.
        tokenizer: model whose tokens are counted; null for none.
        sentence_model: for sentence_bert: `embedded:minilm`, a folder or a hub id; null for none.
        nli: for nli; with the path null for none.
        overall: how many responses are pooled, drawn by the seed; null for no such view.
        length: words after which responses are cut; null for no such views.
        best_of: null for no such views.
        bootstrap_draws: of prompts, for an interval per input.
        jackknife_groups: of prompts, for the interval of one set.
        texts_at_once: in one forward of the sentence model.
        texts_per_shard: texts, or pairs of sentences, between two saves; a killed run continues after its last shard.

    Source: Kirk et al. 2024, arXiv:2310.06452, section 5.
    """

    def __init__(
        self,
        *,
        generations: str | Mapping[str, str],
        splits: Sequence[str] | None,
        prompts: Count | None,
        samples_per_prompt: Count | None,
        grams: GramSettings,
        tokenizer: str | None,
        sentence_model: str | None,
        nli: Entailment,
        overall: Count | None,
        length: LengthControl | None,
        best_of: BestOf | None,
        hardware: Hardware,
        bootstrap_draws: Count,
        jackknife_groups: Count,
        texts_at_once: Count,
        texts_per_shard: Count,
    ) -> None:
        self.generations = {POLICY: generations} if isinstance(generations, str) else dict(generations)
        self.splits, self.prompts, self.samples_per_prompt = splits, prompts, samples_per_prompt
        self.grams, self.tokenizer, self.sentence_model, self.nli = grams, tokenizer, sentence_model, nli
        self.overall, self.length, self.best_of, self.hardware = overall, length, best_of, hardware
        self.draws, self.groups = bootstrap_draws, jackknife_groups
        self.texts_at_once, self.texts_per_shard = texts_at_once, texts_per_shard

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        if not self.generations:
            raise ValueError("stage.generations names no table; name one, or several as {name: path}")
        if self.tokenizer is not None:
            check_path(self.tokenizer, "stage.tokenizer", promised)
        if self.sentence_model is not None:
            check_sentence_model(self.sentence_model, promised)
        self.nli.check(promised)
        for path in self.generations.values():
            if path not in promised:
                self._splits(Generations.open(path))

    def _splits(self, table: Generations) -> tuple[str, ...]:
        """Those that are measured; refuses a table that cannot be."""
        splits = table.splits if self.splits is None else tuple(self.splits)
        if missing := [split for split in splits if split not in table.splits]:
            raise ValueError(f"stage.splits names {missing[0]!r}, but {table.path} has {list(table.splits)}")
        if self.best_of is not None:
            if self.best_of.by not in table.columns:
                raise ValueError(
                    f"stage.best_of.by={self.best_of.by}, but {table.path} has the columns {list(table.columns)}; "
                    "name one that is a number, or set stage.best_of=null"
                )
            for split in splits:
                samples = self.samples_per_prompt or table.num_samples(split)
                if samples % self.best_of.n or samples < 2 * self.best_of.n:
                    raise ValueError(
                        f"stage.best_of.n={self.best_of.n} does not part the {samples} samples of each prompt of "
                        f"{split} into two or more draws; choose a divisor of at most half, or stage.best_of=null"
                    )
        return splits

    def run(self, run: Run) -> Metrics:
        device = self.hardware.start()
        run.resume()  # there are no checkpoints: the shards are what it continues from
        tables = {name: Generations.open(path) for name, path in self.generations.items()}
        seed = derive(run.seed, "diversity")
        held = {
            (name, split): hold(
                table, split, self.prompts, self.samples_per_prompt, self.best_of and self.best_of.by, seed
            )
            for name, table in tables.items()
            for split in self._splits(table)
        }
        seen = {place: views(each, self.overall, self.length, self.best_of, seed) for place, each in held.items()}
        for name, table in tables.items():
            for note in _notes(name, table):
                run.warn(0, note)
        everything = [view for each in seen.values() for view in each]
        asking = Asking(run=run, views=everything, per_shard=self.texts_per_shard, device=device)
        measures: list[Measure] = [*self._gram_measures()]
        if self.sentence_model is not None:
            measures.append(asking.embeddings(self.sentence_model, self.texts_at_once))
        if self.nli.path is not None:
            measures.append(asking.entailment(self.nli, seed))
        todo = [(place, view) for place, each in seen.items() for view in each]
        findings: dict[tuple[str, str], list[Finding]] = {place: [] for place in held}
        for k in run.steps("measuring, view", 0, len(todo), {}):
            run.pause()
            place, view = todo[k]
            findings[place] += self._measured(measures, held[place], view, seed)
        metrics, rows = self._reported(findings, held, tables, seed)
        sets = list(_sets(findings))

        def write(folder: Path) -> None:
            write_table(rows, folder / "diversity.parquet")
            csv.write_csv(parquet.read_table(folder / "diversity.parquet"), folder / "diversity.csv")
            write_table(sets, folder / "per_input.parquet")

        run.make("data", write)
        run.log(0, metrics)
        return metrics

    def _gram_measures(self) -> Sequence[Measure]:
        if self.tokenizer is None:
            return gram_measures(self.grams, None, 0)
        tokenizer = load_tokenizer(self.tokenizer)

        def tokens(text: str) -> Text:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        return gram_measures(self.grams, tokens, len(tokenizer))

    def _measured(self, measures: Sequence[Measure], held: Held, view: View, seed: int) -> Iterator[Finding]:
        prompt = [held.prompt[p] for p in view.place]
        keys = [(held.prompt[p], held.condition[p]) for p in view.place]
        for measure in measures:
            if view.is_pooled:
                texts = view.texts
                if len(texts) < 2:
                    continue
                estimate = of_all(measure, texts, prompt, self.groups, seed)
                summary = Summary(estimate=estimate, counted=len(set(prompt)), excluded=view.left_out)
                yield Finding(view=view, measure=measure.name, summary=summary, keys=keys, values=None)
                continue
            values = of_each(measure, view.sets)
            yield self._per_input(view, measure.name, values, prompt, keys, seed)
        if view.name == "per_input" and held.logprobs is not None and held.tokens is not None:
            values = np.array([entropy_per_token(*each) for each in zip(held.logprobs, held.tokens, strict=True)])
            yield self._per_input(view, ENTROPY, values, prompt, keys, seed)

    def _per_input(
        self, view: View, name: str, values: NDArray[np.float64], prompt: Sequence[str], keys: Any, seed: int
    ) -> Finding:
        said = over_prompts(values, prompt, self.draws, seed)
        summary = Summary(estimate=said.estimate, counted=said.counted, excluded=said.excluded + view.left_out)
        return Finding(view=view, measure=name, summary=summary, keys=keys, values=values)

    def _reported(
        self,
        findings: Mapping[tuple[str, str], Sequence[Finding]],
        held: Mapping[tuple[str, str], Held],
        tables: Mapping[str, Generations],
        seed: int,
    ) -> tuple[Metrics, Rows]:
        metrics: Metrics = {}
        rows: Rows = []
        first = next(iter(self.generations))
        for (name, split), found in findings.items():
            sampling = tables[name].metadata.get("sampling", {})
            drawn = {key: sampling.get(key) for key in ("temperature", "top_k", "top_p", "max_new_tokens")}
            texts = held[name, split].texts
            facts = {"table": name, "split": split, "prompts": len(texts), "samples": len(texts[0]), **drawn}
            metrics |= {
                f"diversity/{split}/per_input/{name}/{key}": float(facts[key]) for key in ("prompts", "samples")
            }
            before = {(each.view.name, each.measure): each for each in findings.get((first, split), ())}
            for each in found:
                summaries = {"": each.summary}
                base = before.get((each.view.name, each.measure))
                if name != first and base is not None and each.values is not None and base.values is not None:
                    summaries["gain/"] = self._gain(base, each, seed)
                for what, summary in summaries.items():
                    key = f"diversity/{split}/{each.view.name}/{name}/{each.measure}"
                    metrics |= summary.estimate.named(f"{key}/{what}".rstrip("/"))
                    metrics[f"{key}/{what}excluded"] = float(summary.excluded)
                    rows.append(
                        {**facts, "view": each.view.name, "measure": each.measure, "of": what.rstrip("/") or "mean",
                         "mean": summary.estimate.value, "low": summary.estimate.low, "high": summary.estimate.high,
                         "counted": summary.counted, "excluded": summary.excluded}
                    )  # fmt: skip
        return metrics, rows

    def _gain(self, base: Finding, each: Finding, seed: int) -> Summary:
        """What a table has more than the first, over the prompts of which it can be said of both."""
        assert base.values is not None
        assert each.values is not None
        before = dict(zip(base.keys, base.values.tolist(), strict=True))
        gains = np.array([v - before.get(k, np.nan) for k, v in zip(each.keys, each.values, strict=True)])
        return over_prompts(gains, [key[0] for key in each.keys], self.draws, seed)


def _notes(name: str, table: Generations) -> Iterator[str]:
    """What a person should know of how the responses were sampled before reading how diverse they are."""
    if "logprob" not in table.columns or "tokens" not in table.columns:
        yield f"{name}: the table has no logprob, so there is no entropy"
    sampling = table.metadata.get("sampling", {})
    if sampling.get("temperature") == 0:
        yield f"{name}: responses were drawn at temperature 0; those to one prompt are all the same"
    if sampling.get("top_k", 0) or sampling.get("top_p", 1.0) < 1:
        yield (
            f"{name}: responses were drawn with top_k={sampling.get('top_k')}, top_p={sampling.get('top_p')}: the "
            "diversity is that of the truncated distribution"
        )


def _sets(findings: Mapping[tuple[str, str], Sequence[Finding]]) -> Iterator[dict[str, Any]]:
    """A row for each set of responses to one prompt, with what every measure says of it."""
    for (name, split), found in findings.items():
        by_view: dict[str, list[Finding]] = {}
        for each in found:
            if each.values is not None:
                by_view.setdefault(each.view.name, []).append(each)
        for view, measures in by_view.items():
            for k, (prompt, condition) in enumerate(measures[0].keys):
                place = {"table": name, "split": split, "view": view, "prompt_id": prompt, "condition": condition}
                yield place | {each.measure: float(each.values[k]) for each in measures if each.values is not None}
