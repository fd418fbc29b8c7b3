"""A data set as every stage reads it: prompts, demonstrations or pairs of a named split, whatever they come from."""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from rlhf_lab.data import tiny_help
from rlhf_lab.data.columns import Columns
from rlhf_lab.data.conflicts import OnConflict, Settled, settle_preferences, settle_safety
from rlhf_lab.data.fitting import DUPLICATE, BadRows, Item, Limits, Measured, RowFilter, ids_that_recur, measure
from rlhf_lab.data.hub import Named
from rlhf_lab.data.noise import LabelNoise, Recipe
from rlhf_lab.data.readers import Rows
from rlhf_lab.data.sameness import Same
from rlhf_lab.data.selection import Selection
from rlhf_lab.data.shapes import Shape
from rlhf_lab.data.source import OnOverlap, Source
from rlhf_lab.data.splits import Table, check_shares
from rlhf_lab.data.statistics import Counted, Lengths, SplitStatistics
from rlhf_lab.data.tables import check_table, need
from rlhf_lab.data.templates import Style, Template
from rlhf_lab.records import Demonstration, PreferencePair, Prompt, Quadruple, Ranking, SafetyPair
from rlhf_lab.seeds import derive
from rlhf_lab.types import Count, Fraction

WORLD = "embedded:tiny_help"
GOLD: Mapping[str, Callable[[str, str], float]] = {
    "helpfulness": tiny_help.helpfulness,
    "cost": tiny_help.cost,
    "humour": tiny_help.humour,
}
# kinds of record that have a label to be wrong
NOISY = ("preferences", "safety_pairs", "quadruples")


