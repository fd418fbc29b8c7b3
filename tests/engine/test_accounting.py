"""What a step took: seconds, memory and tokens of its phases, held against what was done in them."""

import time

import numpy
import torch

from rlhf_lab.engine import high_water
from rlhf_lab.engine.accounting import Account

MIB = 2**20


def held(mib: int) -> numpy.ndarray:
    """So much main memory, each page of it touched."""
    return numpy.ones(mib * MIB, dtype=numpy.uint8)


def test_the_peak_of_a_phase_is_its_own_and_not_that_of_an_earlier_one():
    account = Account()
    with account.phase("rollout"):
        large = held(300)
        del large
    with account.phase("update"):
        small = held(50)
        del small
    metrics = account.metrics({})
    assert 200 < metrics["memory/rollout"] - metrics["memory/update"] < 300
    assert metrics["memory/peak"] == metrics["memory/rollout"]


def test_the_mark_of_the_process_outlives_those_of_the_phases():
    high_water.mark()
    large = held(300)
    before = high_water.since_begin()[0]
    del large
    high_water.mark()
    assert high_water.since_mark()[0] < before - 200
    assert high_water.since_begin()[0] == before


def test_where_the_kernel_cannot_forget_a_phase_has_the_mark_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(high_water, "_KERNEL_FORGETS", tmp_path / "none" / "clear_refs")
    large = held(200)
    del large
    before = high_water.since_mark()
    high_water.mark()
    assert high_water.since_mark() == before


def test_times_and_rates_are_of_what_was_done(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 25.0, 30.0, 32.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    account = Account()
    for name in ("rollout", "update", "evaluation", "rollout"):
        with account.phase(name):
            pass
    metrics = account.metrics({"rollout": 100, "update": 60})
    assert {name: value for name, value in metrics.items() if not name.startswith("memory/")} == {
        "time/rollout": 4.0,
        "time/update": 1.0,
        "time/evaluation": 5.0,
        "time/share/rollout": 0.4,
        "time/share/update": 0.1,
        "time/share/evaluation": 0.5,
        "throughput/rollout": 25.0,
        "throughput/update": 60.0,
        "throughput/step": 20.0,
    }


def test_the_peak_is_that_of_the_rank_that_held_most(monkeypatch):
    account = Account()
    with account.phase("update"):
        torch.zeros(1)
    monkeypatch.setattr("rlhf_lab.engine.ranks.gather", lambda mine: [mine, {"update": (1e6, 7.0)}])
    metrics = account.metrics({})
    assert (metrics["memory/update"], metrics["memory/device/peak"]) == (1e6, 7.0)
