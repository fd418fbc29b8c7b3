"""A judge that knows the scores and errs as people and language models do; the offline stand-in for both."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
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
        fitted: a file of `stage=fit_judge`, whose manner it has instead; null for the manner above.
    """

    def __init__(self, of: Scoring, manner: Manner, fitted: str | None, seed: int) -> None:
        self.of, self.manner, self.fitted, self.seed = of, manner, fitted, seed

    def check(self, criteria: Collection[str], promised: Collection[str] = ()) -> None:
        self.of.check(criteria, promised)
        if self.fitted is not None and {self.fitted, str(Path(self.fitted).parent)}.isdisjoint(promised):
            read_manner(Path(self.fitted))

    def load(self, hardware: Any, template: Any) -> Self:
        self.of.load(hardware, template)
        if self.fitted is not None:
            self.manner = read_manner(Path(self.fitted))
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


def read_manner(path: Path) -> Manner:
    """The manner that `stage=fit_judge` found.

    Raises:
        ValueError: there is no such file, or no manner in it.
    """
    try:
        return Manner(**json.loads(path.read_text())["manner"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"judge.fitted={path}: {type(error).__name__} {error}; expected the manner.json of a run of stage=fit_judge"
        ) from error
