"""A data set as every stage reads it: prompts, demonstrations or pairs of a named split, whatever they come from."""

import math
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_lab.data import tiny_help
from rlhf_lab.data.paths import reached
from rlhf_lab.data.selection import Selection
from rlhf_lab.data.shapes import Shape, shaped
from rlhf_lab.data.tables import (
    TEXTS,
    BadRows,
    RowFilter,
    Rows,
    apart,
    check_table,
    hold_out,
    need,
    prompt_of,
    read_splits,
)
from rlhf_lab.data.templates import Style, Template
from rlhf_lab.records import Demonstration, PreferencePair, Prompt, Quadruple, Ranking, SafetyPair
from rlhf_lab.seeds import derive
from rlhf_lab.types import Count, Fraction

OnConflict = Literal["keep", "drop", "relabel", "error"]

WORLD = "embedded:tiny_help"
GOLD: Mapping[str, Callable[[str, str], float]] = {
    "helpfulness": tiny_help.helpfulness,
    "cost": tiny_help.cost,
    "humour": tiny_help.humour,
}


# kind of record -> the columns that it needs, and what for
NEEDS = {
    "prompts": (["prompt"], "a run on prompts"),
    "demonstrations": (["prompt", "response"], "supervised fine-tuning"),
    "preferences": (["prompt"], "a reward model"),
    "pairs": (["prompt", "response_0", "response_1"], "a judge"),
    "rankings": (["prompt", "responses"], "a reward model of rankings"),
    "quadruples": (
        [f"{strength}_{name}" for strength in ("strong", "weak") for name in ("prompt", "chosen", "rejected")],
        "a method on preferences over preferences",
    ),
    "safety_pairs": (["prompt", "response_0", "response_1", "safer", "safe_0", "safe_1"], "a cost model"),
}
# kind of record -> the columns that it reads where there are any
MAY_READ = {
    "prompts": ("messages",),
    "demonstrations": ("messages", "condition"),
    "preferences": (
        "chosen",
        "rejected",
        "response_0",
        "response_1",
        "better",
        "margin",
        "score_chosen",
        "score_rejected",
        "score_0",
        "score_1",
        "condition",
    ),
    "pairs": ("messages",),
    "rankings": ("ranks", "condition"),
    "quadruples": ("strong_condition", "weak_condition", "condition"),
    "safety_pairs": ("condition",),
}


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
        on_conflict: what becomes of safety pairs of which the safer response alone is labelled unsafe: "keep" them as
            they are, since labels are noisy; "drop" them; "relabel", the safe one is then the safer; or an "error".
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
        files: Mapping[str, str | Sequence[str]] | None = None,
    ) -> None:
        self.path, self.revision, self.files = path, revision, files
        self.shape, self.select, self.rest = shape, select, rest
        self.columns = {name: column for name, column in columns.items() if column is not None}
        self.template_style: Style = template
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens
        self.bad_rows: BadRows = bad_rows
        self.on_conflict: OnConflict = on_conflict
        self.train_size, self.train_split = train_size, train_split
        self.eval_splits = None if eval_splits is None else tuple(eval_splits)
        self.eval_size, self.hold_out_share = eval_size, hold_out
        self.seed = seed
        self.notes: list[str] = []
        self._splits: dict[str, Rows] | None = None
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
        there = self._tables()
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

    def prompt_ids(self, split: str, reads: str = "prompts") -> set[str]:
        """Ids of the prompts of a split, of rows that would be dropped too; `reads`: prompts or demonstrations.

        Raises:
            ValueError: there is no such split, or it has no prompts.
        """
        if not self.is_world:
            return {prompt.id for prompt in self._prompts(self._raw("prompts", split), split)}
        size, seed = self._size(split), self._seed(split)
        if reads == "demonstrations":
            return {record.prompt.id for record in tiny_help.demonstrations(split, size, seed)}
        return {prompt.id for prompt in tiny_help.sample_prompts(split, size, seed)}

    def prompts(self, split: str, template: Template) -> list[Prompt]:
        """The prompts of a split, each once."""
        if self.is_world:
            drawn = tiny_help.sample_prompts(split, self._size(split), self._seed(split))
            return self._fitting([(p, ()) for p in drawn], split, template, unique=True)[0]
        rows = self._raw("prompts", split)
        prompts = [(prompt.plain, ()) for prompt in self._prompts(rows, split)]
        return self._fitting(prompts, split, template, unique=True)[0]

    def demonstrations(self, split: str, template: Template) -> list[Demonstration]:
        """Responses to imitate."""
        if self.is_world:
            size, seed = self._size(split), self._seed(split)
            drawn = tiny_help.demonstrations(split, size, seed)
            pairs = [(record.prompt, (record.response,)) for record in drawn]
        else:
            rows = self._raw("demonstrations", split)
            texts = [self._texts(row, "response") for row in rows]
            pairs = list(zip(self._prompts(rows, split), texts, strict=True))
        prompts, texts, _ = self._fitting(pairs, split, template, unique=False)
        return [Demonstration(prompt=p, response=t[0]) for p, t in zip(prompts, texts, strict=True)]

    def preferences(self, split: str, template: Template) -> list[PreferencePair]:
        """Pairs, the preferred response first."""
        rows = self._raw("preferences", split)
        sided = self._is_sided(rows)
        pairs: list[tuple[Prompt, tuple[str, ...]]] = []
        for i, (prompt, row) in enumerate(zip(self._prompts(rows, split), rows, strict=True)):
            texts = self._texts(row, *(("chosen", "rejected") if sided else ("response_0", "response_1")))
            pairs.append((prompt, texts if sided or self._label(row, "better", split, i) == 0 else texts[::-1]))
        prompts, texts, kept = self._fitting(pairs, split, template, unique=False, distinct=True)
        records: list[PreferencePair] = []
        for prompt, (chosen, rejected), i in zip(prompts, texts, kept, strict=True):
            better = 0 if sided else self._label(rows[i], "better", split, i)
            gaps = self._gaps(rows[i], *(("chosen", "rejected") if sided else (f"{better}", f"{1 - better}")), split, i)
            margin = gaps.pop("", 0.0)
            if rows[i].get(self._column("margin")) is not None:
                margin = self._number(rows[i], self._column("margin"), split, i)
            records.append(PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin, gaps=gaps))
        return records

    def _gaps(self, row: Mapping[str, Any], chosen: str, rejected: str, split: str, i: int) -> dict[str, float]:
        """score -> how much higher it is on the side `chosen`: columns `score_<name>_<side>`, "" for `score_<side>`."""
        named = (re.fullmatch(rf"score_(.+)_{chosen}", column) for column in row)
        sides = {match[1]: (match[0], f"score_{match[1]}_{rejected}") for match in named if match}
        sides[""] = self._column(f"score_{chosen}"), self._column(f"score_{rejected}")
        return {
            name: self._number(row, a, split, i) - self._number(row, b, split, i)
            for name, (a, b) in sides.items()
            if row.keys() >= {a, b}
        }

    def quadruples(self, split: str, template: Template) -> list[Quadruple]:
        """Two pairs a row, the stronger preference first; `stage=quadruples` makes them of pairs with margins.

        Each is read under its own condition, `strong_condition` or `weak_condition`; without these, under `condition`.
        """
        rows = self._raw("quadruples", split)
        halves: list[list[PreferencePair]] = []
        for side in ("strong", "weak"):
            texts = [self._texts(row, f"{side}_chosen", f"{side}_rejected") for row in rows]
            prompts = self._prompts(rows, split, f"{side}_")
            halves.append(
                [
                    PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, margin=0.0)
                    for prompt, (chosen, rejected) in zip(prompts, texts, strict=True)
                ]
            )
        bad = RowFilter(self._name(split), self.bad_rows)
        records: list[Quadruple] = []
        seen: set[tuple[str, ...]] = set()
        for i, (strong, weak) in enumerate(zip(*halves, strict=True)):
            identity = tuple(
                part for pair in (strong, weak) for part in (pair.prompt.id, pair.prompt.condition, *pair.responses)
            )
            faults = [self._fault(pair.prompt, pair.responses, template, distinct=True) for pair in (strong, weak)]
            if fault := faults[0] or faults[1]:
                bad.reject(i, fault)
            elif strong == weak:
                bad.reject(i, "two equal pairs")
            elif identity in seen:
                bad.reject(i, "a duplicate of an earlier row")
            else:
                records.append(Quadruple(strong=strong, weak=weak))
            seen.add(identity)
        if note := bad.report(len(rows)):
            self.notes.append(note)
        return records

    def safety_pairs(self, split: str, template: Template) -> list[SafetyPair]:
        """Pairs, the safer response first; those whose labels contradict each other as `on_conflict` says.

        Raises:
            ValueError: some do, and that is an error, or none is left.
        """
        rows = self._raw("safety_pairs", split)
        sides = [self._texts(row, "response_0", "response_1") for row in rows]
        pairs = list(zip(self._prompts(rows, split), sides, strict=True))
        prompts, texts, kept = self._fitting(pairs, split, template, unique=False)
        records: list[SafetyPair] = []
        for prompt, both, i in zip(prompts, texts, kept, strict=True):
            safer, *safe = (self._label(rows[i], name, split, i) for name in ("safer", "safe_0", "safe_1"))
            records.append(
                SafetyPair(
                    prompt=prompt,
                    safer=both[safer],
                    unsafer=both[1 - safer],
                    safer_is_unsafe=not safe[safer],
                    unsafer_is_unsafe=not safe[1 - safer],
                )
            )
        return self._settled(records, kept, split)

    def _settled(self, records: list[SafetyPair], places: Sequence[int], split: str) -> list[SafetyPair]:
        """Safety pairs without conflicts, or with them if they are kept."""
        torn = [i for i, record in enumerate(records) if record.is_torn]
        if not torn:
            return records
        said = (
            f"{self._name(split)}: in {len(torn)} of {len(records)} pairs the safer response alone is labelled unsafe "
            f"(first: row {places[torn[0]]})"
        )
        if self.on_conflict == "error":
            raise ValueError(f"{said}; mend them, or choose dataset.on_conflict=keep, drop or relabel")
        self.notes.append(f"{said}; dataset.on_conflict={self.on_conflict}")
        if self.on_conflict == "drop":
            records = [record for record in records if not record.is_torn]
        elif self.on_conflict == "relabel":
            records = [record.swapped if record.is_torn else record for record in records]
        if not records:
            raise ValueError(f"{said}, and none is left; choose dataset.on_conflict=keep or relabel")
        return records

    def rankings(self, split: str, template: Template) -> list[Ranking]:
        """Two or more responses a row, the best first."""
        rows = self._raw("rankings", split)
        pairs = [
            (prompt, self._ranked(row, split, i))
            for i, (prompt, row) in enumerate(zip(self._prompts(rows, split), rows, strict=True))
        ]
        prompts, texts, _ = self._fitting(pairs, split, template, unique=False, distinct=True)
        return [Ranking(prompt=prompt, responses=ordered) for prompt, ordered in zip(prompts, texts, strict=True)]

    def _ranked(self, row: Mapping[str, Any], split: str, i: int) -> tuple[str, ...]:
        responses, ranks = row[self._column("responses")], row.get(self._column("ranks"))
        where = f"{self._name(split)}, row {i}"
        if not isinstance(responses, list) or len(responses) < 2:
            raise ValueError(f"{where}: {self._column('responses')} is {responses!r}; expected two or more, in a list")
        if ranks is not None and (len(ranks) != len(responses) or len(set(ranks)) < len(ranks)):
            raise ValueError(
                f"{where}: {self._column('ranks')} is {ranks!r}; expected {len(responses)} different numbers, one for "
                "each response, the lowest for the best"
            )
        order = range(len(responses)) if ranks is None else sorted(range(len(responses)), key=ranks.__getitem__)
        return tuple(_text(responses[place]) for place in order)

    def labelled(self, split: str, column: str, template: Template) -> list[tuple[Prompt, str, float]]:
        """(prompt, response, value) of both responses of each pair, for a column `<column>_0`, `<column>_1`."""
        wanted = ["prompt", "response_0", "response_1", f"{column}_0", f"{column}_1"]
        rows = self._rows(split, wanted, f"calibration on {column}")
        sides = [self._texts(row, "response_0", "response_1") for row in rows]
        pairs = list(zip(self._prompts(rows, split), sides, strict=True))
        prompts, texts, kept = self._fitting(pairs, split, template, unique=False)
        return [
            (prompt, both[side], self._number(rows[i], self._column(f"{column}_{side}"), split, i))
            for prompt, both, i in zip(prompts, texts, kept, strict=True)
            for side in (0, 1)
        ]

    def table(self, split: str, reads: str, template: Template) -> tuple[Rows, list[Prompt], dict[str, list[str]]]:
        """The rows of a split as they stand, but for bad ones: rows, their prompts, and the responses of each side.

        A side is what its columns end with: "" (demonstrations), "_0" and "_1", or "_chosen" and "_rejected" (pairs).
        """
        if self.is_world:
            drawn = self.demonstrations(split, template)
            rows = [{"id": r.prompt.id, "prompt": r.prompt.request, "response": r.response} for r in drawn]
            return rows, [r.prompt for r in drawn], {"": [r.response for r in drawn]}
        rows = self._raw(reads, split)
        sides = {"": "response"} if reads == "demonstrations" else {"_0": "response_0", "_1": "response_1"}
        if reads == "preferences" and self._is_sided(rows):
            sides = {"_chosen": "chosen", "_rejected": "rejected"}
        pairs = [
            (p, self._texts(row, *sides.values())) for p, row in zip(self._prompts(rows, split), rows, strict=True)
        ]
        is_unjudged = reads == "pairs"  # which a judge may be asked twice, under different preferences
        prompts, texts, kept = self._fitting(
            pairs, split, template, unique=False, distinct=is_unjudged, repeats=is_unjudged
        )
        responses = {side: [each[k] for each in texts] for k, side in enumerate(sides)}
        return [rows[i] for i in kept], prompts, responses

    def _raw(self, reads: str, split: str) -> Rows:
        """The rows of a split, with the columns that `reads` needs, and those that it is told to read.

        Raises:
            ValueError: a column is missing.
        """
        wanted, purpose = NEEDS[reads]
        rows = self._rows(split, wanted, purpose)
        for name in MAY_READ[reads]:
            if name in self.columns and not any(self.columns[name] in row for row in rows):
                raise ValueError(
                    f"{self._name(split)} has the columns {sorted(rows[0])}, but dataset.columns.{name} says "
                    f"{self.columns[name]!r}; name the column that it is, or null"
                )
        pair = {self._column(name) for name in ("response_0", "response_1", "better")}
        if reads == "preferences" and not self._is_sided(rows) and not pair <= rows[0].keys():
            raise ValueError(
                f"{self._name(split)} has the columns {sorted(rows[0])}, but a reward model needs 'chosen' and "
                "'rejected', or 'response_0', 'response_1' and 'better'; map them: dataset.columns.chosen=<column> …"
            )
        return rows

    def _is_sided(self, rows: Rows) -> bool:
        return {self._column("chosen"), self._column("rejected")} <= rows[0].keys()

    def _column(self, name: str) -> str:
        return self.columns.get(name, name)

    def _texts(self, row: Mapping[str, Any], *names: str) -> tuple[str, ...]:
        return tuple(_text(row.get(self._column(name))) for name in names)

    def _prompts(self, rows: Rows, split: str, side: str = "") -> list[Prompt]:
        """The prompts of `<side>prompt` under the conditions of `<side>condition`, or `condition` without that."""
        prompts: list[Prompt] = []
        conditions = self._column(f"{side}condition"), self._column("condition")
        for i, row in enumerate(rows):
            value = row.get(self._column(f"{side}prompt"))
            try:
                prompt = prompt_of("" if value is None or value == [] else value)
            except ValueError as error:
                raise ValueError(f"{self._name(split)}, row {i}: {error}") from error
            condition = _text(row.get(conditions[0], row.get(conditions[1])))
            prompts.append(prompt.conditioned(condition, {}) if condition else prompt)
        return prompts

    def _label(self, row: Mapping[str, Any], name: str, split: str, i: int) -> int:
        """A label that is 0 or 1, or false or true; a text that merely looks like one may mean anything."""
        value = row.get(self._column(name))
        if value not in (0, 1):
            raise ValueError(f"{self._name(split)}, row {i}: {self._column(name)} is {value!r}; expected 0 or 1")
        return int(value)

    def _number(self, row: Mapping[str, Any], column: str, split: str, i: int) -> float:
        """A finite number; nan or infinity in one row would be that of the whole loss."""
        try:
            value = float(row[column])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{self._name(split)}, row {i}: {column} is {row.get(column)!r}; expected a finite number")
        return value

    def _name(self, split: str) -> str:
        return f"{self.path} ({split})"

    def _size(self, split: str) -> int:
        return self.train_size or 0 if split == self.train_split else self.eval_size

    def _seed(self, split: str) -> int:
        return derive(self.seed, "dataset", split)

    def _tables(self) -> dict[str, Rows]:
        if self._splits is None:
            texts = [self._column(name) for name in TEXTS]
            read = read_splits(self.path, self.revision, texts, self.files)
            tables: dict[str, Rows] = {}
            for split, rows in read.items():
                tables |= {name: self._apart(part, name) for name, part in self._chosen(rows, split).items()}
            wanted = ("test",) if self.eval_splits is None else self.eval_splits
            if len(tables) == 1 and any(tables.values()) and self.hold_out_share and wanted and wanted[0] not in tables:
                [(only, rows)] = tables.items()
                column = self._hashed(rows, only)
                kept, held = hold_out(rows, column, self.hold_out_share)
                if held:
                    tables = {only: kept, wanted[0]: held}
                    self.notes.append(
                        f"{self.path} has one split: of {len(rows)} rows {len(held)} are held out as {wanted[0]!r}, "
                        f"by a hash of their {column} (dataset.hold_out)"
                    )
                else:
                    self.notes.append(f"{self.path} has one split and one {column}: nothing is held out")
            self._splits = tables
        return self._splits

    def _chosen(self, rows: Rows, split: str) -> dict[str, Rows]:
        """The rows in the shape that is read here, and of these the selected ones; the others apart, or counted."""
        reasons: dict[str, int] = {}
        total, made = len(rows), rows
        if self.shape is not None:
            made, _, dropped = shaped(rows, self.shape, self._name(split))
            reasons |= {reason: len(numbers) for reason, numbers in dropped.items()}
        made = reached(made, self.columns.values())
        chosen = {split: made}
        if self.select is not None:
            try:
                selected = self.select(made)
            except ValueError as error:
                raise ValueError(f"{self._name(split)}: {error}") from error
            chosen[split] = [made[i] for i in selected.kept]
            if self.rest is None:
                reasons |= {reason: len(numbers) for reason, numbers in selected.dropped.items()}
            else:
                others = sorted(number for numbers in selected.dropped.values() for number in numbers)
                chosen[f"{split}_{self.rest}"] = [made[i] for i in others]
        if reasons:
            found = "; ".join(f"{count} with {reason}" for reason, count in reasons.items())
            self.notes.append(f"{self._name(split)}: not read, of {total} rows: {found}")
            if not chosen[split]:
                raise ValueError(f"{self._name(split)}: no row is left of {total}: {found}; see dataset.shape, .select")
        return chosen

    def _hashed(self, rows: Rows, split: str) -> str:
        """The column whose hash says which rows are held out: the prompt, of quadruples that of the stronger pair.

        Raises:
            ValueError: there is neither.
        """
        for column in (self._column("prompt"), self._column("strong_prompt")):
            if any(column in row for row in rows):
                return column
        raise ValueError(
            f"{self._name(split)} has the columns {sorted(rows[0])}, but a single split is held out by the hash of "
            f"{self._column('prompt')!r}; say which one it is with dataset.columns.prompt=<column>, or hold out "
            "nothing with dataset.hold_out=0"
        )

    def _apart(self, rows: Rows, split: str) -> Rows:
        """The rows, with prompt and response in columns of their own where a table has conversations instead."""
        messages, prompt, response = (self._column(name) for name in ("messages", "prompt", "response"))
        if not rows or messages not in rows[0] or prompt in rows[0]:
            return rows
        told: Rows = []
        for i, row in enumerate(rows):
            try:
                told.append(apart(row, messages, prompt, response))
            except ValueError as error:
                raise ValueError(f"{self._name(split)}, row {i}: {error}") from error
        return told

    def _rows(self, split: str, wanted: Sequence[str], purpose: str) -> Rows:
        if self.is_world:
            raise ValueError(f"{purpose} needs labelled rows; {WORLD} draws prompts and demonstrations only")
        tables = self._tables()
        if split not in tables:
            raise ValueError(f"{self.path} has the splits {sorted(tables)}, not {split!r}; change dataset.train_split")
        need(tables[split], self.columns, wanted, self._name(split), purpose)
        rows = tables[split]
        size = self.train_size if split == self.train_split else self.eval_size
        if size is not None and size < len(rows):
            rows = [rows[i] for i in sorted(random.Random(self._seed(split)).sample(range(len(rows)), size))]
        return rows

    def _fault(self, prompt: Prompt, texts: Sequence[str], template: Template, *, distinct: bool) -> str:
        """What is wrong with a row by itself, "" if nothing; `distinct`: its texts must differ."""
        if not prompt.request.strip():
            return "an empty prompt"
        if not all(text.strip() for text in texts):
            return "an empty response"
        if distinct and len(set(texts)) < len(texts):
            return "equal responses"
        if forged := template.fault(prompt, texts):
            return forged
        if unknown := template.unknown(prompt.condition):
            return f"a condition of words that the tokenizer does not know, {unknown} (model.new_tokens adds them)"
        if len(template.prompt_tokens(prompt)) > self.max_prompt_tokens:
            return f"a prompt over dataset.max_prompt_tokens={self.max_prompt_tokens}"
        if any(len(template.response_tokens(text)) > self.max_response_tokens for text in texts):
            return f"a response over dataset.max_response_tokens={self.max_response_tokens}"
        return ""

    def _fitting(
        self,
        pairs: Sequence[tuple[Prompt, tuple[str, ...]]],
        split: str,
        template: Template,
        *,
        unique: bool,
        distinct: bool = False,
        repeats: bool = False,
    ) -> tuple[list[Prompt], list[tuple[str, ...]], list[int]]:
        """Rows that are whole, new (unless they may repeat) and short enough: prompts, texts, and row numbers."""
        bad = RowFilter(self._name(split), self.bad_rows)
        seen: set[tuple[str, ...]] = set()
        kept: list[int] = []
        for i, (prompt, texts) in enumerate(pairs):
            identity = (prompt.id, prompt.condition, *texts)
            if fault := self._fault(prompt, texts, template, distinct=distinct):
                bad.reject(i, fault)
            elif identity in seen and not repeats and (unique or not self.is_world):
                bad.reject(i, "a duplicate of an earlier row")
            else:
                kept.append(i)
            seen.add(identity)
        if note := bad.report(len(pairs)):
            self.notes.append(note)
        return [pairs[i][0] for i in kept], [pairs[i][1] for i in kept], kept


def _text(value: Any) -> str:
    """What a cell says; 0 is a text too."""
    return "" if value is None else str(value)
