"""Pairs for a judge from responses that are there already, in a generation table."""

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from rlhf_lab.data.generations import Generations, find
from rlhf_lab.data.pairs import Pairing, paired, said
from rlhf_lab.data.preferences import JOINT, Registry
from rlhf_lab.data.readers import Rows
from rlhf_lab.data.splits import hold_out
from rlhf_lab.run import Run
from rlhf_lab.stages.shards import write_splits
from rlhf_lab.types import Fraction, Metrics

CARRIED = ("response", "sample", "finished", "tokens")
MEASURED = ("score_", "gold_")


class PairUp:
    """The responses of a generation table as pairs, `data/<split>.parquet`, with the columns of `stage=rollout_pairs`.

    Scores and gold scores come along, as score_<name>_0, gold_<name>_0 and so on.

    Args:
        generations: the table, or the run that left it.
        preferences: by whose words a prompt's condition is told to be a preference; other conditions have none ("").
        train_split: the split that becomes "train"; null for the only one that the table has.
        hold_out: of a table with a single split, the share of its prompts that becomes "test", by a hash of the prompt.
        pairing: "all" pairs of the responses to a prompt, or each response "once".
    """

    def __init__(
        self,
        *,
        generations: str,
        preferences: Registry,
        train_split: str | None,
        hold_out: Fraction,
        pairing: Pairing,
    ) -> None:
        self.generations, self.preferences = generations, preferences
        self.train_split, self.hold_out = train_split, hold_out
        self.pairing: Pairing = pairing

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse a table that is not there, nor promised to be."""
        if self.generations not in promised:
            find(self.generations)

    def run(self, run: Run) -> Metrics:
        table = Generations.open(self.generations)
        learnt = self.train_split or (table.splits[0] if len(table.splits) == 1 else "")
        others = [split for split in table.splits if split != learnt]
        if learnt not in table.splits or "train" in others:
            raise ValueError(
                f"{table.path} has the splits {list(table.splits)}, stage.train_split={self.train_split}; name the one "
                "that is to be learnt from, 'train' if there is one of this name"
            )
        run.resume()
        metrics: Metrics = {}
        tables: dict[str, Rows] = {}
        for split in table.splits:
            name = "train" if split == learnt else split
            tables[name], left_out = paired(self._responses(table, split), self.pairing)
            metrics |= {f"{name}/left_out/{reason}": float(count) for reason, count in left_out.items()}
            run.console.say(f"{split}: {len(tables[name])} pairs; {said(left_out)}")
        if not others:
            rows = tables["train"]
            tables["train"], tables["test"] = ([rows[i] for i in part] for part in hold_out(rows, "id", self.hold_out))
        for name, rows in tables.items():
            if not rows:
                raise ValueError(f"{table.path} leaves no pair for {name!r}; sample more, or change stage.hold_out")
            metrics[f"{name}/pairs"] = float(len(rows))
        run.make("data", partial(write_splits, tables))
        run.log(0, metrics)
        return metrics

    def _responses(self, table: Generations, split: str) -> Iterator[dict[str, Any]]:
        """A row for each response, named as those of rollouts are."""
        known = {self.preferences.words(held, "policy"): JOINT.join(held) for held in self.preferences.subsets}
        carried = [name for name in table.columns if name in CARRIED or name.startswith(MEASURED)]
        for row in table.rows(split, ["prompt_id", "prompt", "condition", *carried]):
            told = row["condition"]
            yield {
                "id": row["prompt_id"],
                "prompt": row["prompt"],
                "preference": known.get(told, ""),
                "told": told,
                **{name: row[name] for name in carried},
            }