class Dataset:
    """Records by split.

    Args:
        path: a jsonl, json, csv, parquet or arrow file; a folder of such files named by split; a hub id; or the
            embedded world, `embedded:tiny_help`, which draws fresh records from a seed.
        revision: of a hub data set.
        columns: name here -> name in the data, null where they agree. Names here: prompt, response, or instead of both
            messages, a conversation that ends with the response (demonstrations);
            chosen, rejected, or response_0, response_1, better (preferences); margin, or of the two sides
            score_chosen, score_rejected or score_0, score_1, whose difference is the margin; response_0, response_1,
            safer, safe_0, safe_1 (safety); responses, a list, best first, or in the order that a list of numbers,
            ranks, says, the lowest best (rankings); condition, which is read after the request (all of these but
            prompts); strong_ and weak_ with prompt, chosen, rejected, condition (quadruples). `better` and `safer`
            are 0 or 1. A name in the data that no row has is refused by what reads it.
        template: how conversations are written for the model; "auto" takes the tokenizer's own if it has one. Rows that
            hold what it writes between turns are bad rows.
        max_prompt_tokens, max_response_tokens: longer rows are bad rows.
        bad_rows: "error" refuses a data set with empty, duplicate or overlong rows; "drop" drops and counts them.
        on_conflict: what becomes of safety pairs of which the safer response alone is labelled unsafe, and of
            preferences that some rows say one way round and some the other: "keep" them as they are, since labels are
            noisy; "drop" them; "relabel", the safe one is then the safer, and a pair is as most of its rows say; or an
            "error".
        train_size: records of a training split; null for all. The embedded world needs a number.
        train_split: the name of the training split.
        eval_splits: held-out splits, evaluated apart and never blended; null for every split but the training one.
        eval_size: records of each.
        hold_out: share of the prompts of a data set with a single split that becomes its held-out split: the first of
            eval_splits, "test" if that is null. Of quadruples it is the share of the strong prompts.
        seed: of what is drawn: the embedded world's records, or the subset of a larger table.
        shape: turns a row of the source into rows with the names here, before anything else; see `data.shapes`.
        select: says which of these rows are read at all; see `data.selection`.
        rest: null, and the rows that are not selected are left out; or a name: those of a split are then a split of
            their own, `<split>_<rest>`, such as test_ood beside test.
        files: split -> which files of the hub data set or of the folder it is, by patterns such as data/train-*; null
            for those that are named by split. A path that is a file is read whole.
        shares: split -> share of the prompts of the training split that it gets by a hash of the prompt, such as train,
            candidate, safety and held_out; null leaves splits as they are. It stands in the place of hold_out.
        on_overlap: what becomes of rows of the training split whose prompt is in a held-out split that is evaluated:
            "keep" them; "drop" them; or an "error".
        duplicates: which rows, and which prompts of two splits, are the same: those that are so letter for letter,
            "exact", or but for case and white space, "normalised".
        min_prompt_tokens, min_response_tokens: shorter rows are bad rows; an EOS is a token.
        noise, noise_recipe: share of the training pairs whose label is wrong on purpose, and how they are chosen; see
            `LabelNoise`.
    """

    def __init__(
        self,
        *,
        path: str,
        revision: str | None,
        columns: Mapping[str, str | None],
        template: Style,
        max_prompt_tokens: Count,
        max_response_tokens: Count,
        bad_rows: BadRows,
        on_conflict: OnConflict,
        train_size: Count | None,
        train_split: str,
        eval_splits: Sequence[str] | None,
        eval_size: Count,
        hold_out: Fraction,
        seed: int,
        shape: Shape | None = None,
        select: Selection | None = None,
        rest: str | None = None,
        files: Named | None = None,
        shares: Mapping[str, float] | None = None,
        on_overlap: OnOverlap = "keep",
        duplicates: Same = "exact",
        min_prompt_tokens: Count = 1,
        min_response_tokens: Count = 1,
        noise: Fraction = 0.0,
        noise_recipe: Recipe = "exact",
    ) -> None:
        self.path, self.revision = path, revision
        self.columns = {name: column for name, column in columns.items() if column is not None}
        self.template_style: Style = template
        self.limits = Limits(
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            min_prompt_tokens=min_prompt_tokens,
            min_response_tokens=min_response_tokens,
        )
        self.bad_rows: BadRows = bad_rows
        self.on_conflict: OnConflict = on_conflict
        self.train_size, self.train_split = train_size, train_split
        self.eval_splits = None if eval_splits is None else tuple(eval_splits)
        self.eval_size, self.seed = eval_size, seed
        self.duplicates: Same = duplicates
        self.noise = LabelNoise(recipe=noise_recipe, rate=noise, seed=seed) if noise else None
        self.counted = Counted()
        self._dropped: dict[str, int] = {}
        self._cells = Columns(self.columns)
        self._source = Source(
            path=path,
            revision=revision,
            files=files,
            columns=self._cells,
            shape=shape,
            select=select,
            rest=rest,
            train_split=train_split,
            eval_splits=self.eval_splits,
            hold_out=hold_out,
            shares=shares,
            on_overlap=on_overlap,
            duplicates=duplicates,
        )
        self.notes = self._source.notes  # what there is to say of the rows, so far as they were read
        if shares is not None:
            check_shares(shares, train_split)
        if self.is_world and (shares is not None or shape is not None or select is not None):
            raise ValueError(
                "dataset.shares, .shape and .select are of tables, but the embedded world draws its records; leave "
                "them null, or write a table of it first (stage=annotate)"
            )
        if self.is_world and train_size is None:
            raise ValueError("dataset.train_size is null, but the embedded world has no end; give a number")
        if self.is_world and eval_splits is None:
            raise ValueError("dataset.eval_splits is null, but the embedded world does not list its splits; name them")

    @property
    def is_world(self) -> bool:
        return self.path == WORLD

    @property
    def gold(self) -> Mapping[str, Callable[[str, str], float]]:
        """The true scores, if the data come from a world that has them."""
        return GOLD if self.is_world else {}

    def check(self, promised: Collection[str] = (), reads: str = "prompts", *, is_copied: bool = False) -> None:
        """Refuse a path that is not there, nor promised to be, and a local table without the columns for `reads`.

        A path is promised by its folder too: what a run leaves is a folder, of which this may be one table.

        Args:
            is_copied: a table is made of each split, so no two may be called alike, see `made`.

        Raises:
            ValueError: saying what is there and what to do.
        """
        self._refuse_noise(reads)
        if is_copied and self.eval_splits is not None:
            self._refuse_two_named_train(self.eval_splits)
        if self.is_world or not {self.path, str(Path(self.path).parent)}.isdisjoint(promised):
            return
        if self.path.startswith("embedded:"):
            raise ValueError(f"dataset.path={self.path}: the only embedded world is {WORLD}")
        check_table(self.path)
        if Path(self.path).expanduser().exists():
            self._raw(reads, self.train_split)

    @property
    def splits(self) -> tuple[str, ...]:
        """Held-out splits that are there to be evaluated.

        Raises:
            ValueError: a named one is not there.
        """
        if self.is_world:
            return self.eval_splits or ()
        there = self._source.tables()
        if self.eval_splits is None:
            return tuple(split for split in there if split != self.train_split)
        if missing := [split for split in self.eval_splits if split not in there]:
            raise ValueError(
                f"{self.path} has the splits {sorted(there)}, not {missing}; change dataset.eval_splits "
                "(null: every split but the training one)"
            )
        return self.eval_splits

    @property
    def made(self) -> dict[str, str]:
        """split -> the name of the table that a stage makes of it: that of the training split is "train".

        Raises:
            ValueError: another split is called so.
        """
        self._refuse_two_named_train(self.splits)
        return {self.train_split: "train"} | {split: split for split in self.splits if split != self.train_split}

    def _refuse_two_named_train(self, splits: Collection[str]) -> None:
        if self.train_split != "train" and "train" in splits:
            raise ValueError(
                f"what is made of the training split {self.train_split!r} of {self.path} is called 'train', but so is "
                "a held-out split; leave it out of dataset.eval_splits, or set dataset.train_split=train"
            )

    def _refuse_noise(self, reads: str) -> None:
        """Wrong labels are of pairs, and for what learns from them."""
        if self.noise is not None and reads not in NOISY:
            raise ValueError(
                f"dataset.noise={self.noise.rate}, but {reads} have no label to be wrong; set it to 0, or set it "
                "where pairs are learnt from"
            )

    def prompt_ids(self, split: str, reads: str = "prompts") -> set[str]:
        """Ids of the prompts of a split, of rows that would be dropped too; `reads`: prompts or demonstrations.

        Raises:
            ValueError: there is no such split, or it has no prompts.
        """
        if not self.is_world:
            return {prompt.id for prompt in self._cells.prompts(self._raw("prompts", split))}
        size, seed = self._size(split), self._seed(split)
        if reads == "demonstrations":
            return {record.prompt.id for record in tiny_help.demonstrations(split, size, seed)}
        return {prompt.id for prompt in tiny_help.sample_prompts(split, size, seed)}

    def prompts(self, split: str, template: Template) -> list[Prompt]:
        """The prompts of a split, each once."""
        if self.is_world:
            drawn = tiny_help.sample_prompts(split, self._size(split), self._seed(split))
            table, items = self._drawn(split, len(drawn)), [(prompt, ()) for prompt in drawn]
        else:
            table = self._raw("prompts", split)
            items = [(prompt.plain, ()) for prompt in self._cells.prompts(table)]
        kept, measured = self._fitting(table, items, template)
        self._count(split, "prompts", table, items, kept, measured)
        return [items[i][0] for i in kept]

    def demonstrations(self, split: str, template: Template) -> list[Demonstration]:
        """Responses to imitate."""
        if self.is_world:
            drawn = tiny_help.demonstrations(split, self._size(split), self._seed(split))
            table = self._drawn(split, len(drawn))
            items: list[Item] = [(record.prompt, (record.response,)) for record in drawn]
        else:
            table = self._raw("demonstrations", split)
            items = self._items(table, "response")
        kept, measured = self._fitting(table, items, template, recurs=self.is_world)
        self._count(split, "demonstrations", table, items, kept, measured)
        return [Demonstration(prompt=items[i][0], response=items[i][1][0]) for i in kept]

    def preferences(self, split: str, template: Template) -> list[PreferencePair]:
        """Pairs, the preferred response first."""
        table, cells = self._raw("preferences", split), self._cells
        sided = cells.is_sided(table)
        items = self._items(table, *(("chosen", "rejected") if sided else ("response_0", "response_1")))
        better = [0 if sided else cells.label(table, i, "better") for i in range(len(table))]
        items = [(prompt, texts[::-1] if b else texts) for (prompt, texts), b in zip(items, better, strict=True)]
        kept, measured = self._fitting(table, items, template, distinct=True)
        settled = settle_preferences(
            items,
            measured.identities,
            kept,
            self.on_conflict,
            self.duplicates,
            table.name,
            table.row,
        )
        self._note(settled.note)
        flipped = self._flipped(split, [measured.identities[i] for i in settled.kept])
        records: list[PreferencePair] = []
        for place, i in enumerate(settled.kept):
            prompt, (chosen, rejected) = items[i]
            first, second = ("chosen", "rejected") if sided else (f"{better[i]}", f"{1 - better[i]}")
            wrong = place in flipped
            gaps = {n: -gap if wrong else gap for n, gap in cells.gaps(table, i, first, second).items()}
            margin = gaps.pop(
                "", 0.0
            )  # what scores say stays true of the responses; who errs says how much all the same
            if table.rows[i].get(cells["margin"]) is not None:
                margin = cells.number(table, i, cells["margin"])
            if wrong:
                chosen, rejected = rejected, chosen
            records.append(PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin, gaps=gaps))
        lengths = measured.response_tokens[settled.kept]
        labels = {"the preferred response is the longer": float((lengths[:, 0] > lengths[:, 1]).mean())}
        if not sided:
            labels["response_0 is preferred"] = 1 - float(np.mean([better[i] for i in settled.kept]))
        self._count(split, "preferences", table, items, settled.kept, measured, settled, labels, flipped)
        return records

    def quadruples(self, split: str, template: Template) -> list[Quadruple]:
        """Two pairs a row, the stronger preference first; `stage=quadruples` makes them of pairs with margins.

        Each is read under its own condition, `strong_condition` or `weak_condition`; without these, under `condition`.
        """
        table = self._raw("quadruples", split)
        sides = [
            self._items(table, f"{side}_chosen", f"{side}_rejected", side=f"{side}_") for side in ("strong", "weak")
        ]
        halves = [self._measured(table, items, template, distinct=True) for items in sides]
        faults = [
            a or b or ("two equal pairs" if strong == weak else "")
            for a, b, strong, weak in zip(*(half.faults for half in halves), *sides, strict=True)
        ]
        both = [a + b for a, b in zip(*(half.identities for half in halves), strict=True)]
        kept = self._sifted(table, faults, both)
        measured = Measured(
            faults=faults,
            identities=both,
            prompt_tokens=np.stack([half.prompt_tokens for half in halves], axis=1),
            response_tokens=np.concatenate([half.response_tokens for half in halves], axis=1),
        )
        flipped = [self._flipped(split, [half.identities[i] for i in kept]) for half in halves]
        self._count(split, "quadruples", table, sides[0], kept, measured, flipped=flipped[0] | flipped[1])
        records: list[Quadruple] = []
        for place, i in enumerate(kept):
            strong, weak = (
                PreferencePair(
                    prompt=items[i][0],
                    chosen=items[i][1][place in wrong],
                    rejected=items[i][1][place not in wrong],
                    margin=0.0,
                )
                for items, wrong in zip(sides, flipped, strict=True)
            )
            records.append(Quadruple(strong=strong, weak=weak))
        return records

    def safety_pairs(self, split: str, template: Template) -> list[SafetyPair]:
        """Pairs, the safer response first; those whose labels contradict each other as `on_conflict` says.

        Raises:
            ValueError: some do, and that is an error, or none is left.
        """
        table = self._raw("safety_pairs", split)
        items = self._items(table, "response_0", "response_1")
        kept, measured = self._fitting(table, items, template)
        records: list[SafetyPair] = []
        for i in kept:
            safer, *safe = (self._cells.label(table, i, name) for name in ("safer", "safe_0", "safe_1"))
            prompt, both = items[i]
            records.append(
                SafetyPair(
                    prompt=prompt,
                    safer=both[safer],
                    unsafer=both[1 - safer],
                    safer_is_unsafe=not safe[safer],
                    unsafer_is_unsafe=not safe[1 - safer],
                )
            )
        settled = settle_safety(records, self.on_conflict, table.name, lambda place: table.row(kept[place]))
        self._note(settled.note)
        records = [records[k].swapped if k in settled.relabelled else records[k] for k in settled.kept]
        kept = [kept[k] for k in settled.kept]
        flipped = self._flipped(split, [measured.identities[i] for i in kept])
        records = [record.swapped if place in flipped else record for place, record in enumerate(records)]
        labels = {
            "the safer response is unsafe": float(np.mean([record.safer_is_unsafe for record in records])),
            "the other response is unsafe": float(np.mean([record.unsafer_is_unsafe for record in records])),
        }
        self._count(split, "safety_pairs", table, items, kept, measured, settled, labels, flipped)
        return records

    def rankings(self, split: str, template: Template) -> list[Ranking]:
        """Two or more responses a row, the best first."""
        table = self._raw("rankings", split)
        prompts = self._cells.prompts(table)
        items = [(prompt, self._cells.ranked(table, i)) for i, prompt in enumerate(prompts)]
        kept, measured = self._fitting(table, items, template, distinct=True)
        self._count(split, "rankings", table, items, kept, measured)
        return [Ranking(prompt=items[i][0], responses=items[i][1]) for i in kept]

    def labelled(self, split: str, column: str, template: Template) -> list[tuple[Prompt, str, float]]:
        """(prompt, response, value) of both responses of each pair, for a column `<column>_0`, `<column>_1`."""
        wanted = ["prompt", "response_0", "response_1", f"{column}_0", f"{column}_1"]
        table = self._rows(split, wanted, f"calibration on {column}")
        items = self._items(table, "response_0", "response_1")
        kept, _ = self._fitting(table, items, template)
        return [
            (items[i][0], items[i][1][side], self._cells.number(table, i, self._cells[f"{column}_{side}"]))
            for i in kept
            for side in (0, 1)
        ]

    def table(self, split: str, reads: str, template: Template) -> tuple[Rows, list[Prompt], dict[str, list[str]]]:
        """The rows of a split as they stand, but for bad ones: rows, their prompts, and the responses of each side.

        A side is what its columns end with: "" (demonstrations), "_0" and "_1", or "_chosen" and "_rejected" (pairs).

        Raises:
            ValueError: labels are to be wrong, which rows as they stand are not.
        """
        if self.noise is not None and split == self.train_split:
            raise ValueError(
                f"dataset.noise={self.noise.rate}, but rows are copied as they are; set it to 0 here, and set it where "
                "they are learnt from"
            )
        if self.is_world:
            drawn = self.demonstrations(split, template)
            rows = [{"id": r.prompt.id, "prompt": r.prompt.request, "response": r.response} for r in drawn]
            return rows, [r.prompt for r in drawn], {"": [r.response for r in drawn]}
        table = self._raw(reads, split)
        sides = {"": "response"} if reads == "demonstrations" else {"_0": "response_0", "_1": "response_1"}
        if reads == "preferences" and self._cells.is_sided(table):
            sides = {"_chosen": "chosen", "_rejected": "rejected"}
        items = self._items(table, *sides.values())
        is_unjudged = reads == "pairs"  # which a judge may be asked twice, under different preferences
        kept, measured = self._fitting(table, items, template, distinct=is_unjudged, recurs=is_unjudged)
        self._count(split, reads, table, items, kept, measured)
        responses = {side: [items[i][1][k] for i in kept] for k, side in enumerate(sides)}
        return [table.rows[i] for i in kept], [items[i][0] for i in kept], responses

    def _items(self, table: Table, *names: str, side: str = "") -> list[Item]:
        prompts = self._cells.prompts(table, side)
        return [(prompt, self._cells.texts(table, i, *names)) for i, prompt in enumerate(prompts)]

    def _raw(self, reads: str, split: str) -> Table:
        """The rows of a split, with the columns that `reads` needs, and those that it is told to read.

        Raises:
            ValueError: a column is missing.
        """
        table = self._rows(split, [], reads)
        self._cells.check(table, reads)
        return table

    def _rows(self, split: str, wanted: Sequence[str], purpose: str) -> Table:
        if self.is_world:
            raise ValueError(f"{purpose} needs labelled rows; {WORLD} draws prompts and demonstrations only")
        tables = self._source.tables()
        if split not in tables:
            raise ValueError(f"{self.path} has the splits {sorted(tables)}, not {split!r}; change dataset.train_split")
        table = tables[split]
        need(table.rows, self.columns, wanted, table.name, purpose)
        size = self.train_size if split == self.train_split else self.eval_size
        if size is not None and size < len(table):
            drawn = sorted(random.Random(self._seed(split)).sample(range(len(table)), size))
            table = table.take(drawn, f"another row drawn ({'train' if split == self.train_split else 'eval'}_size)")
        return table

    def _drawn(self, split: str, size: int) -> Table:
        """The rows of the embedded world, which stand nowhere."""
        return Table(name=f"{self.path} ({split})", rows=[{}] * size, numbers=range(size), total=size)

    def _size(self, split: str) -> int:
        return self.train_size or 0 if split == self.train_split else self.eval_size

    def _seed(self, split: str) -> int:
        return derive(self.seed, "dataset", split)

    def _note(self, note: str) -> None:
        if note:
            self.notes.append(note)

    def _measured(self, table: Table, items: Sequence[Item], template: Template, *, distinct: bool) -> Measured:
        return measure(table.name, items, template, self.limits, self.duplicates, distinct=distinct)

    def _fitting(
        self,
        table: Table,
        items: Sequence[Item],
        template: Template,
        *,
        distinct: bool = False,
        recurs: bool = False,
    ) -> tuple[list[int], Measured]:
        """Rows that are whole, new, and neither too short nor too long: their places, and what was counted of all.

        Args:
            distinct: the texts of a row must differ.
            recurs: a row may be there more than once.
        """
        measured = self._measured(table, items, template, distinct=distinct)
        return self._sifted(table, measured.faults, measured.identities, recurs=recurs), measured

    def _sifted(
        self, table: Table, faults: Sequence[str], identities: Sequence[bytes], *, recurs: bool = False
    ) -> list[int]:
        bad = RowFilter(table.name, self.bad_rows)
        unnamed = ids_that_recur(table, self.columns["id"]) if "id" in self.columns else {}
        seen: set[bytes] = set()
        kept: list[int] = []
        for i, (fault, identity) in enumerate(zip(faults, identities, strict=True)):
            if reason := fault or unnamed.get(i) or (DUPLICATE if identity in seen and not recurs else ""):
                bad.reject(table.row(i), reason)
            else:
                kept.append(i)
            seen.add(identity)
        self._note(bad.report(len(table)))
        self._dropped = {reason: len(rows) for reason, rows in bad.reasons.items()}
        return kept

    def _flipped(self, split: str, identities: Sequence[bytes]) -> set[int]:
        """Places of the pairs whose label is wrong on purpose: none but in training."""
        if self.noise is None or split != self.train_split:
            return set()
        flipped = self.noise.flipped(identities)
        self._note(
            f"{self.path} ({split}): the labels of {len(flipped)} of {len(identities)} pairs are wrong on purpose "
            f"(dataset.noise={self.noise.rate}, {self.noise.recipe})"
        )
        return set(flipped)

    def _count(
        self,
        split: str,
        reads: str,
        table: Table,
        items: Sequence[Item],
        kept: Sequence[int],
        measured: Measured,
        settled: Settled | None = None,
        labels: Mapping[str, float] | None = None,
        flipped: Collection[int] = (),
    ) -> None:
        responses = measured.response_tokens[kept]
        dropped = {**table.lost, **self._dropped, **(settled.dropped if settled else {})}
        noisy = self.noise is not None and split == self.train_split
        self.counted.add(
            split,
            SplitStatistics(
                reads=reads,
                total=table.total,
                dropped=dropped,
                kept=len(kept),
                prompts=len({items[i][0].id for i in kept}),
                prompt_tokens=Lengths.of(measured.prompt_tokens[kept]),
                response_tokens=Lengths.of(responses[responses > 0]),
                labels=labels or {},
                flipped=[table.numbers[kept[place]] for place in sorted(flipped)] if noisy else None,
            ),
        )
