"""Sheets for people who compare the contestants' responses, blind; `stage=human_ratings` reads them back."""

import json
from collections.abc import Collection, Mapping
from itertools import combinations
from pathlib import Path

from rlhf_lab.data.tables import write_table
from rlhf_lab.evaluation.rating_sheets import FIXED, Scale, instructions, sheets, written
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.contestants import Contestants
from rlhf_lab.types import Count, Metrics

KEY, QUESTIONS = "key.parquet", "questions.json"


class HumanSheet:
    """One sheet for each rater, of the same pairs in an order, and on sides A and B, that are drawn for each.

    Leaves `sheets/`, which is handed out: `<rater>.csv` and `instructions.md`; and `data/`, which is not: who wrote
    what, `key.parquet`, and what was asked, `questions.json`. Pairs of equal responses are left out and counted.

    Args:
        criteria: criterion -> the question that raters answer.
        raters: sheets.
        most: preferences go from -most (A) to most (B).
        ties: whether 0, neither, may be given.
    """

    def __init__(
        self, *, contestants: Contestants, criteria: Mapping[str, str], raters: Count, most: Count, ties: bool
    ) -> None:
        self.contestants, self.criteria, self.raters = contestants, dict(criteria), raters
        self.scale = Scale(most=most, ties=ties)
        if not self.criteria:
            raise ValueError("stage.criteria is empty; ask something, e.g. '+stage.criteria.better=Which is better?'")
        if taken := sorted({*FIXED, "comment"} & set(self.criteria)):
            raise ValueError(f"stage.criteria.{taken[0]} has the name of another column of the sheets; rename it")

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        self.contestants.check(promised)

    def run(self, run: Run) -> Metrics:
        run.resume()  # there are no checkpoints: what was sampled is what it continues from
        matches = self.contestants.matches(run)
        names = self.contestants.names
        seed = derive(run.seed, "sheets")
        key, rows, equal = sheets(matches, list(combinations(names, 2)), names, self.raters, seed)
        if not key:
            raise ValueError(f"all {equal} pairs are of equal responses; there is nothing to rate")

        def hand_out(folder: Path) -> None:
            for rater, lines in rows.items():
                (folder / f"{rater}.csv").write_text(written(lines, list(self.criteria)), encoding="utf-8-sig")
            (folder / "instructions.md").write_text(instructions(self.criteria, self.scale))

        def keep(folder: Path) -> None:
            write_table([item.row for item in key], folder / KEY)
            asked = {"contestants": names, "criteria": self.criteria, "most": self.scale.most, "ties": self.scale.ties}
            (folder / QUESTIONS).write_text(json.dumps(asked, indent=1))

        run.make("sheets", hand_out)
        run.make("data", keep)
        if equal:
            run.warn(0, f"{equal} pairs of equal responses are left out")
        metrics = {"human/items": float(len(key) // self.raters), "human/equal": float(equal)}
        metrics["human/raters"] = float(self.raters)
        run.console.say(f"hand out {run.directory / 'sheets'}, one sheet a rater; keep {run.directory / 'data'}")
        run.console.say(
            f"then: python launch.py stage=human_ratings stage.key={run.directory} stage.ratings=[<file>,…]"
        )
        run.log(0, metrics)
        return metrics
