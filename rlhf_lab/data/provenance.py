"""What a model saw while it was made, as far as the runs that made it recorded it: their frozen configurations."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.tables import need, prompt_of, read_splits

DATASET = f"{Dataset.__module__}.{Dataset.__name__}"


def run_of(path: str) -> Path | None:
    """The run directory that made what lies at `path`, its output or a file in that.

    None for what no run made, or no longer beside its record.
    """
    for folder in list(Path(path).expanduser().absolute().parents)[:2]:
        if (folder / "config.yaml").is_file() and (folder / "environment.json").is_file():
            return folder
    return None


def runs_behind(paths: Sequence[str]) -> dict[Path, dict[str, Any]]:
    """run directory -> its frozen configuration, for the runs that made these, and those that made what they read."""
    found: dict[Path, dict[str, Any]] = {}
    waiting = list(paths)
    while waiting:
        run = run_of(waiting.pop())
        if run is None or run in found:
            continue
        found[run] = yaml.safe_load((run / "config.yaml").read_text())
        waiting += _texts(found[run]["stage"])
    return found


def prompts_behind(config: Mapping[str, Any]) -> set[str]:
    """Ids of the prompts that a run learnt from: of its training splits, and of the one that a scorer is fitted to.

    Raises:
        ValueError: its data are no longer there, or its record is of another version.
    """
    stage = config["stage"]
    imitates = stage["_target_"].endswith(".TrainOffline")  # of the embedded world nothing else can be learnt offline
    ids: set[str] = set()
    for name, node in _datasets(stage):
        try:
            dataset = _made(node)
        except (TypeError, AttributeError, ImportError) as error:
            raise ValueError(
                f"the data set {node.get('path')} was recorded by another version of rlhf_lab ({error}); copy the "
                "model out of its run directory and name what it was trained on with stage.disjoint_from"
            ) from error
        splits = [dataset.train_split]
        if stage.get("calibration", "none") != "none":
            splits += dataset.splits[:1]
        reads = "demonstrations" if imitates or name == "demonstrations" else "prompts"
        for split in splits:
            ids |= dataset.prompt_ids(split, reads)
    return ids


def _made(node: Any) -> Any:
    """What a node of a frozen configuration says is to be made, of the classes of this package's data alone.

    Raises:
        ValueError: it names another.
    """
    if isinstance(node, list):
        return [_made(entry) for entry in node]
    if not isinstance(node, Mapping):
        return node
    inner = {key: _made(value) for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return inner
    module, _, name = node["_target_"].rpartition(".")
    if not module.startswith("rlhf_lab.data."):
        raise ValueError(f"a recorded data set is made with {node['_target_']}, which is none of rlhf_lab.data")
    return getattr(import_module(module), name)(**inner)


def prompts_of_table(path: str, column: str) -> set[str]:
    """Ids of all prompts of a table, whatever its splits.

    Raises:
        ValueError: there is no such table, or no such column in it.
    """
    ids: set[str] = set()
    for split, rows in read_splits(path, None, [column]).items():
        need(rows, {"prompt": column}, ["prompt"], f"{path} ({split})", "stage.disjoint_from")
        ids |= {prompt_of(row[column]).id for row in rows if row.get(column)}
    return ids


def _texts(value: Any) -> Iterator[str]:
    """Every text in a configuration; those that are paths of made things lead to the runs that made them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(entry)


def _datasets(stage: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(key, node) of every data set that a stage reads."""
    for key, value in stage.items():
        if isinstance(value, Mapping):
            if value.get("_target_") == DATASET:
                yield key, value
            else:
                yield from _datasets(value)
