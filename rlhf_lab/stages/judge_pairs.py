"""Preference data from a judge: every pair is asked under every preference, and what is said becomes training pairs."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.noise import LabelNoise, Recipe
from rlhf_lab.data.pairs import said
from rlhf_lab.data.preferences import Registry
from rlhf_lab.data.tables import Rows, read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.verdicts import MarginBy, Ties, comparison, noisy, preference_rows, verdict_row
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.functional.resampling import mean_interval
from rlhf_lab.interfaces import Judge
from rlhf_lab.judges.price import account, announce
from rlhf_lab.records import Comparison
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.shards import Shard, sharded, write_splits
from rlhf_lab.types import Count, Fraction, Metrics, batches

Question = tuple[str, dict[str, Any]]  # a preference, and the pair to be judged by it


class JudgePairs:
    """Pairs judged, as `verdicts/<split>.parquet`, and as data for a reward model, `data/<split>.parquet`.

    Verdicts have a row for each pair and preference: id, prompt, preference, sampled_under, response_0, response_1,
    asked, wins_shown_first and wins_shown_second (1 where response 0 is better, .5 for a tie, null where the reply
    could not be read), wins, score_0, score_1, and reasons. The data have id, prompt, preference, condition,
    response_0, response_1, better, clean_better (before the noise), margin, wins; each held-out split is also there for
    every preference alone, as `<split>_<preference>`.

    Two texts in answer to one prompt are asked once under a preference, whoever wrote them. A prompt of a held-out
    split leaves the training split. All that is left out is counted.

    Args:
        dataset: a table of pairs, of `stage=rollout_pairs`, `stage=pair_up` or one's own: prompt, response_0,
            response_1, and if `criteria` is null `preference`.
        judge: who is asked; it never sees what a policy was told.
        preferences: whose words a reward model reads after the request, the column `condition`.
        criteria: preferences by which every pair is judged; null: by those that it was sampled under, one by one.
        conditioned: whether the data say by which preference each pair was judged. false for a reward model of one
            criterion, which need not be in the registry then.
        ties, margin_by: see `preference_rows`.
        noise, noise_recipe: of the training labels, see `LabelNoise`.
        pairs_per_shard: pairs between two saves; a killed run continues after its last shard.

    Source: annotation and reward models of Personalized Soups, Jang et al. 2023, arXiv:2310.11564, whose code lacks the
        step from verdicts to training pairs.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        judge: Judge,
        preferences: Registry,
        hardware: Hardware,
        criteria: Sequence[str] | None,
        conditioned: bool,
        ties: Ties,
        margin_by: MarginBy,
        noise: Fraction,
        noise_recipe: Recipe,
        pairs_per_shard: Count,
    ) -> None:
        self.model, self.dataset, self.judge, self.preferences = model, dataset, judge, preferences
        self.hardware, self.conditioned, self.noise = hardware, conditioned, noise
        self.criteria = None if criteria is None else tuple(criteria)
        self.ties: Ties = ties
        self.margin_by: MarginBy = margin_by
        self.noise_recipe: Recipe = noise_recipe
        self.pairs_per_shard = pairs_per_shard

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        self.dataset.check(promised, "pairs", is_copied=True)
        if self.dataset.is_world:
            raise ValueError(
                f"stage=judge_pairs needs pairs, and {self.dataset.path} draws prompts and demonstrations only; make "
                "some with stage=rollout_pairs, or name a table (dataset=tiny_help_told_pairs)"
            )
        if self.criteria is not None and (not self.criteria or len(set(self.criteria)) < len(self.criteria)):
            raise ValueError(f"stage.criteria={list(self.criteria)}; expected different preferences, or null")
        if self.conditioned and self.criteria is not None:
            self.preferences.check(self.criteria)
        if not self.conditioned and len(self.criteria or ()) != 1:
            raise ValueError(
                f"stage.criteria={self.criteria and list(self.criteria)} with stage.conditioned=false: pairs judged by "
                "several preferences would contradict each other; name one, or set stage.conditioned=true"
            )
        self.judge.check(self.criteria or self.preferences.names, promised)

    def run(self, run: Run) -> Metrics:
        names = self.dataset.made
        self.hardware.start()
        template = Template(load_tokenizer(self.model.policy, self.model.new_tokens), self.dataset.template_style)
        tables = {split: self.dataset.table(split, "pairs", template) for split in names}
        held_out = {prompt.id for split, read in tables.items() if names[split] != "train" for prompt in read[1]}
        judge = self.judge.load(self.hardware, template)
        run.resume()  # there are no checkpoints: the shards are what it continues from
        for note in self.dataset.notes:
            run.warn(0, note)
        metrics: Metrics = {}
        judged: dict[str, Rows] = {}
        made: dict[str, Rows] = {}
        questions: dict[str, tuple[list[Question], Counter[str]]] = {}
        for split, (rows, prompts, _) in tables.items():
            name = names[split]
            pairs = [
                {**row, "id": prompt.id, "prompt": prompt.written} for row, prompt in zip(rows, prompts, strict=True)
            ]
            questions[split] = self._questions(pairs, held_out if name == "train" else set())
        parts = {
            split: [asked[part] for part in batches(len(asked), self.pairs_per_shard)]
            for split, (asked, _) in questions.items()
        }
        pieces = [piece for each in parts.values() for part in each for piece in _by_criterion(part).items()]
        announce(judge, pieces, run.console.say)
        for split, (_, left_out) in questions.items():
            name = names[split]
            shards = [partial(self._shard, judge, part) for part in parts[split]]
            files = sharded(run, split, f"judging pairs of {split}", shards)
            judged[name] = [row for file in files for row in read_table(file)]
            data, unused = self._learnable(judged[name], name, run.seed)
            left_out.update(unused)  # += would drop the reasons that nothing was left out for
            made |= data
            metrics |= {f"{name}/left_out/{reason}": float(count) for reason, count in left_out.items()}
            metrics |= {f"{table}/pairs": float(len(kept)) for table, kept in data.items()}
            metrics |= {f"verdicts/{name}/{key}": value for key, value in verdict_metrics(judged[name]).items()}
            run.console.say(f"{split}: {len(data[name])} pairs of {len(judged[name])} verdicts; {said(left_out)}")
            if not data[name]:
                raise ValueError(
                    f"no pair of {split} is left: {said(left_out)}; judge more pairs, or decide ties (stage.ties=coin)"
                )
        account(judge, run.console.say)
        run.make("verdicts", partial(write_splits, judged))
        run.make("data", partial(write_splits, made))
        run.log(0, metrics)
        return metrics

    def _questions(self, pairs: Rows, kept_apart: Collection[str]) -> tuple[list[Question], Counter[str]]:
        """Every pair with every preference by which it is to be judged; and what is not asked, by reason.

        Raises:
            ValueError: a pair does not say under which preferences it was sampled, and none are given.
        """
        asked: list[Question] = []
        left_out: Counter[str] = Counter(held_out=0, repeated=0)
        seen: set[tuple[str, str, frozenset[str]]] = set()
        for i, pair in enumerate(pairs):
            for criterion in self.criteria or self._sampled_under(pair, i):
                question = criterion, pair["id"], frozenset((pair["response_0"], pair["response_1"]))
                if pair["id"] in kept_apart:
                    left_out["held_out"] += 1
                elif question in seen:
                    left_out["repeated"] += 1
                else:
                    asked.append((criterion, pair))
                    seen.add(question)
        return asked, left_out

    def _sampled_under(self, pair: Mapping[str, Any], row: int) -> tuple[str, ...]:
        if not (named := pair.get("preference")):
            raise ValueError(
                f"{self.dataset.path}, row {row}: the pair does not say under which preference it was sampled (column "
                "preference); name those to judge by, stage.criteria=[<preference>, …]"
            )
        return self.preferences.held(named)

    def _shard(self, judge: Judge, asked: Sequence[Question]) -> Shard:
        rows: Rows = []
        for criterion, comparisons in _by_criterion(asked).items():
            pairs = [pair for by, pair in asked if by == criterion]
            verdicts = judge.compare(comparisons, criterion)
            rows += [verdict_row(pair, criterion, verdict) for pair, verdict in zip(pairs, verdicts, strict=True)]
        return Shard(rows, 0)

    def _learnable(self, verdicts: Rows, name: str, seed: int) -> tuple[dict[str, Rows], Counter[str]]:
        """The tables of a split: all of its pairs, and, held out, those of each of several preferences."""
        told = self.preferences.wordings["reward_model"] if self.conditioned else None
        held_out = name != "train"
        rows, left_out = preference_rows(
            verdicts, ties=self.ties, margin_by=self.margin_by, told=told, held_out=held_out, seed=seed
        )
        if not held_out:
            return {
                name: noisy(rows, LabelNoise(recipe=self.noise_recipe, rate=self.noise, seed=derive(seed, "noise")))
            }, left_out
        several = sorted({row["preference"] for row in rows})
        apart = {f"{name}_{each}": [row for row in rows if row["preference"] == each] for each in several}
        return {name: rows, **(apart if len(several) > 1 else {})}, left_out


