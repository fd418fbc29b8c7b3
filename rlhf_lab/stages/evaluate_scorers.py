"""Reward and cost models on held-out pairs: accuracy, agreement, calibration, gold; each split on its own."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.tables import Rows, join_tables, read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import rollout_of
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.models import Calibration
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.evaluation.value_models import (
    Assessor,
    ScoredPairs,
    Yardstick,
    histogram_edges,
    histograms,
    units_of,
)
from rlhf_lab.functional.estimates import Estimate, difference
from rlhf_lab.interfaces import RewardSource
from rlhf_lab.records import Prompt
from rlhf_lab.run import Run
from rlhf_lab.stages.shards import Shard, sharded, tokens_of
from rlhf_lab.types import Count, Metrics, batches

RESULT = "value_models.json"


class EvaluateScorers:
    """What any reward source says of the pairs of every held-out split, and how right it is.

    Leaves `data/scores.parquet`, one row per pair: split, id, prompt, score_<source>_<side>, members_<source>_<side>,
    variances_<source>_<side> and the columns of the data that are no texts; and `value_models.json`, what the pictures
    are drawn of. Metrics: `eval/<split>/value_model/<source>/…`, see `Assessor`, each estimate as mean, low, high and
    ci95, half its 95 % interval over prompts; `gap/<source>/<split>/accuracy/…`, in distribution less on that split.

    Args:
        rewards: name -> source; null leaves one out.
        costs: the sources of which less is better.
        yardsticks: source -> what it is measured by; one for each source.
        assessor: how.
        in_distribution: the split that gaps are counted from; null: the first.
        rows_per_shard: rows between two saves; a killed run continues after its last shard.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        rewards: Mapping[str, Any],
        costs: Sequence[str],
        yardsticks: Mapping[str, Yardstick],
        assessor: Assessor,
        in_distribution: str | None,
        hardware: Hardware,
        rows_per_shard: Count,
    ) -> None:
        self.model, self.dataset, self.hardware = model, dataset, hardware
        self.rewards = {name: source for name, source in rewards.items() if source is not None}
        self.costs, self.yardsticks, self.assessor = tuple(costs), yardsticks, assessor
        self.in_distribution, self.rows_per_shard = in_distribution, rows_per_shard

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        self.dataset.check(promised, "preferences")
        if self.dataset.is_world:
            raise ValueError(
                f"{self.dataset.path} draws prompts and no pairs; name a table of pairs "
                "(dataset=tiny_help_held_out_pairs)"
            )
        if not self.rewards:
            raise ValueError("there is no reward source to evaluate; add one to reward.sources")
        if missing := sorted(self.rewards.keys() - self.yardsticks.keys()):
            raise ValueError(
                f"stage.yardsticks has {sorted(self.yardsticks)}, but nothing for the source {missing[0]!r}; say which "
                f"columns it is measured by, stage.yardsticks.{missing[0]}=…, or leave it out, "
                f"reward.sources.{missing[0]}=null"
            )
        for source in self.rewards.values():
            source.check(promised)

    def run(self, run: Run) -> Metrics:
        self.hardware.start()
        template = Template(load_tokenizer(self.model.policy, self.model.new_tokens), self.dataset.template_style)
        if not self.dataset.splits:
            raise ValueError(f"{self.dataset.path} has no held-out split; set dataset.eval_splits or dataset.hold_out")
        if self.in_distribution not in (None, *self.dataset.splits):
            raise ValueError(
                f"stage.in_distribution={self.in_distribution}, but the held-out splits are {list(self.dataset.splits)}"
            )
        tables = {split: self.dataset.table(split, "preferences", template) for split in self.dataset.splits}
        for split, (rows, _, _) in tables.items():
            self._check_columns(split, rows)
        sources = {name: source.load(self.hardware, template) for name, source in self.rewards.items()}
        run.resume()  # there are no checkpoints: the shards are what it continues from
        for note in self.dataset.notes:
            run.warn(0, note)
        shards: list[Path] = []
        pairs: dict[str, dict[str, ScoredPairs]] = {name: {} for name in sources}
        for split, (rows, prompts, sides) in tables.items():
            makers = [
                partial(self._shard, sources, template, split, rows[part], prompts[part], _of(sides, part))
                for part in batches(len(rows), self.rows_per_shard)
            ]
            made = sharded(run, split, f"scoring {split}", makers)
            shards += made
            scored = [row for file in made for row in read_table(file)]
            for name, source in sources.items():
                pairs[name][split] = self._pairs(run, name, units_of(source), split, scored, list(sides))
        run.make("data", lambda folder: join_tables(shards, folder / "scores.parquet"))
        metrics, result = self._assess(run, pairs)
        run.write_text(RESULT, json.dumps(result, indent=1))
        run.log(0, metrics)
        return metrics

    def _check_columns(self, split: str, rows: Rows) -> None:
        """Every column that a yardstick names is there, and its labels are 0 or 1, true or false.

        Raises:
            ValueError: one is not.
        """
        ends = ("_chosen", "_rejected") if _is_sided(self.dataset, rows) else ("_0", "_1")
        for name in self.rewards:
            yardstick = self.yardsticks[name]
            wanted = {} if ends[0] == "_chosen" or not yardstick.preferred else {"preferred": [yardstick.preferred]}
            wanted |= {"margin": [yardstick.margin]} if yardstick.margin else {}
            for key in ("gold", "safe"):
                if column := getattr(yardstick, key):
                    wanted[key] = [f"{column}{end}" for end in ends]
            for key, columns in wanted.items():
                for column in columns:
                    if column not in rows[0]:
                        raise ValueError(
                            f"{self.dataset.path} ({split}) has the columns {sorted(rows[0])}, but "
                            f"stage.yardsticks.{name}.{key} needs {column!r}; name the column that it is, or null"
                        )
                    if key in ("preferred", "safe") and (odd := [r for r in rows if r[column] not in (0, 1)]):
                        raise ValueError(
                            f"{self.dataset.path} ({split}): {column}, stage.yardsticks.{name}.{key}, is "
                            f"{odd[0][column]!r} in row {rows.index(odd[0])}, and neither 0 nor 1 in {len(odd)} of "
                            f"{len(rows)}; name a column of labels, or mend these rows"
                        )

    def _shard(
        self,
        sources: Mapping[str, RewardSource],
        template: Template,
        split: str,
        rows: Rows,
        prompts: Sequence[Prompt],
        sides: Mapping[str, Sequence[str]],
    ) -> Shard:
        """The rows with what every source says of both sides."""
        texts = {self.dataset.columns.get(f"response{side}", f"response{side}") for side in sides}
        texts |= {self.dataset.columns.get(name, name) for name in ("chosen", "rejected", "prompt")}
        scored: Rows = [
            {"split": split, "id": prompt.id, "prompt": prompt.written}
            | {key: value for key, value in row.items() if key not in texts | {"split", "id", "prompt"}}
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        tokens = 0
        for side, responses in sides.items():
            rollout = rollout_of(template, prompts, responses)
            tokens += tokens_of(rollout)
            for name, source in sources.items():
                score = source.score(rollout)
                for i, row in enumerate(scored):
                    row[f"response{side}"] = responses[i]
                    row[f"score_{name}{side}"] = score.value[i].item()
                    row[f"members_{name}{side}"] = score.members[i].tolist()
                    if score.variances:
                        row[f"variances_{name}{side}"] = score.variances[0][i].tolist()
        return Shard(scored, tokens)

    def _pairs(
        self, run: Run, name: str, units: tuple[Calibration, ...], split: str, rows: Rows, sides: list[str]
    ) -> ScoredPairs:
        """The pairs as the source's yardstick orders them; those that it cannot order are left out and counted."""
        yardstick, is_cost = self.yardsticks[name], name in self.costs
        gold = None if yardstick.gold is None else _both(rows, yardstick.gold, sides)
        if sides[0] == "_chosen":
            first = torch.zeros(len(rows), dtype=torch.int64)
        elif yardstick.preferred is not None:
            first = _column(rows, yardstick.preferred).long()
        else:
            assert gold is not None  # a yardstick has one of the two
            ahead = (gold[:, 1] - gold[:, 0]) * (-1 if is_cost else 1)
            first = (ahead > 0).long()
            kept = ahead != 0
            if not kept.any():
                raise ValueError(
                    f"{split}: {yardstick.gold} ties in all {len(rows)} pairs, so it cannot say what {name} should "
                    "prefer; name a column of labels, stage.yardsticks.<source>.preferred"
                )
            if not kept.all():
                run.warn(0, f"{split}: {name} is not measured on {int((~kept).sum())} of {len(rows)} pairs that tie")
            rows = [row for row, keep in zip(rows, kept.tolist(), strict=True) if keep]
            gold, first = gold[kept], first[kept]
        order = torch.stack([first, 1 - first], dim=1)  # (N, 2): which side comes first
        ids = {each: k for k, each in enumerate(dict.fromkeys(row["id"] for row in rows))}
        has_variances = f"variances_{name}{sides[0]}" in rows[0]
        return ScoredPairs(
            prompt=torch.tensor([ids[row["id"]] for row in rows]),
            score=_ordered(_both(rows, f"score_{name}", sides), order),
            members=_ordered(_both(rows, f"members_{name}", sides), order),
            variances=_ordered(_both(rows, f"variances_{name}", sides), order) if has_variances else None,
            gold=None if gold is None else _ordered(gold, order),
            margin=None if yardstick.margin is None else _column(rows, yardstick.margin),
            unsafe=None if yardstick.safe is None else _ordered(_both(rows, yardstick.safe, sides), order) == 0,
            is_cost=is_cost,
            units=units,
        )

    def _assess(
        self, run: Run, pairs: Mapping[str, Mapping[str, ScoredPairs]]
    ) -> tuple[Metrics, dict[str, dict[str, dict[str, Any]]]]:
        """Metrics, and source -> split -> what is drawn."""
        metrics: Metrics = {}
        result: dict[str, dict[str, dict[str, Any]]] = {}
        accuracy: dict[str, dict[str, Estimate]] = {}
        for name, by_split in pairs.items():
            edges = histogram_edges(list(by_split.values()))
            result[name], accuracy[name] = {}, {}
            for split, each in by_split.items():
                estimates, plain, drawn = self.assessor.assess(each)
                accuracy[name][split] = estimates["accuracy"]
                result[name][split] = drawn | {"histogram": histograms(each, edges)}
                key = f"eval/{split}/value_model/{name}"
                metrics |= {f"{key}/{what}": value for what, value in plain.items()}
                for what, estimate in estimates.items():
                    metrics |= estimate.named(f"{key}/{what}")
            home = self.in_distribution or next(iter(by_split))
            for split in (split for split in by_split if split != home):
                gap = difference(accuracy[name][home], accuracy[name][split])
                metrics |= gap.named(f"gap/{name}/{split}/accuracy")
        undefined = {name.rpartition("/")[0] for name, value in metrics.items() if not math.isfinite(value)}
        if undefined:
            some = ", ".join(sorted(undefined)[:3])
            run.warn(0, f"{len(undefined)} figures are not defined on these data, and left out: {some}, …")
        return {name: value for name, value in metrics.items() if math.isfinite(value)}, result


def _is_sided(dataset: Dataset, rows: Rows) -> bool:
    return {dataset.columns.get(name, name) for name in ("chosen", "rejected")} <= rows[0].keys()


def _of(sides: Mapping[str, Sequence[str]], part: slice) -> dict[str, Sequence[str]]:
    return {side: responses[part] for side, responses in sides.items()}


def _column(rows: Rows, name: str) -> Tensor:
    """(N, …) float64.

    Raises:
        ValueError: a value is missing or not finite.
    """
    values = [row[name] for row in rows]
    told = ((i, each) for i, value in enumerate(values) for each in (value if isinstance(value, list) else [value]))
    for i, each in told:
        if each is None or not math.isfinite(each):
            raise ValueError(f"column {name}, row {i}: {values[i]!r}; expected a finite number")
    return torch.tensor(values, dtype=torch.float64)


def _both(rows: Rows, name: str, sides: Sequence[str]) -> Tensor:
    """(N, 2, …) of the columns of both sides."""
    return torch.stack([_column(rows, f"{name}{side}") for side in sides], dim=1)


def _ordered(values: Tensor, order: Tensor) -> Tensor:
    """(N, 2, …) with the sides of each row in the (N, 2) order."""
    return values[torch.arange(len(values))[:, None], order]
