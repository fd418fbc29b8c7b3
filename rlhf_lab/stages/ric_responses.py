"""What Rewards-in-Context learns from: responses under the rewards that they obtained, given or generated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lab.data.cleaning import Cleaning
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.reward_conditions import RewardContext
from rlhf_lab.data.tables import Rows, read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch, rollout_of
from rlhf_lab.engine.distribution import Distribution
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.interfaces import RewardSource
from rlhf_lab.records import Demonstration, Prompt
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive, generator
from rlhf_lab.stages.shards import Shard, sharded, tokens_of
from rlhf_lab.types import batches


@dataclass(frozen=True)
class Scored:
    """Responses with the raw rewards that they obtained, (N, K), more being better in each."""

    prompts: Sequence[Prompt]
    responses: Sequence[str]
    raw: Tensor

    def __len__(self) -> int:
        return len(self.responses)

    def select(self, index: Tensor) -> "Scored":
        """The rows `index` (int64), in that order."""
        places: list[int] = index.tolist()
        return Scored([self.prompts[i] for i in places], [self.responses[i] for i in places], self.raw[index])

    def lessons(self, context: RewardContext) -> list[Demonstration]:
        """Each response as the one to give when its own rewards are asked for."""
        told = context.standardised(self.raw).tolist()
        return [
            Demonstration(prompt=context.told(prompt, rewards, {}), response=response)
            for prompt, rewards, response in zip(self.prompts, told, self.responses, strict=True)
        ]

    def rows(self, context: RewardContext) -> Rows:
        """A table of them: `raw_<name>`, and `obtained_<name>` in the units that are told."""
        columns = zip(self.raw.tolist(), context.standardised(self.raw).tolist(), strict=True)
        return [
            {"id": prompt.id, "prompt": prompt.written, "response": response}
            | {f"raw_{name}": value for name, value in zip(context.names, raw, strict=True)}
            | {f"obtained_{name}": value for name, value in zip(context.names, told, strict=True)}
            for prompt, response, (raw, told) in zip(self.prompts, self.responses, columns, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The sources of the rewards that are told.

    Fields:
        sources: name -> source, in the order in which they are told.
        costs: names of those whose sign is turned.
        per_shard: responses scored between two saves.
    """

    sources: Mapping[str, RewardSource]
    costs: Sequence[str]
    template: Template
    per_shard: int

    def raw(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> tuple[Tensor, int]:
        """(N, K) float64, what the sources say of each response, more being better; and how many tokens were read."""
        if not responses:
            return torch.zeros(0, len(self.sources), dtype=torch.float64), 0
        rollout = rollout_of(self.template, prompts, responses)
        columns = {name: source.score(rollout).value.double() for name, source in self.sources.items()}
        signed = [-column if name in self.costs else column for name, column in columns.items()]
        return torch.stack(signed, 1), tokens_of(rollout)

    def offline(self, run: Run, data: Mapping[str, Dataset]) -> Scored:
        """The responses of data sets, kind of record -> data, with their rewards."""
        prompts: list[Prompt] = []
        responses: list[str] = []
        for reads, one in data.items():
            _, asked, sides = one.table(one.train_split, reads, self.template)
            for texts in sides.values():
                prompts += asked
                responses += texts
        cuts = batches(len(responses), self.per_shard)
        files = sharded(run, "offline", "scoring", [partial(self._shard, prompts[cut], responses[cut]) for cut in cuts])
        raw = [[row[name] for name in self.sources] for file in files for row in read_table(file)]
        return Scored(prompts, responses, torch.tensor(raw, dtype=torch.float64))

    def _shard(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Shard:
        raw, tokens = self.raw(prompts, responses)
        return Shard([dict(zip(self.sources, row, strict=True)) for row in raw.tolist()], tokens)


@dataclass(frozen=True, kw_only=True)
class Author:
    """Responses of the policy, as it is now, to harder requests, iteration by iteration.

    Fields:
        prompts: to draw from, each once.
        num_prompts: drawn in each iteration.
        with_replacement: whether one may be drawn twice.
    """

    policy: PreTrainedModel
    distribution: Distribution
    judge: Judge
    context: RewardContext
    prompts: Sequence[Prompt]
    sampling: Sampling
    num_prompts: int
    with_replacement: bool
    cleaning: Cleaning

    def rows(self, run: Run, iteration: int) -> Rows:
        """The responses of an iteration, made now or read back; of those that are `dropped` there are no rewards."""
        source = generator(run.seed, "prompts", iteration)
        if self.with_replacement:
            drawn = torch.randint(len(self.prompts), (self.num_prompts,), generator=source)
        else:
            drawn = torch.randperm(len(self.prompts), generator=source)[: self.num_prompts]
        goals = self.context.goals(len(drawn), derive(run.seed, "iteration", iteration)).tolist()
        asked = [self.context.told(self.prompts[i], goal, {}) for i, goal in zip(drawn.tolist(), goals, strict=True)]
        makers = [
            partial(self._shard, asked[cut], goals[cut], derive(run.seed, "generation", iteration, i))
            for i, cut in enumerate(batches(len(asked), self.judge.per_shard))
        ]
        files = sharded(run, f"iteration_{iteration:02d}", f"generating for iteration {iteration}", makers)
        return [row for file in files for row in read_table(file)]

    def _shard(self, asked: Sequence[Prompt], goals: Sequence[Sequence[float]], seed: int) -> Shard:
        names = self.context.names
        make = partial(Generator, template=self.judge.template, sampling=self.sampling)
        engine = self.distribution.engine(self.policy.eval(), make)
        rollout = engine.generate(prompt_batch(self.judge.template, asked), 1, seed)
        responses = zip(rollout.responses, rollout.finished.tolist(), strict=True)
        cleaned = [self.cleaning(*response) for response in responses]
        rows: list[dict[str, Any]] = [
            {"id": prompt.id, "prompt": prompt.written, "response": text, "dropped": why}
            | {f"goal_{name}": value for name, value in zip(names, goal, strict=True)}
            for prompt, (text, why), goal in zip(asked, cleaned, goals, strict=True)
        ]
        fit = [(prompt.plain, text) for prompt, (text, why) in zip(asked, cleaned, strict=True) if not why]
        raw, _ = self.judge.raw([prompt for prompt, _ in fit], [text for _, text in fit])
        found = iter(raw.tolist())
        for row in rows:
            obtained = [float("nan")] * len(names) if row["dropped"] else next(found)
            row |= {f"raw_{name}": value for name, value in zip(names, obtained, strict=True)}
        return Shard(rows, tokens_of(rollout))

    def fit(self, rows: Rows) -> Scored:
        """Those of the rows that were not dropped."""
        by_id = {prompt.id: prompt for prompt in self.prompts}
        kept = [row for row in rows if not row["dropped"]]
        raw = [[row[f"raw_{name}"] for name in self.context.names] for row in kept]
        return Scored(
            [by_id[row["id"]] for row in kept],
            [row["response"] for row in kept],
            torch.tensor(raw, dtype=torch.float64).reshape(len(kept), len(self.context.names)),
        )
