"""Which of two preferences is the stronger: pairs of pairs from margins, as synthetic annotation."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import torch

from rlhf_lab.seeds import generator

Sampling = Literal["iterative", "random"]


def pair_up(margins: Sequence[float], sampling: Sampling, partners: int, seed: int) -> list[tuple[int, int]]:
    """(stronger, weaker) places in `margins`.

    Args:
        margins: by how much each pair's preferred response wins.
        sampling: "iterative" takes each pair in turn as the stronger one and draws `partners` of those with a smaller
            margin, all of them where there are fewer: every pair is the stronger one as often, weak pairs too, but for
            the few that win by least. "random" draws as many couples of pairs and orders each by margin, so the
            stronger places go to pairs of large margins: the share of one with a fraction f below it is 2 f times even.
        partners: k, weaker pairs for each pair.

    Returns:
        each couple once; couples of equal margins have no order and are left out.

    Source: the two strategies of Chittepu et al. 2025, arXiv:2509.22851.
    """
    drawing = generator(seed, "quadruples", sampling)
    if sampling == "random":
        couples = (
            torch.randint(len(margins), (2,), generator=drawing).tolist() for _ in range(partners * len(margins))
        )
        ordered = ((a, b) if margins[a] > margins[b] else (b, a) for a, b in couples if margins[a] != margins[b])
        return list(dict.fromkeys(ordered))
    weakest_first = sorted(range(len(margins)), key=margins.__getitem__)
    ascending = [margins[i] for i in weakest_first]
    found: list[tuple[int, int]] = []
    for strong, margin in enumerate(margins):
        weaker = bisect_left(ascending, margin)  # how many have a smaller margin
        found += [(strong, weakest_first[i]) for i in torch.randperm(weaker, generator=drawing)[:partners].tolist()]
    return found


def flip(couples: Sequence[tuple[int, int]], share: float, seed: int) -> list[tuple[int, int]]:
    """The couples, exactly this share of them the wrong way round: a noisy annotator of strengths."""
    order = torch.randperm(len(couples), generator=generator(seed, "strength noise"))
    wrong = set(order[: round(share * len(couples))].tolist())
    return [(b, a) if i in wrong else (a, b) for i, (a, b) in enumerate(couples)]
