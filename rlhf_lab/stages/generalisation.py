"""Several policies in and out of distribution, from finished evaluations: the matrix of scores, the gaps, a table."""

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import yaml

from rlhf_lab.data.generations import Generations
from rlhf_lab.evaluation.generalisation import MEASURES, Cell, matrix
from rlhf_lab.run import Run
from rlhf_lab.types import Metrics

COLUMNS = ("method", "metric", "split", "value", "low", "high", "over", "prompts", "runs", "excluded")
GAPS = ("value", "low", "high", "is_paired")


class Generalisation:
    """Leaves `generalisation.json`, `generalisation.csv`, and the same as metrics.

    Metrics: `generalisation/<method>/<split>/<metric>/…` and, of every split but the one in distribution,
    `gap/<method>/<split>/<metric>/…`, each mean, low, high and ci95, half its 95 % interval: over prompts for a method
    with one run (of shares Wilson's, else Student's), over its runs if it has several.

    Args:
        policies: method -> the folder or generation table of its evaluation, or a list of them, one for each seed.
        sweep: a folder of a sweep instead: its runs are of one method if they were typed alike but for the seed.
        in_distribution: the split that gaps are counted from.
        splits: to be compared; null: all that every table has.
        metrics: columns of the tables, as gold_helpfulness; null: every score, gold score, text measure, verdict and
            KL that all tables have.
    """

    def __init__(
        self,
        *,
        policies: Mapping[str, str | Sequence[str]],
        sweep: str | None,
        in_distribution: str,
        splits: Sequence[str] | None,
        metrics: Sequence[str] | None,
    ) -> None:
        self.policies = {name: [each] if isinstance(each, str) else list(each) for name, each in policies.items()}
        self.sweep, self.in_distribution = sweep, in_distribution
        self.splits, self.metrics = splits, metrics

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is read; `promised` paths will be there by then."""
        if bool(self.policies) == (self.sweep is not None):
            raise ValueError(
                "name either stage.policies, e.g. '+stage.policies.ppo=runs/evaluate-ppo', or stage.sweep, the folder "
                "of a sweep of evaluations"
            )
        if self.sweep is not None and self.sweep not in promised:
            self._swept(Path(self.sweep))
        for name, paths in self.policies.items():
            if not paths:
                raise ValueError(f"stage.policies.{name} is empty; name the folder of its evaluation")
            for path in paths:
                if path not in promised:
                    Generations.open(path)

    def run(self, run: Run) -> Metrics:
        run.resume()
        paths = self.policies or self._swept(Path(self.sweep or ""))
        tables = {method: [Generations.open(path) for path in each] for method, each in paths.items()}
        splits = self._common(tables, "splits", self.splits)
        if self.in_distribution not in splits:
            raise ValueError(f"stage.in_distribution={self.in_distribution}, but the tables share the splits {splits}")
        measures = {method: [_measures(table) for table in each] for method, each in tables.items()}
        metrics = self._shared(measures, "metrics", self.metrics)
        order = [self.in_distribution, *(split for split in splits if split != self.in_distribution)]
        cells = matrix(tables, metrics, order, self.in_distribution)
        for cell in cells:
            if cell.excluded and cell.metric.startswith("verdict_"):  # of the rest it is what they are defined on
                run.warn(0, f"{cell.method}, {cell.split}: {cell.excluded} responses have no {cell.metric}; left out")
        self._write(run, cells, metrics)
        found: Metrics = {}
        for cell in cells:
            found |= cell.estimate.named(f"generalisation/{cell.method}/{cell.split}/{cell.metric}")
            if cell.gap is not None:
                found |= cell.gap.named(f"gap/{cell.method}/{cell.split}/{cell.metric}")
        run.log(0, found)
        return found

    def _write(self, run: Run, cells: Sequence[Cell], metrics: Sequence[str]) -> None:
        rows = [cell.row for cell in cells]
        result = {"in_distribution": self.in_distribution, "metrics": list(metrics), "rows": rows}
        run.write_text("generalisation.json", json.dumps(result, indent=1))
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([*COLUMNS, *(f"gap_{name}" for name in GAPS)])
        for row in rows:
            fall = row["gap"] or dict.fromkeys(GAPS, "")
            writer.writerow([*(row[name] for name in COLUMNS), *(fall[name] for name in GAPS)])
        run.write_text("generalisation.csv", text.getvalue())

    def _swept(self, folder: Path) -> dict[str, list[str]]:
        """method -> its runs, by what was typed for each, the seed aside.

        Raises:
            ValueError: there is no such folder, or it holds no runs.
        """
        runs = sorted(path.parent for path in folder.glob("*/overrides.yaml"))
        if not runs:
            raise ValueError(f"stage.sweep={folder} holds no runs; name the folder of a sweep, sweeps/<name>")
        typed = {path: yaml.safe_load((path / "overrides.yaml").read_text()) or [] for path in runs}
        everywhere = set.intersection(*(set(each) for each in typed.values()))
        methods: dict[str, list[str]] = {}
        for path, each in typed.items():
            own = [word for word in each if word not in everywhere and not word.startswith(("seed=", "name="))]
            methods.setdefault(" ".join(own) or folder.name, []).append(str(path))
        return methods

    def _common(self, tables: Mapping[str, Sequence[Generations]], key: str, wanted: Sequence[str] | None) -> list[str]:
        return self._shared({m: [list(table.splits) for table in each] for m, each in tables.items()}, key, wanted)

    @staticmethod
    def _shared(there: Mapping[str, Sequence[Sequence[str]]], key: str, wanted: Sequence[str] | None) -> list[str]:
        """What every table has, or what is wanted.

        Raises:
            ValueError: a table lacks what is wanted, or they share nothing.
        """
        every = [names for tables in there.values() for names in tables]
        if wanted is None:
            shared = [name for name in every[0] if all(name in names for names in every)]
            if not shared:
                raise ValueError(f"the tables share no {key}: {[sorted(names) for names in every]}; name fewer tables")
            return shared
        for method, tables in there.items():
            for names in tables:
                if missing := [name for name in wanted if name not in names]:
                    raise ValueError(f"stage.{key} has {missing}, but a table of {method} has {sorted(names)}")
        return list(wanted)


def _measures(table: Generations) -> list[str]:
    return [name for kind in MEASURES for name in table.columns if name.startswith(kind)]
