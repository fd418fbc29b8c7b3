"""Scores of a data set's responses by reward models, as further columns of its table."""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.tables import Rows, read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import rollout_of
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.functional.resampling import mean_interval
from rlhf_lab.interfaces import RewardSource
from rlhf_lab.records import Prompt
from rlhf_lab.run import Run
from rlhf_lab.stages.shards import Shard, sharded, tokens_of, write_splits
from rlhf_lab.types import Count, Metrics, batches

STATISTICS = "statistics.json"
COLUMNS = ("score", "standardised")
Statistics = dict[str, dict[str, float]]  # source -> mean, sd and count of its scores


class ScoreTable:
    """A table with `score_<source>` beside each response, as `data/<split>.parquet`.

    The columns are `score_<source>` of demonstrations, `score_<source>_0` and `_1`, or `_chosen` and `_rejected`, of
    pairs; all others stay as they are. Beside the folder, `statistics.json` holds each source's mean, sd (of the
    population) and count over the responses of the training split, by which to put sources in one unit.

    Metrics are each source's mean by split, with the half width of its 95 % Student-t interval over prompts, and sd.

    Args:
        rewards: name -> source; null leaves one out.
        reads: which responses a row has.
        standardised_by: whose statistics also give every split `standardised_<source>…`, (score - mean) / sd: "train",
            of the table that is made; or a file as `statistics.json`, so that a later table is in the units of an
            earlier one. null for none.
        rows_per_shard: rows between two saves; a killed run continues after its last shard.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        rewards: Mapping[str, Any],
        hardware: Hardware,
        reads: Literal["demonstrations", "preferences", "safety_pairs"],
        standardised_by: str | None,
        rows_per_shard: Count,
    ) -> None:
        self.model, self.dataset, self.hardware = model, dataset, hardware
        self.rewards = {name: source for name, source in rewards.items() if source is not None}
        self.reads, self.rows_per_shard = reads, rows_per_shard
        self.standardised_by = standardised_by

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        self.dataset.check(promised, self.reads, is_copied=True)
        if self.dataset.is_world and self.reads != "demonstrations":
            raise ValueError(
                f"stage.reads={self.reads}, but {self.dataset.path} draws prompts and demonstrations only; name a "
                "table of pairs (dataset=tiny_help_preferences), or set stage.reads=demonstrations"
            )
        if not self.rewards:
            raise ValueError("there is no reward source to score by; add one to reward.sources")
        for source in self.rewards.values():
            source.check(promised)
        if self.standardised_by not in (None, "train"):
            read_statistics(Path(self.standardised_by), self.rewards)

    def run(self, run: Run) -> Metrics:
        names = self.dataset.made
        self.hardware.start()
        template = Template(load_tokenizer(self.model.policy, self.model.new_tokens), self.dataset.template_style)
        tables = {split: self.dataset.table(split, self.reads, template) for split in names}
        for split, (rows, _, responses) in tables.items():
            made = {f"{kind}_{name}{side}" for kind in COLUMNS for name in self.rewards for side in responses}
            if taken := sorted(rows[0].keys() & made):
                raise ValueError(
                    f"{self.dataset.path} ({split}) has a column {taken[0]!r} already; leave that source out "
                    f"(reward.sources.{next(iter(self.rewards))}=null) or give it another name"
                )
        sources = {name: source.load(self.hardware, template) for name, source in self.rewards.items()}
        run.resume()  # there are no checkpoints: the shards are what it continues from
        for note in self.dataset.notes:
            run.warn(0, note)
        metrics: Metrics = {}
        scored: dict[str, list[dict[str, Any]]] = {}
        for split, (rows, prompts, sides) in tables.items():
            name = names[split]
            shards = [
                partial(
                    self._shard, sources, template, rows[part], prompts[part], {s: r[part] for s, r in sides.items()}
                )
                for part in batches(len(rows), self.rows_per_shard)
            ]
            files = sharded(run, split, f"scoring {split}", shards)
            scored[name] = [row for file in files for row in read_table(file)]
            for source, statistics in _statistics(scored[name], self.rewards, sides).items():
                metrics |= {f"{name}/{source}/{key}": value for key, value in statistics.items()}
                metrics[f"{name}/{source}/ci95"] = _half_width(scored[name], source, prompts, sides)
        reference = _statistics(scored["train"], self.rewards, tables[self.dataset.train_split][2])
        run.write_text(STATISTICS, json.dumps(reference, indent=1))
        if self.standardised_by is not None:
            units = reference
            if self.standardised_by != "train":
                units = read_statistics(Path(self.standardised_by), self.rewards)
            for split, (_, _, sides) in tables.items():
                _standardise(scored[names[split]], units, sides)
        run.make("data", partial(write_splits, scored))
        run.log(0, metrics)
        return metrics

    def _shard(
        self,
        sources: Mapping[str, RewardSource],
        template: Template,
        rows: Rows,
        prompts: Sequence[Prompt],
        sides: Mapping[str, Sequence[str]],
    ) -> Shard:
        """The rows with their scores; a side is what the columns of its responses end with."""
        scored, tokens = [dict(row) for row in rows], 0
        for side, responses in sides.items():
            rollout = rollout_of(template, prompts, responses)
            tokens += tokens_of(rollout)
            for name, source in sources.items():
                for row, value in zip(scored, source.score(rollout).value.tolist(), strict=True):
                    row[f"score_{name}{side}"] = value
        return Shard(scored, tokens)


def read_statistics(file: Path, sources: Collection[str]) -> Statistics:
    """What another run of this stage left of its training split.

    Raises:
        ValueError: it is not there, or not of these sources, or a source has no spread to divide by.
    """
    try:
        found = json.loads(file.expanduser().read_text())
        units = {name: {key: float(found[name][key]) for key in ("mean", "sd", "count")} for name in sources}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"stage.standardised_by={file}: expected mean, sd and count of {sorted(sources)}, as stage=score_table "
            f"leaves them in {STATISTICS}; found {type(error).__name__}: {error}"
        ) from error
    if flat := [name for name, each in units.items() if not each["sd"] > 0]:
        raise ValueError(f"stage.standardised_by={file}: sd of {flat[0]} is {units[flat[0]]['sd']}; expected above 0")
    return units


def _standardise(rows: list[dict[str, Any]], units: Statistics, sides: Collection[str]) -> None:
    for source, each in units.items():
        if not each["sd"] > 0:
            raise ValueError(f"every score of {source} is {each['mean']}; it cannot be standardised, leave it out")
        for row in rows:
            for side in sides:
                row[f"standardised_{source}{side}"] = (row[f"score_{source}{side}"] - each["mean"]) / each["sd"]


def _half_width(rows: list[dict[str, Any]], source: str, prompts: Sequence[Prompt], sides: Collection[str]) -> float:
    """Of the 95 % interval of a source's mean, over prompts."""
    by_prompt: dict[str, list[float]] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        by_prompt.setdefault(prompt.id, []).extend(row[f"score_{source}{side}"] for side in sides)
    return mean_interval(torch.tensor([sum(each) / len(each) for each in by_prompt.values()]))[1]


def _statistics(rows: list[dict[str, Any]], sources: Collection[str], sides: Collection[str]) -> Statistics:
    """Of all responses; the sd of the population."""
    statistics: Statistics = {}
    for source in sources:
        values = torch.tensor([row[f"score_{source}{side}"] for row in rows for side in sides], dtype=torch.float64)
        sd = values.std(correction=0).item()
        statistics[source] = {"mean": values.mean().item(), "sd": sd, "count": float(len(values))}
    return statistics
