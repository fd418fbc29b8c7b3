"""Jobs that need each other: against every order of starting them, by brute force."""

import random
from itertools import permutations

import pytest

from rlhf_lab.launch.schedule import makespan, waves


def in_order(order, seconds, needs, at_once):
    """Ends of jobs that are started in just this order, each as soon as it may: a slow loop."""
    ends: dict[str, float] = {}
    workers = [0.0] * at_once
    begun = 0.0
    for job in order:
        free = min(range(at_once), key=workers.__getitem__)
        begun = max(begun, workers[free], *(ends.get(one, 0.0) for one in needs[job]))
        ends[job] = workers[free] = begun + seconds[job]
    return max(ends.values())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_makespan_lies_between_the_bounds_that_no_schedule_can_beat_and_greedy_ones_keep(seed, at_once):
    drawn = random.Random(seed)
    jobs = list("abcde")
    seconds = {job: drawn.uniform(1, 9) for job in jobs}
    needs = {job: [other for other in jobs[:i] if drawn.random() < 0.4] for i, job in enumerate(jobs)}
    got = makespan(seconds, needs, at_once)
    valid = [
        order for order in permutations(jobs) if all(order.index(n) < order.index(j) for j in jobs for n in needs[j])
    ]
    best = min(in_order(order, seconds, needs, at_once) for order in valid)
    assert best <= got + 1e-9
    assert got <= (2 - 1 / at_once) * best + 1e-9  # Graham's bound of every greedy schedule
    if at_once == 1:
        assert got == pytest.approx(sum(seconds.values()))


def test_makespan_of_cases_that_are_seen_at_a_glance():
    assert makespan({}, {}, 2) == 0
    assert makespan({"a": 3, "b": 3, "c": 3}, {"a": [], "b": [], "c": []}, 2) == 6
    assert makespan({"a": 3, "b": 1, "c": 1}, {"a": [], "b": ["a"], "c": ["a"]}, 5) == 4
    assert makespan({"b": 1}, {"b": ["there already"]}, 1) == 1


def test_waves_hold_what_needs_only_earlier_waves():
    needs = {"run": ["rm", "sft"], "rm": ["data"], "data": ["sft"], "sft": [], "rm2": ["data", "there already"]}
    assert waves(needs) == [["sft"], ["data"], ["rm", "rm2"], ["run"]]
    assert waves({}) == []
