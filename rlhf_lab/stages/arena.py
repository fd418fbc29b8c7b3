"""Two policies on the same prompts, by reward and cost; who wins, who is safe, and where."""

import csv
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from rlhf_lab.data.tables import read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import rollout_of
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.evaluation.arena import Standing, clusters, standing
from rlhf_lab.evaluation.matches import Match
from rlhf_lab.interfaces import RewardSource
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.run import Run
from rlhf_lab.stages.contestants import Contestants
from rlhf_lab.stages.shards import Shard, sharded, tokens_of
from rlhf_lab.types import Count, Metrics, batches

GOLD, COLUMN = "gold/", "column/"


class Arena:
    """A baseline and a challenger, `contestants.policies` in this order.

    Leaves `comparisons.csv`, a row for each pair of responses with both texts, rewards and costs; `arena.json`, for
    each split everything of `Standing`; and the same as metrics, `arena/<split>/…`. What is sampled here lies in
    `generations/`.

    Args:
        rewards: name -> source; null leaves one out, or all, where what is named below is no source. Only the two that
            are named are loaded.
        reward, cost: what compares: a source; the world's truth as `gold/<name>`; or numbers that both tables hold, as
            `column/<column>`.
        safe_up_to: a response whose cost is at most this is safe, in the units of the cost.
        pairs_per_shard: pairs between two saves; a killed run continues after its last shard.

    Source: Dai et al. 2023, arXiv:2310.12773; see `evaluation/arena.py`.
    """

    def __init__(
        self,
        *,
        contestants: Contestants,
        model: ModelPaths,
        rewards: Mapping[str, Any] | None,
        reward: str,
        cost: str,
        safe_up_to: float,
        hardware: Hardware,
        pairs_per_shard: Count,
    ) -> None:
        self.contestants, self.model, self.hardware = contestants, model, hardware
        self.rewards = {name: source for name, source in (rewards or {}).items() if source is not None}
        self.reward, self.cost, self.safe_up_to = reward, cost, safe_up_to
        self.pairs_per_shard = pairs_per_shard
        if len(contestants.names) != 2:
            raise ValueError(
                f"an arena has two sides, contestants.policies names {len(contestants.names)}; "
                "stage=win_rates compares any number"
            )

    @property
    def columns(self) -> list[str]:
        """What is read of the tables."""
        return [name.removeprefix(COLUMN) for name in (self.reward, self.cost) if name.startswith(COLUMN)]

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        self.contestants.check(promised)
        check_path(self.model.policy, "model.policy", promised)
        gold = self.contestants.dataset.gold
        for role, name in (("reward", self.reward), ("cost", self.cost)):
            if name.startswith(GOLD) and name.removeprefix(GOLD) not in gold:
                raise ValueError(
                    f"stage.{role}={name}, but {self.contestants.dataset.path} has the gold scores {sorted(gold)}"
                )
            if name.startswith((GOLD, COLUMN)):
                continue
            if name not in self.rewards:
                raise ValueError(
                    f"stage.{role}={name}, but the reward sources are {sorted(self.rewards)}; name one of them, "
                    f"{GOLD}<name>, or {COLUMN}<column of the tables>"
                )
            self.rewards[name].check(promised)

    def run(self, run: Run) -> Metrics:
        self.hardware.start()
        run.resume()  # there are no checkpoints: the shards are what it continues from
        matches = self.contestants.matches(run, self.columns)
        template = Template(
            load_tokenizer(self.model.policy, self.model.new_tokens), self.contestants.dataset.template_style
        )
        shard = partial(self._shard, template, self._sources(template))
        makers = [partial(shard, matches[part]) for part in batches(len(matches), self.pairs_per_shard)]
        rows = [row for file in sharded(run, "scored", "scoring pairs", makers) for row in read_table(file)]
        standings = self._standings(rows)
        metrics: Metrics = {}
        for split, found in standings.items():
            metrics |= found.metrics(f"arena/{split}")
            run.console.say(_sentence(split, found))
        run.write_text("comparisons.csv", _as_csv(matches, rows))
        settings = {"reward": self.reward, "cost": self.cost, "safe_up_to": self.safe_up_to}
        sides = dict(zip(("baseline", "challenger"), self.contestants.names, strict=True))
        told = {split: _nested(found.metrics("")) for split, found in standings.items()}
        run.write_text("arena.json", json.dumps({**sides, **settings, "splits": told}, indent=1))
        run.log(0, metrics)
        return metrics

    def _sources(self, template: Template) -> dict[str, RewardSource]:
        """What scores the responses here, by role."""
        sources: dict[str, RewardSource] = {}
        for role, name in (("reward", self.reward), ("cost", self.cost)):
            if name.startswith(GOLD):
                sources[role] = Gold(self.contestants.dataset.gold[name.removeprefix(GOLD)])
            elif not name.startswith(COLUMN):
                sources[role] = self.rewards[name].load(self.hardware, template)
        return sources

    def _shard(self, template: Template, sources: Mapping[str, RewardSource], matches: Sequence[Match]) -> Shard:
        rows: list[dict[str, Any]] = [dict(match.row) for match in matches]
        tokens = 0
        for side in (0, 1):
            answers = [match.answers[side] for match in matches]
            scores: dict[str, list[float]] = {}
            if sources:
                prompts = [match.prompt.plain for match in matches]
                rollout = rollout_of(template, prompts, [answer.response for answer in answers])
                tokens += tokens_of(rollout)
                scores = {role: source.score(rollout).value.tolist() for role, source in sources.items()}
            for role, name in (("reward", self.reward), ("cost", self.cost)):
                if name.startswith(COLUMN):
                    scores[role] = [answer.columns[name.removeprefix(COLUMN)] for answer in answers]
                for row, value in zip(rows, scores[role], strict=True):
                    row[f"{role}_{side}"] = value
        return Shard(rows, tokens)

    def _standings(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Standing]:
        """split -> how the challenger fares."""
        found: dict[str, Standing] = {}
        first, second = self.contestants.names
        for split in dict.fromkeys(row["split"] for row in rows):
            here = [row for row in rows if row["split"] == split]
            reward, cost = (
                torch.tensor([[row[f"{role}_{side}"] for side in (0, 1)] for row in here], dtype=torch.float64)
                for role in ("reward", "cost")
            )
            prompts = clusters([(row["prompt_id"], row["condition"]) for row in here])
            found[split] = standing((first, second), reward, cost, prompts, self.safe_up_to)
        return found


