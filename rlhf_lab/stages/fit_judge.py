"""Learning how a judge errs, from its verdicts, so that a simulated one errs alike."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rlhf_lab.data.tables import check_table, read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.data.verdicts import comparison
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.judges.fitting import fit
from rlhf_lab.judges.scored import Scoring
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.types import Metrics, NonNegativeCount

MANNER = "manner.json"


class FitJudge:
    """The manner of whoever gave a table of verdicts, as `manner.json`, for judge=simulated judge.fitted=<that file>.

    Metrics: each parameter with the ends of its 95 % interval, percentiles of fits to prompts that were drawn again.

    Args:
        verdicts: a table of `stage=judge_pairs`, `verdicts/<split>.parquet`.
        judge: whose scores say how much better the one response is: gold, or reward models. Not who gave the verdicts.
        criteria: of the table, pooled: those of which the judge is to have one manner; null for all.
        draws: fits for the intervals.
    """

    def __init__(
        self,
        *,
        verdicts: str,
        judge: Scoring,
        criteria: Sequence[str] | None,
        model: ModelPaths,
        hardware: Hardware,
        draws: NonNegativeCount,
    ) -> None:
        self.verdicts, self.judge, self.criteria = verdicts, judge, criteria
        self.model, self.hardware, self.draws = model, hardware, draws

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        if not any(str(parent) in promised for parent in (Path(self.verdicts), *Path(self.verdicts).parents)):
            check_table(self.verdicts)
        self.judge.check(self.criteria or (), promised)

    def run(self, run: Run) -> Metrics:
        self.hardware.start()
        run.resume()
        rows = read_table(Path(self.verdicts))
        if missing := {"preference", "wins_shown_first", "wins_shown_second", "response_0"} - rows[0].keys():
            raise ValueError(
                f"{self.verdicts} has no columns {sorted(missing)}; expected a table of verdicts, as stage=judge_pairs "
                "leaves it: runs/<name>/verdicts/<split>.parquet"
            )
        there = dict.fromkeys(row["preference"] for row in rows)
        criteria = self.criteria or tuple(there)
        if absent := sorted(set(criteria) - there.keys()):
            raise ValueError(
                f"{self.verdicts} has no verdicts on {absent}, only on {sorted(there)}; see stage.criteria"
            )
        self.judge.check(criteria)
        judge = self.judge.load(
            self.hardware, Template(load_tokenizer(self.model.policy, self.model.new_tokens), "auto")
        )
        margin, said, prompt = [], [], []
        for criterion in criteria:
            asked = [row for row in rows if row["preference"] == criterion]
            margin += [a - b for a, b in judge.scores([comparison(row) for row in asked], criterion)]
            said += [
                [math.nan if v is None else v for v in (r["wins_shown_first"], r["wins_shown_second"])] for r in asked
            ]
            prompt += [row["id"] for row in asked]
        found = fit(np.array(margin), np.array(said), np.array(prompt), self.draws, derive(run.seed, "intervals"))
        run.write_text(MANNER, json.dumps(asdict(found), indent=1) + "\n")
        metrics: Metrics = {"comparisons": float(found.comparisons), "log_likelihood": found.log_likelihood}
        for name, value in asdict(found.manner).items():
            metrics |= {f"{name}/mean": value, f"{name}/low": found.low[name], f"{name}/high": found.high[name]}
            metrics[f"{name}/ci95"] = (found.high[name] - found.low[name]) / 2
            run.console.say(f"{name}: {value:.3f} [{found.low[name]:.3f}, {found.high[name]:.3f}]")
        run.log(0, metrics)
        return metrics
