"""People's ratings, read back: win rates, ratings, how far people agree, and a judge with them."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from rlhf_lab.data.tables import read_table, write_table
from rlhf_lab.evaluation.human import agreement, judged_alike, judgements
from rlhf_lab.evaluation.rating_sheets import Item, Missing, Rating, Scale, read_sheets
from rlhf_lab.evaluation.win_rates import Judgement, ratings, read_judgements, win_rates
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.human_sheet import KEY, QUESTIONS
from rlhf_lab.stages.win_rates import VERDICTS, as_csv, without_words
from rlhf_lab.types import Count, Metrics, NonNegative


class HumanRatings:
    """What people wrote on the sheets of `stage=human_sheet`.

    Leaves `data/ratings.parquet`, a row for each rater, pair and criterion, turned to the contestants; `win_rates.csv`;
    `ratings.csv`; and as metrics the same, with `agreement/…` and `judge_agreement/…`; see `evaluation/human.py`.

    Args:
        key: the directory of the run that made the sheets.
        ratings: the filled sheets, csv.
        missing: what becomes of items without an answer: "error", or "drop" and count.
        verdicts: of a judge on the same contestants: the run of `stage=win_rates`, or its `verdicts.parquet`; null for
            none.
        length_control, anchor, anchor_rating, virtual_ties, draws: as in `WinRates`.
    """

    def __init__(
        self,
        *,
        key: str,
        ratings: Sequence[str],
        missing: Missing,
        verdicts: str | None,
        length_control: bool,
        anchor: str | None,
        anchor_rating: float,
        virtual_ties: NonNegative,
        draws: Count,
    ) -> None:
        self.key, self.files, self.verdicts = (
            Path(key).expanduser(),
            [Path(file).expanduser() for file in ratings],
            verdicts,
        )
        self.missing: Missing = missing
        self.length_control, self.anchor, self.anchor_rating = length_control, anchor, anchor_rating
        self.virtual_ties, self.draws = virtual_ties, draws
        if not self.files:
            raise ValueError("stage.ratings is empty; name the filled sheets, stage.ratings=[<file.csv>,…]")

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work; the sheets are read here, so that a slip in one is said at once."""
        _, _, names = self._read()
        if self.anchor is not None and self.anchor not in names:
            raise ValueError(f"stage.anchor={self.anchor}, but the contestants are {names}")
        self._judged()

    def _read(self) -> tuple[list[Rating], int, list[str]]:
        """What was rated, how many ratings are missing, and who the contestants are."""
        folder = self.key / "data" if (self.key / "data").is_dir() else self.key
        if absent := [name for name in (KEY, QUESTIONS) if not (folder / name).is_file()]:
            raise ValueError(f"stage.key={self.key} holds no {absent[0]}; name the run of stage=human_sheet")
        asked = json.loads((folder / QUESTIONS).read_text())
        items = [Item(**row) for row in read_table(folder / KEY)]
        self.scale = Scale(most=asked["most"], ties=asked["ties"])
        found, absent = read_sheets(self.files, items, list(asked["criteria"]), self.scale, self.missing)
        return found, absent, list(asked["contestants"])

    def _judged(self) -> list[Judgement] | None:
        if self.verdicts is None:
            return None
        place = Path(self.verdicts).expanduser()
        candidates = (place, place / VERDICTS, place / "data" / VERDICTS)
        file = next((each for each in candidates if each.is_file()), None)
        if file is None:
            raise ValueError(f"stage.verdicts={self.verdicts} holds no {VERDICTS}; name a run of stage=win_rates")
        return read_judgements(without_words(read_table(file)))

    def run(self, run: Run) -> Metrics:
        run.resume()
        found, absent, names = self._read()
        said = judgements(found, self.scale)
        raters = [each.item.rater for each in found]
        rows = [{"rater": rater, **each.row} for rater, each in zip(raters, said, strict=True)]
        run.make("data", lambda folder: write_table(rows, folder / "ratings.parquet"))
        rates = win_rates(said, length_control=self.length_control)
        rated, notes = ratings(
            said,
            names,
            anchor=self.anchor or names[0],
            anchor_rating=self.anchor_rating,
            virtual_ties=self.virtual_ties,
            draws=self.draws,
            seed=derive(run.seed, "ratings"),
        )
        metrics: Metrics = {"human/ratings": float(len(found)), "human/missing": float(absent)}
        for each in (*rates, *rated):
            metrics |= each.metrics
        metrics |= agreement(found, self.scale, self.draws, derive(run.seed, "agreement"))
        if (judged := self._judged()) is not None:
            alike, unjudged = judged_alike(found, judged, self.draws, derive(run.seed, "agreement"))
            metrics |= alike
            notes += [f"the judge has no verdict on {n} rated pairs by {name}" for name, n in unjudged.items() if n]
        if absent:
            notes.append(f"{absent} ratings are missing; counted without them")
        for note in notes:
            run.warn(0, note)
        run.write_text("win_rates.csv", as_csv([each.row for each in rates]))
        run.write_text("ratings.csv", as_csv([each.row for each in rated]))
        for name in [key.removesuffix("/mean") for key in metrics if "agreement/" in key and key.endswith("/mean")]:
            low, high = metrics[f"{name}/low"], metrics[f"{name}/high"]
            run.console.say(f"{name}: {metrics[f'{name}/mean']:.3f} [{low:.3f}, {high:.3f}]")
        run.log(0, metrics)
        return metrics
