"""A judge that knows the scores and errs as people and language models do; the offline stand-in for both."""

import hashlib
from collections.abc import Collection, Sequence
from typing import Any, Self

import numpy as np

from rlhf_lab.judges.manner import Floats, Manner
from rlhf_lab.judges.scored import Scoring
from rlhf_lab.records import Comparison, Verdict


class SimulatedJudge:
    """Says of the scores of another judge what somebody of this manner would say.

    What it says is a function of its seed, the criterion, the request and the two responses: asked again, today or in
    another run, it says the same, and the comparison with its responses exchanged has the mirrored verdict.

    Args:
        of: whose scores; its own verdicts are not read.
        manner: how it errs.
    """

    def __init__(self, of: Scoring, manner: Manner, seed: int) -> None:
        self.of, self.manner, self.seed = of, manner, seed

    def check(self, criteria: Collection[str], promised: Collection[str] = ()) -> None:
        self.of.check(criteria, promised)

    def load(self, hardware: Any, template: Any) -> Self:
        self.of.load(hardware, template)
        return self

    def compare(self, comparisons: Sequence[Comparison], criterion: str) -> list[Verdict]:
        if not comparisons:
            return []
        ordered = [each.responses[0] <= each.responses[1] for each in comparisons]
        known = [each if plain else each.swapped for each, plain in zip(comparisons, ordered, strict=True)]
        margin = np.array([first - second for first, second in self.of.scores(known, criterion)])
        said = self.manner.says(margin, np.array([self._draws(each, criterion) for each in known]))
        verdicts: list[Verdict] = []
        for each, plain, (shown_first, shown_second) in zip(known, ordered, said.tolist(), strict=True):
            if each.responses[0] == each.responses[1]:
                shown_second = 1 - shown_first  # of equal texts it can only say which place it likes
            by_order = (shown_first, shown_second) if plain else (1 - shown_second, 1 - shown_first)
            verdicts.append(Verdict(by_order=by_order, asked=2))
        return verdicts

    def _draws(self, comparison: Comparison, criterion: str) -> Floats:
        """(3,) uniform numbers that are this comparison's own."""
        spelled = "\x1f".join((str(self.seed), criterion, comparison.prompt.id, *comparison.responses))
        digest = hashlib.sha256(spelled.encode("utf-8", "surrogatepass")).digest()
        return np.frombuffer(digest[:24], dtype=">u8") / 2.0**64
