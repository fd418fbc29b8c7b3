"""Making one table of pairs of several, each under a condition that says by what its pairs are judged."""

from collections.abc import Collection, Mapping
from functools import partial

from rlhf_lab.data.tables import Rows, check_table, read_splits
from rlhf_lab.run import Run
from rlhf_lab.stages.shards import write_splits
from rlhf_lab.types import Metrics


class Join:
    """The rows of several folders of tables with a column `condition`, as `data/<split>.parquet`.

    The rows of a split stand together, one source after the other. Each held-out split is also saved apart for each
    source, as `<split>_<name>`, so that a model is evaluated under each condition.

    Args:
        sources: name -> folder of tables by split; all have the same splits.
        conditions: name -> what is to be read after each request of that source.
        train_split: the split that is not saved apart.

    Source: the reward model of P-MORL, Jang et al. 2023, arXiv:2310.11564, section 3: one model reads the preference.
    """

    def __init__(self, *, sources: Mapping[str, str], conditions: Mapping[str, str], train_split: str) -> None:
        if not sources or sources.keys() != conditions.keys():
            raise ValueError(
                f"stage.sources has {sorted(sources)}, stage.conditions {sorted(conditions)}; each table needs both"
            )
        if len(set(conditions.values())) < len(conditions) or not all(map(str.strip, conditions.values())):
            raise ValueError(f"stage.conditions has {list(conditions.values())}; they must differ, and say something")
        self.sources, self.conditions, self.train_split = dict(sources), dict(conditions), train_split

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse a path that is not there, nor promised to be."""
        for path in self.sources.values():
            if path not in promised:
                check_table(path)

    def run(self, run: Run) -> Metrics:
        run.resume()
        tables = {name: read_splits(path, None) for name, path in self.sources.items()}
        splits = list(next(iter(tables.values())))
        for name, table in tables.items():
            if set(table) != set(splits) or self.train_split not in table:
                raise ValueError(
                    f"{self.sources[name]} has the splits {sorted(table)}; expected {sorted(splits)}, and "
                    f"{self.train_split!r} among them (stage.train_split)"
                )
        metrics: Metrics = {}
        joined: dict[str, Rows] = {}
        for split in splits:
            parts = {
                name: [row | {"condition": self.conditions[name]} for row in table[split]]
                for name, table in tables.items()
            }
            joined[split] = _alike([row for part in parts.values() for row in part])
            for name, part in parts.items():
                metrics[f"{split}/{name}/rows"] = float(len(part))
                if split != self.train_split:
                    joined[f"{split}_{name}"] = _alike(part)
        run.make("data", partial(write_splits, joined))
        run.log(0, metrics)
        return metrics


def _alike(rows: Rows) -> Rows:
    """The columns that all rows have; one that only some sources have would be empty in the others."""
    shared = set.intersection(*(set(row) for row in rows))
    return [{key: value for key, value in row.items() if key in shared} for row in rows]
