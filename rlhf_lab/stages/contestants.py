"""Who is compared: policies, which are sampled here, and generation tables, of which the responses are read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_lab.data import generations
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.generations import Generations
from rlhf_lab.data.tables import prompt_of, read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine import ranks
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.models import load_frozen
from rlhf_lab.engine.tokenizer import load_tokenizer, new_token_ids
from rlhf_lab.evaluation.evaluator import under_conditions
from rlhf_lab.evaluation.matches import Answer, Match, Unmatched, matched
from rlhf_lab.interfaces import Conditions
from rlhf_lab.records import Prompt
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.shards import Shard, sharded, tokens_of
from rlhf_lab.types import Count, batches

_NOT_NAMES = ("policy", "data", generations.FILE)  # ends of paths that do not tell one run from another


def is_table(path: str) -> bool:
    """Whether a path is a generation table or a run that left one, rather than a policy: a folder with config.json."""
    place = Path(path).expanduser()
    return place.is_file() or (place.is_dir() and not (place / "config.json").is_file())


def names_of(paths: Sequence[str]) -> list[str]:
    """The ends of the paths that tell them apart, joined by dots: the run's name, if that does."""
    parts = [
        [part.removesuffix(generations.SUFFIX) for part in Path(path).parts if part not in _NOT_NAMES] or [path]
        for path in paths
    ]
    for length in range(1, max(map(len, parts)) + 1):
        names = [".".join(each[-length:]).strip("/") for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"contestants.policies={list(paths)} names one twice; compare different ones")


