"""Over-optimisation by best of n: one table of responses, chosen from by each reward model and by their ensembles."""

import csv
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_lab.data.generations import Generations
from rlhf_lab.evaluation.best_of_n import (
    by_column,
    choosers,
    estimates,
    grid_to,
    rules_of,
    tidy,
    units_of,
    with_single,
)
from rlhf_lab.functional.best_of_n import kl_of_best_of_n
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.types import Count, Metrics, NonNegative

PROMPTS_AT_ONCE = 32  # a constant, so that sums do not depend on the hardware; 60 MB each at 12,600 samples


class BestOfNCurve:
    """Proxy and gold of the best of n by a single reward model and by each ensemble of them, for n up to all samples.

    The members' scores are read from the table, so nothing is scored again, and the samples are sorted anew by each
    aggregate: every curve is of the responses that its own selector would have chosen.

    Leaves `data/best_of_n.csv` and `.json`: for each split, selector (`single`, the average of what members choose
    alone; `member_<k>`; `mean`, `wco`, `uwo_<weight>`; `objective` if the table has one), n and measure the mean over
    prompts, its gain over one response and its difference to `single`, each with a 95 % interval by resampling prompts.
    Metrics, one row per n with n as its step: `best_of_n/kl` and `best_of_n/<split>/<selector>/<measure>/mean`, with
    `ci95`, half the width of that interval, and the same of `gain/<measure>` and `over_single/<measure>`.

    Args:
        generations: a generation table, or a finished run that left one.
        reward: whose members choose.
        uwo_weights: of UWO, one curve each; 0 is the mean.
        ddof: of its variance.
        units: members and gold "saved", as the table has them; or "table": 0 and 1 are the mean and the standard
            deviation of a split's responses, of each member its own.
        grid: every n, ascending from 1; null for the powers of two and all samples.
        draws: how often prompts are resampled.

    Source: Coste et al. 2024, arXiv:2310.02743, figure 3. Deviation from its released code: there gold keeps the order
    of the first member, so that the gold curves of all ensembles are that member's.
    """

    def __init__(
        self,
        *,
        generations: str,
        reward: str,
        uwo_weights: Sequence[NonNegative],
        ddof: Literal[0, 1],
        units: Literal["saved", "table"],
        grid: Sequence[Count] | None,
        draws: Count,
    ) -> None:
        self.generations, self.reward, self.units, self.draws = generations, reward, units, draws
        self.rules = rules_of(uwo_weights, ddof)
        self.grid = None if grid is None else list(grid)

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is computed; `promised` paths will be there by then."""
        if self.grid is not None and (self.grid[:1] != [1] or self.grid != sorted(set(self.grid))):
            raise ValueError(f"stage.grid={self.grid}; expected ascending numbers of samples, the first of them 1")
        if self.generations not in promised:
            self._table()

    def run(self, run: Run) -> Metrics:
        table = self._table()
        run.resume()  # there are no checkpoints: it takes seconds
        rows: list[dict[str, Any]] = []
        for i in run.steps("split", 0, len(table.splits), {}):
            run.pause()
            rows += self._curves(table, table.splits[i], run.seed)

        def fill(folder: Path) -> None:
            with (folder / "best_of_n.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            told = [{key: _finite(value) for key, value in row.items()} for row in rows]
            (folder / "best_of_n.json").write_text(json.dumps(told, indent=1))

        run.make("data", fill)
        for n in sorted({row["n"] for row in rows}):
            run.log(n, self._metrics(n, [row for row in rows if row["n"] == n]))
        return run.last

    def _table(self) -> Generations:
        """The table, if it has what is asked of it."""
        table = Generations.open(self.generations)
        if f"members_{self.reward}" not in table.columns:
            raise ValueError(
                f"{table.path} has no scores by {self.reward!r}, but by {list(table.rewards)}; change stage.reward"
            )
        if self.units == "saved" and table.metadata.get("units", {}).get(self.reward) == "none":
            raise ValueError(
                f"the members of {self.reward!r} in {table.path} are raw, each known up to a shift only, so that they "
                "cannot be compared; set stage.units=table, or train them with stage.calibration=standardised"
            )
        return table

    def _curves(self, table: Generations, split: str, seed: int) -> list[dict[str, Any]]:
        column = f"members_{self.reward}"
        samples = table.num_samples(split)
        if self.grid and self.grid[-1] > samples:
            raise ValueError(f"stage.grid ends at {self.grid[-1]}, but {table.path} has {samples} samples a prompt")
        grid = self.grid or grid_to(samples)
        num_members = next(table.blocks(split, [column], 1))[column].shape[2]
        selectors = choosers(self.reward, num_members, self.rules if num_members > 1 else {})
        if "objective" in table.columns:
            selectors["objective"] = by_column("objective")
        gold = {f"gold/{name}": f"gold_{name}" for name in table.gold}
        units = units_of(table, split, [column, *gold.values()], PROMPTS_AT_ONCE) if self.units == "table" else {}
        found = with_single(estimates(table, split, selectors, gold, grid, units, PROMPTS_AT_ONCE))
        return tidy(split, found, grid, self.draws, derive(seed, "bootstrap", split))

    @staticmethod
    def _metrics(n: int, rows: Sequence[dict[str, Any]]) -> Metrics:
        metrics: Metrics = {"best_of_n/kl": kl_of_best_of_n(n)}
        for row in rows:
            place = f"best_of_n/{row['split']}/{row['chosen_by']}"
            metrics[f"{place}/{row['measure']}/mean"] = row["mean"]
            metrics[f"{place}/{row['measure']}/ci95"] = (row["high"] - row["low"]) / 2
            metrics[f"{place}/gain/{row['measure']}/mean"] = row["gain"]
            metrics[f"{place}/gain/{row['measure']}/ci95"] = (row["gain_high"] - row["gain_low"]) / 2
            if row["over_single"] is not None:
                metrics[f"{place}/over_single/{row['measure']}/mean"] = row["over_single"]
                half = (row["over_single_high"] - row["over_single_low"]) / 2
                metrics[f"{place}/over_single/{row['measure']}/ci95"] = half
        return metrics


def _finite(value: Any) -> Any:
    """The value as JSON can say it: null for a bound that is infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
