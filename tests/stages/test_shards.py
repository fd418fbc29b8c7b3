"""Work in pieces: each is whole or made again, and none is made twice."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_lab import stopping
from rlhf_lab.console import Console
from rlhf_lab.data.tables import read_table
from rlhf_lab.run import Run
from rlhf_lab.stages.shards import Shard, sharded
from rlhf_lab.stopping import Stopped
from rlhf_lab.tracking import NoTracker

NUMBERS = range(5)


def open_run(tmp_path: Path) -> Run:
    return Run.open(
        tmp_path / "run",
        config={"seed": 0, "keep_checkpoints": 2},
        overrides=[],
        artifacts={},
        tracker=NoTracker(),
        console=Console(),
    )


def makers(made: list[int]) -> list[Callable[[], Shard]]:
    def of(i: int) -> Callable[[], Shard]:
        def make() -> Shard:
            made.append(i)
            return Shard([{"square": i * i}, {"square": -i}], 10)

        return make

    return [of(i) for i in NUMBERS]


def squares(files: list[Path]) -> list[int]:
    return [row["square"] for file in files for row in read_table(file)]


def test_all_shards_are_made_once_in_their_order(tmp_path):
    run = open_run(tmp_path)
    made: list[int] = []
    expected = [value for i in NUMBERS for value in (i * i, -i)]
    assert squares(sharded(run, "s", "squaring", makers(made))) == expected
    assert made == list(NUMBERS)
    assert squares(sharded(run, "s", "squaring", makers(made))) == expected
    assert made == list(NUMBERS)


@pytest.mark.parametrize("name", ["rows.parquet", "sha256.json"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied", "removed"])
def test_a_damaged_shard_is_said_and_made_again_alone(tmp_path, name, harm, capsys):
    run = open_run(tmp_path)
    made: list[int] = []
    files = sharded(run, "s", "squaring", makers(made))
    victim = files[3].with_name(name)
    whole = victim.read_bytes()
    changed = {"flipped": bytes([whole[0] ^ 1]) + whole[1:], "cut": whole[:-2], "emptied": b""}
    if harm == "removed":
        victim.unlink()
    else:
        victim.write_bytes(changed[harm])
    made.clear()
    assert squares(sharded(run, "s", "squaring", makers(made))) == [v for i in NUMBERS for v in (i * i, -i)]
    assert made == [3]
    assert "WARNING damaged, made again" in capsys.readouterr().out
    assert victim.exists()


def test_a_shard_that_was_half_written_counts_for_nothing(tmp_path):
    run = open_run(tmp_path)
    half = run.directory / "shards/.s_0002.99.tmp"
    half.mkdir(parents=True)
    (half / "rows.parquet").write_bytes(b"PAR1 half")
    (run.directory / "shards/s_0001").mkdir()
    made: list[int] = []
    assert squares(sharded(run, "s", "squaring", makers(made))) == [v for i in NUMBERS for v in (i * i, -i)]
    assert made == list(NUMBERS)


def test_it_stops_between_two_shards_when_asked(tmp_path):
    run = open_run(tmp_path)
    made: list[int] = []
    asking = makers(made)

    def ask() -> Shard:
        (run.directory / "stop").touch()
        return makers(made)[1]()

    asking[1] = ask
    with pytest.raises(Stopped, match="asked by the file"):
        sharded(run, "s", "squaring", asking)
    assert made == [0, 1]
    assert squares(sharded(run, "s", "squaring", makers(made))) == [v for i in NUMBERS for v in (i * i, -i)]
    assert made == list(NUMBERS)


@pytest.mark.parametrize(("number", "before_it_stops"), [(signal.SIGUSR2, [0]), (signal.SIGTERM, [])])
def test_a_signal_is_heard_between_two_shards_and_a_warning_only_when_there_is_one(tmp_path, number, before_it_stops):
    run = open_run(tmp_path)
    before = signal.getsignal(signal.SIGUSR2)
    stopping.listen()
    try:
        signal.raise_signal(number)
        made: list[int] = []
        with pytest.raises(Stopped, match=number.name):
            sharded(run, "s", "squaring", makers(made))
        assert made == before_it_stops
    finally:
        stopping.forget()
        signal.signal(signal.SIGUSR2, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_shard_that_fails_leaves_those_before_it(tmp_path):
    run = open_run(tmp_path)
    made: list[int] = []
    failing = makers(made)

    def fail() -> Shard:
        raise RuntimeError("no")

    failing[2] = fail
    with pytest.raises(RuntimeError, match="no"):
        sharded(run, "s", "squaring", failing)
    assert sorted(path.name for path in (run.directory / "shards").iterdir()) == ["s_0000", "s_0001"]