def _by_criterion(asked: Iterable[Question]) -> dict[str, list[Comparison]]:
    found: dict[str, list[Comparison]] = {}
    for criterion, pair in asked:
        found.setdefault(criterion, []).append(comparison(pair))
    return found


def verdict_metrics(verdicts: Rows) -> Metrics:
    """Of each preference, with 95 % Student-t intervals over prompts (`ci95`, half their width).

    `first_shown`: how often the response wins that is shown first, which is one half for a judge without a liking for
    a place; `consistent`: share of the pairs on which both orders say the same; `tied`, of those that could be read.
    """
    metrics: Metrics = {}
    for preference in dict.fromkeys(row["preference"] for row in verdicts):
        rows = [row for row in verdicts if row["preference"] == preference]
        metrics[f"{preference}/verdicts"] = float(len(rows))
        metrics[f"{preference}/unreadable"] = float(sum(row["wins"] is None for row in rows))
        by_prompt: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            first, second = row["wins_shown_first"], row["wins_shown_second"]
            said = by_prompt.setdefault(row["id"], {"first_shown": [], "consistent": [], "tied": []})
            said["first_shown"] += [
                value for value in (first, None if second is None else 1 - second) if value is not None
            ]
            said["consistent"] += [] if None in (first, second) else [float(first == second)]
            said["tied"] += [] if row["wins"] is None else [float(row["wins"] == 0.5)]
        for key in ("first_shown", "consistent", "tied"):
            means = [sum(said[key]) / len(said[key]) for said in by_prompt.values() if said[key]]
            if means:
                metrics[f"{preference}/{key}/mean"], metrics[f"{preference}/{key}/ci95"] = mean_interval(
                    torch.tensor(means)
                )
    return metrics
