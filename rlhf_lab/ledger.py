"""Which prompts were used for which safety test. A prompt that was tested on is spent: its answers have been seen.

One JSON object a line, beside the runs. It is read and extended under a lock and rewritten whole, so that two tests at
one time cannot both be the first, and a crash leaves no half line.
"""

import fcntl
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_lab.engine.checkpoint import write_atomically


class SpentPrompts(ValueError):
    """The prompts were tested on before; the message says by what, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One test.

    Fields:
        run: its directory.
        identity: digest of its configuration and of everything that it reads; the same test, resumed, has the same.
        prompt_set, cost_model, policy: digests; `None` for weights that are not a local folder.
        prompts: ids, so that a test on some of them is found too.
        test: its number in its family, from 1: with the tests on any of these prompts, and those on any of theirs.
        delta: what it spent; `alpha_spent` is what its family spent so far.
    """

    run: str
    identity: str
    prompt_set: str
    cost_model: str | None
    policy: str | None
    limit: float
    test: int
    delta: float
    alpha_spent: float
    prompts: list[str]


def spent_on(test: int, delta: float) -> float:
    """What the k-th test on one set of prompts may spend, if all of them together may spend delta.

        delta_k = delta 6 / (pi^2 k^2),        sum over k = delta

    So by Boole's inequality one or more of any number of tests is wrong with probability delta at most, as long as
    what the former tests showed did not shape the policy that is tested next: it pays for repetition, not for tuning.
    And as long as all of them spend so: a family that one test joined to another may have spent more, see `enter`.

    Source: alpha spending, Foster and Stine 2008, J. R. Statist. Soc. B 70:429, with the series of the Basel problem.
    """
    return delta * 6 / (math.pi * test) ** 2


class Ledger:
    """The file in which tests are entered, before their first answer is drawn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Entry]:
        """Every test, oldest first; none if there is no file."""
        if not self.path.exists():
            return []
        return [Entry(**json.loads(line)) for line in self.path.read_text().splitlines()]

    def enter(
        self,
        *,
        run: Path,
        identity: str,
        prompts: Sequence[str],
        prompt_set: str,
        cost_model: str | None,
        policy: str | None,
        limit: float,
        delta: float,
        spending: bool,
        check: Callable[[float], None],
    ) -> Entry:
        """Enter a test, or find it entered by the run that is now resumed.

        Args:
            prompts: the ids on which it tests.
            delta: of the whole family of tests if `spending`, of this one if not.
            spending: whether prompts may be tested on again, the k-th time at `spent_on(k, delta)`.
            check: called with what the test may spend before it is entered; raises what refuses it.

        Raises:
            SpentPrompts: some of the prompts were tested on before, and `spending` is off, or the family of tests would
                spend more than delta: a former one did not spend sparingly, or this one joins families.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = self.read()
            for entry in entries:
                if entry.identity == identity:
                    return entry
            ours = set(prompts)
            former = _family(ours, entries)
            test = 1 + len(former)
            spent = spent_on(test, delta) if spending else delta
            before = sum(each.delta for each in former)
            if former and (not spending or before + spent > delta):
                last = [entry for entry in former if not ours.isdisjoint(entry.prompts)][-1]
                again = len(ours & {prompt for entry in former for prompt in entry.prompts})
                reason = (
                    f"these tests spent {before:.4g}, and {spent:.4g} asked for test {test} makes that more than "
                    f"bound.delta={delta:g}. Take fresh prompts"
                    if spending
                    else "a bound holds for one test only. Take fresh prompts; prompts of which every test, the first "
                    "too, has stage.alpha_spending=true can be tested on again"
                )
                raise SpentPrompts(
                    f"{again} of these {len(ours)} prompts were tested on before, last by {last.run}; {reason}"
                )
            check(spent)
            entry = Entry(
                run=str(run),
                identity=identity,
                prompt_set=prompt_set,
                cost_model=cost_model,
                policy=policy,
                limit=limit,
                test=test,
                delta=spent,
                alpha_spent=before + spent,
                prompts=sorted(ours),
            )
            lines = [json.dumps(asdict(each)) for each in [*entries, entry]]
            write_atomically(self.path, "".join(f"{line}\n" for line in lines))
            return entry


def _family(prompts: set[str], entries: Sequence[Entry]) -> list[Entry]:
    """The tests that share prompts with these, or with one another and so on to these; in the order of `entries`.

    Those that share directly are not enough: many small tests, each on other prompts of one large test, would each find
    that one alone, and spend more than delta together with it.
    """
    reached, family = set(prompts), []
    while joined := [each for each in entries if each not in family and not reached.isdisjoint(each.prompts)]:
        family += joined
        reached |= {prompt for each in joined for prompt in each.prompts}
    return [entry for entry in entries if entry in family]
