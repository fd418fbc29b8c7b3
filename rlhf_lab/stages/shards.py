"""Work in pieces, each on the disk before the next begins: whole, sealed by hashes, and made again if it is damaged."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rlhf_lab.data.tables import Rows, write_table
from rlhf_lab.engine import ranks
from rlhf_lab.engine.accounting import Account
from rlhf_lab.engine.checkpoint import DamagedCheckpoint, check_seal, seal
from rlhf_lab.run import Run
from rlhf_lab.types import Metrics, Rollout

ROWS = "rows.parquet"


@dataclass(frozen=True)
class Shard:
    """What one piece of work leaves: its rows, and how many tokens were generated or scored for them; 0 for none."""

    rows: Rows
    tokens: int


def tokens_of(rollout: Rollout) -> int:
    """How many tokens its responses have."""
    return int(rollout.sequences.response_mask.sum())


def write_splits(tables: Mapping[str, Rows], folder: Path) -> None:
    """Write a table for each split, `<split>.parquet`."""
    for split, rows in tables.items():
        write_table(rows, folder / f"{split}.parquet")


def is_sound(run: Run, place: str) -> bool:
    """Whether the folder `place` of the run is there with all that was saved in it; damage is said."""
    sound = False
    folder = run.directory / place
    if ranks.is_first() and folder.exists():
        try:
            check_seal(folder)
            sound = True
        except DamagedCheckpoint as error:
            run.console.warn(f"damaged, made again: {error}")
    return ranks.broadcast(sound)


def store(run: Run, place: str, tables: Mapping[str, Rows]) -> None:
    """Save tables, file name -> rows, as parquet or as JSON lines, in the folder `place` of the run."""

    def fill(folder: Path) -> None:
        for name, rows in tables.items():
            if name.endswith(".parquet"):
                write_table(rows, folder / name)
            else:
                (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        seal(folder)

    run.make(place, fill)


def sharded(run: Run, name: str, what: str, makers: Sequence[Callable[[], Shard]]) -> list[Path]:
    """Make the shards that are not there yet, and stop between two of them if the run is asked to.

    Args:
        name: of the shards, which are the folders `shards/<name>_<i>`.
        what: is done, for the person who looks on.
        makers: of each shard, with random numbers of its own, so that it may be made at any time.

    Returns:
        The file of each shard's rows.
    """
    places = [f"shards/{name}_{i:04d}" for i in range(len(makers))]
    missing = [i for i, place in enumerate(places) if not is_sound(run, place)]
    there = len(makers) - len(missing)
    pace: Metrics = {}
    tokens, begun = 0, perf_counter()
    for k in run.steps(f"{what}, shard", there, len(makers), pace):
        run.pause()
        i = missing[k - there]
        account = Account()
        with account.phase("shard"):
            shard = makers[i]()
        store(run, places[i], {ROWS: shard.rows})
        tokens += shard.tokens
        pace |= account.metrics({})
        if tokens:
            pace["throughput/step"] = tokens / (perf_counter() - begun)
    return [run.directory / place / ROWS for place in places]
