"""A language model behind an OpenAI-compatible endpoint compares, in both orders; nothing is paid for twice."""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from rlhf_lab.engine import ranks
from rlhf_lab.engine.model_paths import check_path
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.judges.endpoint import Decoding, Endpoint, Fault, Prices, Session
from rlhf_lab.judges.price import CHARACTERS_PER_TOKEN, DryRun, Price
from rlhf_lab.judges.reading import Format, Outcome
from rlhf_lab.judges.reply_ledger import ReplyLedger, digest
from rlhf_lab.judges.rubric import Rubric
from rlhf_lab.records import Comparison, Message, Verdict
from rlhf_lab.types import Count, Metrics, NonNegativeCount, Positive, batches

TOKENS_PER_MESSAGE = 4  # that mark a message's role and end
Shown = tuple[int, int]  # a comparison's place, and the order: 0 with its first response as A, 1 with its second


@dataclass(frozen=True)
class Call:
    """One call: what is sent, and which comparisons it shows."""

    key: str
    body: Mapping[str, Any]
    shows: tuple[Shown, ...]
    form: Format


class LanguageModelJudge:
    """Asks a model, by rubrics that are files.

    Args:
        prices: what the endpoint's owner charges; nobody else knows.
        rubrics: criterion -> rubric, a name of those that come with the package or the path of a YAML file.
        wording: criterion -> words, read by rubrics whose question has a `{criterion}`; see `preference_rubric`.
        preference_rubric: judges the criteria that have a wording and no rubric.
        reasoning: whether a reason is asked for, before the verdict.
        demonstrations: whether the rubric's examples are shown.
        pairs_per_call: comparisons in one call. The last call of a criterion and order may have fewer. Those that its
            reply says nothing readable of are asked one by one, as rereads.
        both_orders: whether each pair is asked with either response first; else in one order, which a digest draws.
        rereads: how often a reply that cannot be read is asked for again, with the next seed. What still cannot be read
            then is a verdict of None, which whoever counts verdicts leaves out and counts.
        spend_cap: dollars for all that the ledger holds of this model and decoding; null for none.
        ledger: the folder of replies.
        replay: "ask" calls for what the ledger lacks; "only" refuses to call.
        dry_run: says what would be asked, and asks nothing.
        tokenizer: folder or hub id of one that counts tokens for the estimates; null for four characters a token.

    Source: both orders against the favour of place, Zheng et al. 2023, arXiv:2306.05685; several pairs in one call as
        AlpacaFarm's annotators, Dubois et al. 2023, arXiv:2305.14387, which fills up the last call and drops all
        verdicts of a call that lacks one; we do neither.
    """

    def __init__(
        self,
        *,
        endpoint: Endpoint,
        decoding: Decoding,
        prices: Prices,
        rubrics: Mapping[str, str],
        wording: Mapping[str, str],
        preference_rubric: str,
        reasoning: bool,
        demonstrations: bool,
        pairs_per_call: Count,
        both_orders: bool,
        rereads: NonNegativeCount,
        spend_cap: Positive | None,
        ledger: str,
        replay: Literal["ask", "only"],
        dry_run: bool,
        tokenizer: str | None,
    ) -> None:
        self.endpoint, self.decoding, self.prices = endpoint, decoding, prices
        self.rubrics = dict.fromkeys(wording, preference_rubric) | dict(rubrics)
        self.wording, self.reasoning, self.demonstrations = wording, reasoning, demonstrations
        self.pairs_per_call, self.both_orders, self.rereads = pairs_per_call, both_orders, rereads
        self.replay, self.dry_run, self.tokenizer = replay, dry_run, tokenizer
        self.spend_cap, self.folder = spend_cap, Path(ledger)
        self.counts: Counter[str] = Counter()
        self._counted: Any = None

    def check(self, criteria: Collection[str], promised: Collection[str] = ()) -> None:
        if unknown := sorted(set(criteria) - self.rubrics.keys()):
            raise ValueError(
                f"the judge is asked for {', '.join(unknown)}, but judge.rubrics and judge.wording declare "
                f"{', '.join(sorted(self.rubrics))}; say how to judge it, e.g. '+judge.wording.{unknown[0]}="
                '"Which response is …?"\''
            )
        for criterion in criteria:
            rubric = Rubric.read(self.rubrics[criterion])
            if rubric.reads_wording and criterion not in self.wording:
                raise ValueError(
                    f"rubric {rubric.name} asks for the wording of a criterion; judge.wording has none of {criterion}"
                )
        if self.tokenizer is not None:
            check_path(self.tokenizer, "judge.tokenizer", promised)
        if self.replay == "ask" and not self.dry_run:
            self.endpoint.check()
        elif self.replay == "only" and not self._path.exists():
            raise ValueError(
                f"judge.replay=only, but there is no ledger {self._path}; the model and its decoding name it. Ask "
                "first, with judge.replay=ask, or name another folder with judge.ledger"
            )

    def load(self, hardware: Any, template: Any) -> Self:
        if self.tokenizer is not None:
            self._counted = load_tokenizer(self.tokenizer)
        return self

    def price(self, comparisons: Sequence[Comparison], criterion: str) -> Price:
        """What `compare` would take now, if every reply can be read."""
        known, total = 0, Price()
        calls = {call.key: call for call in self._calls(comparisons, list(self._shown(comparisons)), criterion, 0)}
        for key, call in calls.items():
            if key in self._ledger:
                known += 1
                continue
            tokens = self._tokens(call.body["messages"])
            total += Price(
                calls=1,
                prompt_tokens=tokens,
                reply_tokens=self.decoding.max_tokens,
                dollars=self.prices(tokens, self.decoding.max_tokens),
            )
        by = self.tokenizer or f"{CHARACTERS_PER_TOKEN:g} characters a token"
        return total + Price(known=known, counted_by=f"estimated by {by}")

    @property
    def account(self) -> Metrics:
        """What this process asked so far, and what all that the ledger holds cost."""
        names = ("calls", "replayed", "faults", "rereads", "unreadable", "refused", "interrupted")
        return {f"judge/{name}": float(self.counts[name]) for name in names} | {
            "judge/dollars_in_ledger": self._ledger.spent
        }

    def compare(self, comparisons: Sequence[Comparison], criterion: str) -> list[Verdict]:
        """One verdict each; of several processes the first alone asks.

        Raises:
            EndpointError, SpendCap: asking cannot go on; what was answered is in the ledger.
            DryRun: nothing is to be asked.
            ValueError: `replay=only`, and a reply is not in the ledger.
        """
        if self.dry_run:
            raise DryRun(f"{self.price(comparisons, criterion)}; judge.dry_run=true, so nothing was asked")
        return ranks.broadcast(self._compare(comparisons, criterion) if ranks.is_first() else None)

    def _compare(self, comparisons: Sequence[Comparison], criterion: str) -> list[Verdict]:
        rubric = Rubric.read(self.rubrics[criterion])
        found: dict[Shown, Outcome] = {}
        waiting = list(self._shown(comparisons))
        for attempt in range(1 + self.rereads):
            calls = self._calls(comparisons, waiting, criterion, attempt)
            self.counts["rereads"] += len(waiting) if attempt else 0
            self._answer(calls)
            refused: set[Shown] = set()
            for call in calls:
                reply = self._ledger[call.key]
                read = call.form.read(reply.text, rubric, len(call.shows))
                found |= {shown: said for shown, said in zip(call.shows, read, strict=True) if said is not None}
                if reply.was_refused and len(call.shows) == 1:
                    refused.add(call.shows[0])
            self.counts["refused"] += len(refused)
            waiting = [shown for shown in waiting if shown not in found and shown not in refused]
            if not waiting:
                break
        verdicts = [self._verdict(i, found, self._asked(each)) for i, each in enumerate(comparisons)]
        self.counts["unreadable"] += sum(verdict.wins is None for verdict in verdicts)
        return verdicts

    def _shown(self, comparisons: Sequence[Comparison]) -> Iterator[Shown]:
        """What is asked, pass by pass: of the first pass a digest of the texts draws the order, the second turns it.

        So one call of several pairs mixes the orders, and a comparison with its responses exchanged is shown alike.
        """
        drawn = [
            int(digest(each.prompt.id, sorted(each.responses)), 16) % 2 ^ (each.responses[0] > each.responses[1])
            for each in comparisons
        ]
        yield from enumerate(drawn)
        yield from ((i, 1 - order) for i, order in enumerate(drawn) if self._asked(comparisons[i]) == 2)

    def _asked(self, comparison: Comparison) -> int:
        """In how many orders. Of equal texts both are one call, and its verdict for a place is one against it too."""
        return 2 if self.both_orders or comparison.responses[0] == comparison.responses[1] else 1

    def _calls(
        self, comparisons: Sequence[Comparison], waiting: Sequence[Shown], criterion: str, attempt: int
    ) -> list[Call]:
        """The calls that ask for what is waiting: several pairs each at first, single ones when asked again."""
        rubric, words = Rubric.read(self.rubrics[criterion]), self.wording.get(criterion, "")
        size = 1 if attempt else self.pairs_per_call
        form = Format(structured=self.decoding.structured, reasoning=self.reasoning, batched=size > 1)
        schema = form.schema(rubric) if self.decoding.structured else None
        passes = [waiting] if attempt else [waiting[part] for part in batches(len(waiting), len(comparisons) or 1)]
        calls: list[Call] = []
        for shown in passes:
            for part in batches(len(shown), size):
                pairs = [comparisons[i].swapped if order else comparisons[i] for i, order in shown[part]]
                messages = rubric.messages(pairs, words, form, self.demonstrations)
                body = self.decoding.body(messages, schema, attempt)
                calls.append(Call(digest(body, attempt), body, tuple(shown[part]), form))
        return calls

    def _verdict(self, i: int, found: Mapping[Shown, Outcome], asked: int) -> Verdict:
        said = [found.get((i, order)) for order in (0, 1)]
        by_order = (said[0] and said[0].first_wins, said[1] and 1 - said[1].first_wins)
        scores = [
            outcome.scores if order == 0 else outcome.scores[::-1]
            for order, outcome in enumerate(said)
            if outcome is not None and outcome.scores is not None
        ]
        return Verdict(
            by_order=by_order,
            scores=(sum(s[0] for s in scores) / len(scores), sum(s[1] for s in scores) / len(scores))
            if scores
            else None,
            reasons=(said[0].reasoning if said[0] else "", said[1].reasoning if said[1] else ""),
            asked=asked,
        )

    @cached_property
    def _path(self) -> Path:
        model = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in self.decoding.model)
        return self.folder / f"{model}-{digest(self._covers)[:10]}.jsonl"

    @property
    def _covers(self) -> dict[str, Any]:
        fields = ("model", "temperature", "top_p", "seed", "max_tokens", "limit_field", "structured")
        return {name: getattr(self.decoding, name) for name in fields}

    @cached_property
    def _ledger(self) -> ReplyLedger:
        return ReplyLedger(self._path, self._covers, self.spend_cap)

    def _tokens(self, messages: Sequence[Message]) -> float:
        def count(text: str) -> float:
            return len(self._counted.encode(text)) if self._counted is not None else len(text) / CHARACTERS_PER_TOKEN

        return sum(count(message["content"]) + TOKENS_PER_MESSAGE for message in messages)

    def _answer(self, calls: Sequence[Call]) -> None:
        """See that the ledger has a reply to each of the calls."""
        unique = {call.key: call for call in calls}
        missing = [call for key, call in unique.items() if key not in self._ledger]
        self.counts["replayed"] += len(unique) - len(missing)
        if not missing:
            return
        if self.replay == "only":
            raise ValueError(
                f"judge.replay=only, but {len(missing)} of {len(unique)} replies are not in {self._path}; ask for them "
                "with judge.replay=ask"
            )
        with self._ledger.held():
            left = [call for call in missing if call.key not in self._ledger]  # somebody else may have asked meanwhile
            self.counts["replayed"] += len(missing) - len(left)
            self.counts["interrupted"] += sum(call.key in self._ledger.in_flight for call in left)
            asyncio.run(self._ask(left))

    async def _ask(self, calls: Sequence[Call]) -> None:
        """Ask, several at one time; the first that cannot be asked ends it, after the others' replies are in."""
        waiting = iter(calls)
        errors: list[Exception] = []

        async def worker(session: Session) -> None:
            for call in waiting:  # one iterator for all workers: each call is taken once
                try:
                    await self._one(session, call)
                except Exception as error:
                    errors.append(error)
                if errors:
                    return

        async with self.endpoint.session() as session:
            count = min(self.endpoint.concurrency, len(calls))
            await asyncio.gather(*(worker(session) for _ in range(count)))
        if errors:
            raise errors[0]

    async def _one(self, session: Session, call: Call) -> None:
        tokens = self._tokens(call.body["messages"])
        at_most = self.prices(tokens, self.decoding.max_tokens)

        def failed(fault: Fault) -> None:
            self.counts["faults"] += 1
            self._ledger.lost(call.key, fault.why, fault.was_paid)

        reply = await session.ask(
            call.body,
            call.key,
            tokens + self.decoding.max_tokens,
            self.prices,
            at_most,
            begun=lambda: self._ledger.asked(call.key, at_most),
            failed=failed,
        )
        self.counts["calls"] += 1
        self._ledger.answered(call.key, reply)