class Contestants:
    """Several policies' responses to the same prompts.

    Args:
        policies: each a policy (a folder or a hub id), which is sampled here on the data set's held-out prompts; or a
            generation table, or a finished run that left one.
        names: of them; null takes them from the paths.
        splits: that are compared; null for all of the data set or of the tables.
        prompts: of each split, drawn by id and seed, so the same ones of every contestant; null for all. With
            unmatched="drop" they are drawn from those that all contestants share.
        samples_per_prompt: responses to each that are compared; of a table that holds more, the first.
        unmatched: what becomes of responses to what others were not asked: "error", or "drop" and count.
        conditions: what policies are told beside each request. Tables hold what was told.
        prompts_per_shard: prompts between two saves; a killed run continues after its last shard.
    """

    def __init__(
        self,
        *,
        policies: Sequence[str],
        names: Sequence[str] | None,
        splits: Sequence[str] | None,
        prompts: Count | None,
        samples_per_prompt: Count,
        unmatched: Unmatched,
        model: ModelPaths,
        dataset: Dataset,
        conditions: Conditions,
        evaluation_sampling: Sampling,
        hardware: Hardware,
        prompts_per_shard: Count,
    ) -> None:
        self.policies = list(policies)
        if len(self.policies) < 2:
            raise ValueError(f"contestants.policies={self.policies}; it takes two or more to compare")
        self.names = names_of(self.policies) if names is None else list(names)
        if len(self.names) != len(self.policies) or len(set(self.names)) != len(self.names):
            raise ValueError(f"contestants.names={self.names}; expected {len(self.policies)} different ones")
        if odd := [name for name in self.names if "/" in name or not name]:
            raise ValueError(
                f"contestants.names has {odd[0]!r}; a name is part of metrics' names, so no / and not empty"
            )
        self.splits, self.prompts, self.samples_per_prompt = splits, prompts, samples_per_prompt
        self.unmatched: Unmatched = unmatched
        self.model, self.dataset, self.conditions = model, dataset, conditions
        self.sampling, self.hardware, self.prompts_per_shard = evaluation_sampling, hardware, prompts_per_shard

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        for path in self.policies:
            if path not in promised and is_table(path):
                self._splits_of(Generations.open(path))
            else:
                check_path(path, "contestants.policies", promised)
                self.dataset.check(promised)
        if self.sampling.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                f"contestants.samples_per_prompt={self.samples_per_prompt}, but at evaluation_sampling.temperature=0 "
                "they are all the same; take 1"
            )

    def _splits_of(self, table: Generations) -> tuple[str, ...]:
        """Those of a table that are compared: one of `splits`, or one of them under a condition, `<split>:<name>`."""
        there = {split: split.partition(":")[0] for split in table.splits}
        if missing := [split for split in self.splits or () if split not in {*there, *there.values()}]:
            raise ValueError(f"contestants.splits has {missing[0]!r}, but {table.path} has {list(table.splits)}")
        return tuple(
            split for split, of in there.items() if self.splits is None or not {split, of}.isdisjoint(self.splits)
        )

    def matches(self, run: Run, columns: Sequence[str] = ()) -> list[Match]:
        """All responses side by side; the policies among the contestants are sampled, or what was sampled is read.

        Args:
            columns: numbers that are needed of each response, which only tables have.

        Raises:
            ValueError: a table is unfit, see `Generations`; a contestant lacks a column; or they do not match.
        """
        answers: dict[str, list[Answer]] = {}
        shared = self._shared() if self.prompts is not None and self.unmatched == "drop" else {}
        for name, path in zip(self.names, self.policies, strict=True):
            sampled = None
            if not is_table(path):
                if columns:
                    raise ValueError(
                        f"{name} is a policy, which has no column {columns[0]!r} yet; give the table of a run that "
                        "scored it, or name a reward source instead"
                    )
                sampled = run.directory / "generations" / f"{name}.parquet"
                self._sample(run, name, path, sampled, shared)
            table = Generations.open(sampled if sampled else path)
            answers[name] = list(self._read(table, name, columns, run.seed, shared))
        matches, left_out = matched(answers, self.unmatched)
        for name, count in left_out.items():
            run.warn(
                0, f"{count} of {len(answers[name])} responses of {name} answer what others were not asked; left out"
            )
        return matches

    def _shared(self) -> dict[str, set[str]]:
        """Split, its condition aside -> ids of the prompts that every contestant has there, where there are any."""
        found: dict[str, list[set[str]]] = {}
        for path in self.policies:
            mine: dict[str, set[str]] = {}
            if is_table(path):
                table = Generations.open(path)
                for split in self._splits_of(table):
                    mine.setdefault(split.partition(":")[0], set()).update(each for each, _ in table.keys(split))
            else:
                asked = self._asked(self._template(path))
                mine = {split: {prompt.id for prompt in each} for split, each in asked.items()}
            for split, ids in mine.items():
                found.setdefault(split, []).append(ids)
        everywhere = {s: set.intersection(*each) for s, each in found.items() if len(each) == len(self.policies)}
        return {split: ids for split, ids in everywhere.items() if ids}

    def _template(self, path: str) -> Template:
        tokens = [*self.model.new_tokens, *self.conditions.new_tokens]
        return Template(load_tokenizer(path, tokens), self.dataset.template_style)

    def _asked(self, template: Template) -> dict[str, list[Prompt]]:
        """split -> all prompts that a policy may be asked."""
        splits = self.dataset.splits if self.splits is None else tuple(self.splits)
        return {split: self.dataset.prompts(split, template) for split in splits}

    def _chosen(self, ids: Collection[str], split: str, seed: int, shared: Mapping[str, set[str]]) -> set[str]:
        """The prompts that are compared, of those that there are: whichever these ids hash to, so a table's too."""
        within = set(ids) & shared.get(split.partition(":")[0], set(ids))
        ordered = sorted(within, key=lambda each: derive(seed, "contestants", each))
        return set(ordered if self.prompts is None else ordered[: self.prompts])

    def _read(
        self, table: Generations, name: str, columns: Sequence[str], seed: int, shared: Mapping[str, set[str]]
    ) -> Iterator[Answer]:
        wanted = ["prompt_id", "prompt", "condition", "sample", "response", *columns]
        for split in self._splits_of(table):
            chosen = self._chosen([prompt_id for prompt_id, _ in table.keys(split)], split, seed, shared)
            counts: dict[tuple[str, str], int] = {}
            for row in table.rows(split, wanted):
                if row["prompt_id"] not in chosen or row["sample"] >= self.samples_per_prompt:
                    continue
                key = row["prompt_id"], row["condition"]
                counts[key] = counts.get(key, 0) + 1
                prompt = replace(prompt_of(row["prompt"]), id=row["prompt_id"], condition=row["condition"])
                numbers = {column: float(row[column]) for column in columns}
                yield Answer(
                    split=split, prompt=prompt, sample=row["sample"], response=row["response"], columns=numbers
                )
            if short := [key for key, count in counts.items() if count < self.samples_per_prompt]:
                raise ValueError(
                    f"{table.path} ({name}) has fewer than contestants.samples_per_prompt={self.samples_per_prompt} "
                    f"responses to {len(short)} of {len(counts)} prompts of {split}, first {short[0][0]}; ask for fewer"
                )

    def _sample(self, run: Run, name: str, path: str, place: Path, shared: Mapping[str, set[str]]) -> None:
        """Sample a policy, as the table `place`; with equal random numbers for each of them."""
        device = self.hardware.start()
        template = self._template(path)
        self.conditions.check(template)
        asked = self._asked(template)
        for note in self.dataset.notes:
            run.warn(0, f"{name}: {note}")
        chosen = {s: self._chosen([prompt.id for prompt in each], s, run.seed, shared) for s, each in asked.items()}
        policy = load_frozen(
            path,
            device=device,
            dtype=self.model.dtype(self.hardware),
            adapters=self.model.adapters,
            seed=derive(run.seed, "initial weights"),
            new_tokens=new_token_ids(template.tokenizer, [*self.model.new_tokens, *self.conditions.new_tokens]),
        )
        engine = Generator(policy, template, self.sampling)
        kept = {split: [prompt for prompt in each if prompt.id in chosen[split]] for split, each in asked.items()}
        makers = [
            partial(self._shard, engine, name, split, prompts[part], derive(run.seed, "contestants", split, i))
            for split, prompts in under_conditions(kept, self.conditions).items()
            for i, part in enumerate(batches(len(prompts), self.prompts_per_shard))
        ]
        made = sharded(run, f"sampled_{name}", f"sampling {name}", makers)
        if ranks.is_first():
            rows = (row for file in made for row in read_table(file))
            generations.write(place, rows, {"policy": path, "sampling": asdict(self.sampling)})
        ranks.barrier()

    def _shard(self, engine: Generator, name: str, split: str, prompts: Sequence[Prompt], seed: int) -> Shard:
        rollout = engine.generate(prompt_batch(engine.template, prompts), self.samples_per_prompt, seed)
        lengths = rollout.sequences.response_mask.sum(1).tolist()
        rows: list[list[dict[str, Any]]] = [[] for _ in prompts]
        for i, place in enumerate(rollout.group.tolist()):
            prompt, finished = rollout.prompts[i], bool(rollout.finished[i])
            rows[place].append(
                {
                    "run": name,
                    "step": 0,
                    "split": split,
                    "condition": prompt.condition,
                    "prompt_id": prompt.id,
                    "prompt": prompt.written,
                    "sample": len(rows[place]),
                    "response": rollout.responses[i],
                    "finished": finished,
                    "finish_reason": "stop" if finished else "length",
                    "tokens": lengths[i],
                }
            )
        return Shard([row for each in rows for row in each], tokens_of(rollout))
