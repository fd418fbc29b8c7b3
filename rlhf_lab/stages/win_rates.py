"""Two or more policies before a judge: win rates by criterion and by several together, and ratings."""

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

from rlhf_lab.data.tables import read_table, write_table
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.evaluation.matches import Match
from rlhf_lab.evaluation.win_rates import Judgement, combined, order_bias, ratings, read_judgements, win_rates
from rlhf_lab.interfaces import Judge
from rlhf_lab.judges.price import account, announce
from rlhf_lab.records import Comparison
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.contestants import Contestants
from rlhf_lab.stages.shards import Shard, sharded
from rlhf_lab.types import Count, Metrics, NonNegative, batches

VERDICTS = "verdicts.parquet"


class WinRates:
    """A judge compares the contestants' responses, two at a time.

    Leaves `data/verdicts.parquet`, a row for each pair of responses and criterion (see `Judgement`; with the judge's
    scores and reasons); `win_rates.csv`; `ratings.csv`; and the same as metrics, `win_rate/<split>/<criterion>/<first>/
    <second>/…`, `rating/<split>/<criterion>/<name>/…`, and `verdicts/<split>/<criterion>/…`, how far the judge goes
    by the order.

    Args:
        criteria: that the judge decides by.
        combinations: name -> criteria that are counted together, see `combined`; judged too if not among `criteria`.
        against: the contestant that all others are compared with; null compares all pairs.
        length_control: also report what the share would be at equal length.
        anchor: the contestant with the rating `anchor_rating`; null for the first.
        virtual_ties: drawn games added to every pair, which keep ratings finite where someone won everything; 0 for
            none, and then such ratings are refused.
        draws: resamples of the prompts for the ratings' intervals.
        pairs_per_shard: verdicts between two saves; a killed run continues after its last shard.

    Source: win rates with ties as halves and both orders, as AlpacaEval has them, Dubois et al. 2023, arXiv:2305.14387;
    ratings, Chiang et al. 2024, arXiv:2403.04132.
    """

    def __init__(
        self,
        *,
        contestants: Contestants,
        model: ModelPaths,
        judge: Judge,
        criteria: Sequence[str],
        combinations: Mapping[str, Sequence[str]],
        against: str | None,
        length_control: bool,
        anchor: str | None,
        anchor_rating: float,
        virtual_ties: NonNegative,
        draws: Count,
        hardware: Hardware,
        pairs_per_shard: Count,
    ) -> None:
        self.contestants, self.model, self.judge, self.hardware = contestants, model, judge, hardware
        self.combinations = {name: list(parts) for name, parts in combinations.items()}
        parts = [part for each in self.combinations.values() for part in each]
        self.criteria = list(dict.fromkeys([*criteria, *parts]))
        self.against, self.length_control = against, length_control
        self.anchor, self.anchor_rating = anchor, anchor_rating
        self.virtual_ties, self.draws, self.pairs_per_shard = virtual_ties, draws, pairs_per_shard
        for role, name in (("against", against), ("anchor", anchor)):
            if name is not None and name not in contestants.names:
                raise ValueError(f"stage.{role}={name}, but the contestants are {contestants.names}")
        if not self.criteria:
            raise ValueError(
                "stage.criteria is empty; name what the judge decides by, e.g. stage.criteria=[helpfulness]"
            )
        if taken := sorted(self.combinations.keys() & set(self.criteria)):
            raise ValueError(f"stage.combinations.{taken[0]} has the name of a criterion; choose another")
        if few := [name for name, each in self.combinations.items() if len(set(each)) < 2]:
            raise ValueError(f"stage.combinations.{few[0]}={self.combinations[few[0]]}; it takes two criteria or more")
        if odd := [name for name in (*self.criteria, *self.combinations) if "/" in name]:
            raise ValueError(f"the criterion {odd[0]!r} has a /; metrics are named by it, so rename it")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Which contestants are compared, by place."""
        every = list(combinations(range(len(self.contestants.names)), 2))
        if self.against is None:
            return every
        fixed = self.contestants.names.index(self.against)
        return [(other, fixed) for other in range(len(self.contestants.names)) if other != fixed]

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        self.contestants.check(promised)
        self.judge.check(self.criteria, promised)
        check_path(self.model.policy, "model.policy", promised)

    def run(self, run: Run) -> Metrics:
        self.hardware.start()
        run.resume()  # there are no checkpoints: the shards are what it continues from
        matches = self.contestants.matches(run)
        tokenizer = load_tokenizer(self.model.policy, self.model.new_tokens)
        judge = self.judge.load(self.hardware, Template(tokenizer, self.contestants.dataset.template_style))
        asked = [(criterion, _comparisons(part, pair)) for criterion, pair, part in self._pieces(matches)]
        announce(judge, asked, run.console.say)
        rows = [row for file in self._judged(run, judge, matches) for row in read_table(file)]
        account(judge, run.console.say)
        run.make("data", lambda folder: write_table(rows, folder / VERDICTS))
        single = read_judgements(without_words(rows))
        every = [
            *single,
            *(each for name, parts in self.combinations.items() for each in combined(single, name, parts)),
        ]
        rates = win_rates(every, length_control=self.length_control)
        biases = order_bias(single)
        rated, notes = ratings(
            every,
            self.contestants.names,
            anchor=self.anchor or self.contestants.names[0],
            anchor_rating=self.anchor_rating,
            virtual_ties=self.virtual_ties,
            draws=self.draws,
            seed=derive(run.seed, "ratings"),
        )
        self._warn(run, single, notes)
        run.write_text("win_rates.csv", as_csv([each.row for each in rates]))
        run.write_text("ratings.csv", as_csv([each.row for each in rated]))
        metrics: Metrics = {}
        for each in (*rates, *rated, *biases):
            metrics |= each.metrics
        for each in rates:
            if each.share:
                run.console.say(
                    f"{each.split}, {each.criterion}: {each.first} against {each.second} {each.share.value:.1%} "
                    f"[{each.share.low:.1%}, {each.share.high:.1%}], {each.ties} ties of {each.judged}"
                )
        run.log(0, metrics)
        return metrics

    def _judged(self, run: Run, judge: Judge, matches: Sequence[Match]) -> Iterator[Any]:
        """The files of the verdicts, made shard by shard."""
        makers = [partial(self._shard, judge, *piece) for piece in self._pieces(matches)]
        yield from sharded(run, "verdicts", f"judging {len(self.pairs)} pairs of contestants", makers)

    def _pieces(self, matches: Sequence[Match]) -> list[tuple[str, tuple[int, int], Sequence[Match]]]:
        """What is judged together: a criterion, a pair of contestants, and some of their matches."""
        parts = [matches[part] for part in batches(len(matches), self.pairs_per_shard)]
        return [(criterion, pair, part) for criterion in self.criteria for pair in self.pairs for part in parts]

    def _shard(self, judge: Judge, criterion: str, pair: tuple[int, int], matches: Sequence[Match]) -> Shard:
        first, second = pair
        comparisons = _comparisons(matches, pair)
        rows = []
        verdicts = judge.compare(comparisons, criterion)
        for match, asked, verdict in zip(matches, comparisons, verdicts, strict=True):
            said = Judgement(
                split=match.key[0],
                condition=match.key[2],
                prompt_id=match.key[1],
                sample=match.key[3],
                criterion=criterion,
                first=self.contestants.names[first],
                second=self.contestants.names[second],
                wins=verdict.wins,
                by_order_first=verdict.by_order[0],
                by_order_second=verdict.by_order[1],
                mean=verdict.wins,
                longer=len(asked.responses[0]) - len(asked.responses[1]),
            )
            words = dict(zip(("reason_first", "reason_second"), verdict.reasons, strict=True))
            scores = dict(zip(("score_first", "score_second"), verdict.scores or (None, None), strict=True))
            rows.append({**said.row, **scores, **words})
        return Shard(rows, 0)

    def _warn(self, run: Run, judged: Sequence[Judgement], notes: Sequence[str]) -> None:
        for note in notes:
            run.warn(0, note)
        if unread := sum(each.wins is None for each in judged):
            run.warn(0, f"{unread} of {len(judged)} verdicts could not be read; they are excluded, see win_rates.csv")


def _comparisons(matches: Sequence[Match], pair: tuple[int, int]) -> list[Comparison]:
    """What a judge is asked of these matches, between the two contestants."""
    first, second = pair
    return [
        Comparison(prompt=match.prompt, responses=(match.answers[first].response, match.answers[second].response))
        for match in matches
    ]


def without_words(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of verdicts without the judge's reasons and scores."""
    for row in rows:
        yield {name: value for name, value in row.items() if not name.startswith(("reason_", "score_"))}


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal columns as the text of a csv file; no rows give no text."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
