"""The tables of a data set: read, brought into shape, selected, divided into splits that share no prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from rlhf_lab.data.columns import Columns
from rlhf_lab.data.hub import Named
from rlhf_lab.data.paths import reached
from rlhf_lab.data.readers import TEXTS
from rlhf_lab.data.sameness import Same
from rlhf_lab.data.selection import Selection, UnreadableRow
from rlhf_lab.data.shapes import Shape, shaped
from rlhf_lab.data.splits import Table, divide, hold_out, overlap
from rlhf_lab.data.tables import apart, read_files
from rlhf_lab.types import Fraction

# what becomes of the rows of the training split whose prompt is in a held-out one
OnOverlap = Literal["keep", "drop", "error"]


class Source:
    """Reads the tables of a path, once.

    Args: as those of `Dataset`, which says what they mean.
    """

    def __init__(
        self,
        *,
        path: str,
        revision: str | None,
        files: Named | None,
        columns: Columns,
        shape: Shape | None,
        select: Selection | None,
        rest: str | None,
        train_split: str,
        eval_splits: Sequence[str] | None,
        hold_out: Fraction,
        shares: Mapping[str, float] | None,
        on_overlap: OnOverlap,
        duplicates: Same,
    ) -> None:
        self.path, self.revision, self.files, self.columns = path, revision, files, columns
        self.shape, self.select, self.rest = shape, select, rest
        self.train_split, self.eval_splits = train_split, eval_splits
        self.hold_out, self.shares = hold_out, shares
        self.on_overlap: OnOverlap = on_overlap
        self.duplicates: Same = duplicates
        self.notes: list[str] = []
        self._tables: dict[str, Table] | None = None

    def tables(self) -> dict[str, Table]:
        """split -> its rows."""
        if self._tables is None:
            read = read_files(self.path, self.revision, [self.columns[name] for name in TEXTS], self.files)
            tables: dict[str, Table] = {}
            for split, parts in read.items():
                chosen = self._chosen(Table.of(self._name(split), parts), split)
                tables |= {name: self._apart(table) for name, table in chosen.items()}
            tables = self._divided(tables) if self.shares else self._held_out(tables)
            self._tables = self._disjoint(tables)
        return self._tables

    def _name(self, split: str) -> str:
        return f"{self.path} ({split})"

    def _chosen(self, table: Table, split: str) -> dict[str, Table]:
        """The rows in the shape that is read here, and of these the selected ones; the others apart, or counted."""
        reasons: dict[str, int] = {}
        total, rows, numbers = len(table), table.rows, table.numbers
        if self.shape is not None:
            rows, numbers, dropped = shaped(rows, self.shape, table.name)
            reasons |= {reason: len(lost) for reason, lost in dropped.items()}
        rows = reached(rows, self.columns.names.values())
        table = replace(table, rows=rows, numbers=numbers, lost=reasons)
        chosen = {split: table}
        if self.select is not None:
            try:
                selected = self.select(rows)
            except UnreadableRow as error:
                raise ValueError(f"{table.where(error.row)}: {error.why}") from error
            if self.rest is None:
                reasons |= {reason: len(lost) for reason, lost in selected.dropped.items()}
            else:
                others = sorted(number for lost in selected.dropped.values() for number in lost)
                name = f"{split}_{self.rest}"
                chosen[name] = self._named(table.take(others), name)
            kept = table.take(selected.kept)
            chosen[split] = replace(kept, lost=reasons, total=total if self.rest is None else kept.total)
        if reasons:
            found = "; ".join(f"{count} with {reason}" for reason, count in reasons.items())
            self.notes.append(f"{table.name}: not read, of {total} rows: {found}")
            if not chosen[split].rows:
                raise ValueError(f"{table.name}: no row is left of {total}: {found}; see dataset.shape, .select")
        return chosen

    def _apart(self, table: Table) -> Table:
        """The rows, with prompt and response in columns of their own where a table has conversations instead."""
        messages, prompt, response = (self.columns[name] for name in ("messages", "prompt", "response"))
        if not table.rows or messages not in table.rows[0] or prompt in table.rows[0]:
            return table
        for i, row in enumerate(table.rows):
            try:
                table.rows[i] = apart(row, messages, prompt, response)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{table.where(i)}: {error}") from error
        return table

    def _held_out(self, tables: dict[str, Table]) -> dict[str, Table]:
        """A single split, with a share of its prompts as the held-out split that is wanted."""
        wanted = ("test",) if self.eval_splits is None else tuple(self.eval_splits)
        if len(tables) > 1 or not any(map(len, tables.values())) or not (self.hold_out and wanted):
            return tables
        [(only, table)] = tables.items()
        if wanted[0] == only:
            return tables
        column = self._hashed(table)
        rows = table.rows
        if self.duplicates != "exact":  # prompts that are the same stay together
            keys = self.columns.keys(table, self.duplicates)
            rows = [{column: key[0] if key else ""} for key in keys]
        kept, held = hold_out(rows, column, self.hold_out)
        if not held:
            self.notes.append(f"{self.path} has one split and one {column}: nothing is held out")
            return tables
        self.notes.append(
            f"{self.path} has one split: of {len(table)} rows {len(held)} are held out as {wanted[0]!r}, "
            f"by a hash of their {column} (dataset.hold_out)"
        )
        return {only: table.take(kept), wanted[0]: self._named(table.take(held), wanted[0])}

    def _hashed(self, table: Table) -> str:
        """The column whose hash says which rows are held out: the prompt, of quadruples that of the stronger pair.

        Raises:
            ValueError: there is neither.
        """
        for column in (self.columns["prompt"], self.columns["strong_prompt"]):
            if any(column in row for row in table.rows):
                return column
        raise ValueError(
            f"{table.name} has the columns {sorted(table.rows[0])}, but a single split is held out by the hash of "
            f"{self.columns['prompt']!r}; say which one it is with dataset.columns.prompt=<column>, or hold out "
            "nothing with dataset.hold_out=0"
        )

    def _divided(self, tables: dict[str, Table]) -> dict[str, Table]:
        """The training split's rows in the declared shares; the other splits stay as they are."""
        shares = self.shares or {}
        split = self.train_split if self.train_split in tables else "train"
        if split not in tables:
            raise ValueError(f"{self.path} has the splits {sorted(tables)}, not {split!r}; change dataset.train_split")
        table = tables.pop(split)
        if taken := sorted(tables.keys() & shares.keys()):
            raise ValueError(
                f"{self.path} has a split {taken[0]!r} of its own, so dataset.shares cannot make another; leave it out "
                "of the shares, or call it otherwise"
            )
        keys = self.columns.keys(table, self.duplicates)
        if not any(keys):
            raise ValueError(
                f"{table.name}: no row has a prompt by whose hash dataset.shares could divide them; say which column "
                "it is with dataset.columns.prompt=<column>"
            )
        divided = divide([key[0] if key else "" for key in keys], shares)  # without one it is a bad row wherever it is
        if empty := [name for name, rows in divided.items() if not rows]:
            raise ValueError(
                f"{table.name}: of {len(table)} rows none falls into {empty[0]!r}; give it a larger share "
                "(dataset.shares), or more data"
            )
        counted = ", ".join(f"{len(rows)} {name}" for name, rows in divided.items())
        self.notes.append(f"{table.name}: {len(table)} rows divided by a hash of their prompt: {counted}")
        made = {name: self._named(table.take(rows), name) for name, rows in divided.items()}
        return made | tables

    def _named(self, table: Table, split: str) -> Table:
        """Rows that became a split of another name; what was lost on the way was so in the other."""
        return replace(table, name=self._name(split), lost={}, total=table.sources)

    def _disjoint(self, tables: dict[str, Table]) -> dict[str, Table]:
        """No prompt of the training split in a held-out one, and none in two splits that a hash has divided.

        Raises:
            ValueError: there is one, and `on_overlap` refuses it.
        """
        if self.on_overlap == "keep" or self.train_split not in tables:
            return tables
        held_out = [split for split in tables if split != self.train_split]
        if self.eval_splits is not None:
            held_out = [split for split in held_out if split in self.eval_splits]
        keys = {split: self.columns.keys(tables[split], self.duplicates) for split in (self.train_split, *held_out)}
        for split in held_out:
            training = tables[self.train_split]
            found = overlap(keys[self.train_split], keys[split])
            if found is None:
                continue
            ours, theirs = found.example
            said = (
                f"{self.path}: {found.prompts} prompt(s) of the training split {self.train_split!r} are in {split!r} "
                f"too ({len(found.rows)} rows; first: {training.where(ours)} and {tables[split].where(theirs)})"
            )
            if self.on_overlap == "error":
                raise ValueError(
                    f"{said}; what is learnt there would be measured here: dataset.on_overlap=drop leaves those rows "
                    "out of the training split, keep leaves them in"
                )
            self.notes.append(f"{said}; left out of the training split (dataset.on_overlap=drop)")
            gone = set(found.rows)
            kept = [i for i in range(len(training)) if i not in gone]
            if not kept:
                raise ValueError(f"{said}, and no other row is left to learn from; use other data, or other splits")
            tables = {**tables, self.train_split: training.take(kept, f"a prompt of the split {split}")}
            keys[self.train_split] = [keys[self.train_split][i] for i in kept]
        return tables
