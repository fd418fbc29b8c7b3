"""No judge: what a run has that compares nothing."""

from collections.abc import Collection, Sequence
from typing import Any, NoReturn, Self

from rlhf_lab.records import Comparison


class NoJudge:
    """Refuses every criterion; a stage that may judge, and is asked for no criterion, runs without one."""

    def check(self, criteria: Collection[str], promised: Collection[str] = ()) -> None:
        if criteria:
            raise ValueError(
                f"judge=none compares nothing, but verdicts on {', '.join(sorted(criteria))} are wanted; choose "
                "judge=gold, simulated, reward_model or openai"
            )

    def load(self, hardware: Any, template: Any) -> Self:
        return self

    def compare(self, comparisons: Sequence[Comparison], criterion: str) -> NoReturn:
        self.check([criterion])
        raise AssertionError("unreachable: every criterion is refused")
