"""When jobs that need each other end, if so many may run at once."""

import heapq
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Job = TypeVar("Job", bound=Hashable)


def waves(needs: Mapping[Job, Sequence[Job]]) -> list[list[Job]]:
    """The jobs in rounds: each round needs only earlier ones; needs that are no jobs are there already."""
    left, rounds = dict(needs), []
    while left:
        ready = [job for job, needed in left.items() if not any(one in left for one in needed)]
        assert ready, f"a circle among {list(left)}"
        rounds.append(ready)
        for job in ready:
            del left[job]
    return rounds


def makespan(seconds: Mapping[Job, float], needs: Mapping[Job, Sequence[Job]], at_once: int) -> float:
    """Seconds until the last job ends, if each starts as soon as what it needs is there and one of `at_once` is free.

    Jobs that wait start in their order. What a cluster's queue takes is not known and not in it.
    """
    jobs = list(seconds)
    waiting = {place: {one for one in needs[job] if one in seconds} for place, job in enumerate(jobs)}
    ready = [place for place, needed in waiting.items() if not needed]
    running: list[tuple[float, int]] = []  # (when it ends, its place)
    now = 0.0
    while ready or running:
        while ready and len(running) < at_once:
            place = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[jobs[place]], place))
        now, done = heapq.heappop(running)
        for place, needed in waiting.items():
            if jobs[done] in needed:
                needed.remove(jobs[done])
                if not needed:
                    heapq.heappush(ready, place)
    return now