def _nested(metrics: Metrics) -> dict[str, Any]:
    """Metrics by the parts of their names; what is not finite becomes null, which JSON can say."""
    tree: dict[str, Any] = {}
    for name, value in metrics.items():
        *path, leaf = name.strip("/").split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value if math.isfinite(value) else None
    return tree


def _as_csv(matches: Sequence[Match], rows: Sequence[Mapping[str, Any]]) -> str:
    sides = ("baseline", "challenger")
    text = io.StringIO()
    scored = [f"{side}_{what}" for side in sides for what in ("response", "reward", "cost")]
    writer = csv.DictWriter(text, ["split", "condition", "prompt_id", "sample", "prompt", *scored], lineterminator="\n")
    writer.writeheader()
    for match, row in zip(matches, rows, strict=True):
        written: dict[str, Any] = {**match.row, "prompt": match.prompt.request}
        for i, side in enumerate(sides):
            written[f"{side}_response"] = match.answers[i].response
            written |= {f"{side}_{what}": row[f"{what}_{i}"] for what in ("reward", "cost")}
        writer.writerow(written)
    return text.getvalue()


def _sentence(split: str, found: Standing) -> str:
    first, second = found.names
    wins, gap, safe = found.win_rate, found.differences["reward"], found.means["safe", second]
    return (
        f"{split}: {second} beats {first} on {wins.value:.1%} [{wins.low:.1%}, {wins.high:.1%}] of {found.num_prompts} "
        f"prompts; reward {gap.value:+.3g} [{gap.low:+.3g}, {gap.high:+.3g}], cost "
        f"{found.differences['cost'].value:+.3g}; safe {safe.value:.1%}, {first} "
        f"{found.means['safe', first].value:.1%}"
    )
