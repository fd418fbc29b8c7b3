"""What a judge said of pairs, and what a reward model may learn from it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from rlhf_lab.data.noise import LabelNoise
from rlhf_lab.data.tables import Rows, prompt_of
from rlhf_lab.records import Comparison, Verdict
from rlhf_lab.seeds import derive

Ties = Literal["drop", "coin", "keep"]
MarginBy = Literal["wins", "scores"]
CARRIED = ("gold_", "finished_", "tokens_")  # columns of a pair that stay beside its verdict


def comparison(pair: Mapping[str, Any]) -> Comparison:
    """A pair as a judge sees it: the request alone, without what a policy was told beside it."""
    return Comparison(prompt=prompt_of(pair["prompt"]), responses=(pair["response_0"], pair["response_1"]))


def verdict_row(pair: Mapping[str, Any], criterion: str, verdict: Verdict) -> dict[str, Any]:
    """A row of a verdict table; null where an order was not asked or the reply could not be read."""
    scores = verdict.scores or (None, None)
    return {
        "id": pair["id"],
        "prompt": pair["prompt"],
        "preference": criterion,
        "sampled_under": pair.get("preference") or "",
        "response_0": pair["response_0"],
        "response_1": pair["response_1"],
        **{name: value for name, value in pair.items() if name.startswith(CARRIED)},
        "asked": verdict.asked,
        "wins_shown_first": verdict.by_order[0],
        "wins_shown_second": verdict.by_order[1],
        "wins": verdict.wins,
        "score_0": scores[0],
        "score_1": scores[1],
        "reason_shown_first": verdict.reasons[0],
        "reason_shown_second": verdict.reasons[1],
    }


def preference_rows(
    verdicts: Rows, *, ties: Ties, margin_by: MarginBy, told: Mapping[str, str] | None, held_out: bool, seed: int
) -> tuple[Rows, Counter[str]]:
    """Pairs with `better` and `margin`, and how many verdicts gave none, by reason.

    Args:
        verdicts: rows of a verdict table. A verdict of which an order could not be read gives no pair.
        ties: a verdict that the two orders settle at one half, each by a tie or one against the other, is left out
            ("drop"), decided by a "coin" that is the pair's own, or "keep"s both answers, as two rows of margin 0: to a
            Bradley-Terry loss a label of one half. No answer to such a held-out pair is right, so it is left out.
        margin_by: |wins - 1/2| * 2, which is 1 if all that was asked agrees; or by how much the winner's score is
            higher, which may be below 0 for a judge whose verdicts and scores disagree.
        told: preference -> what a reward model reads of it, the column `condition`; null for a model of one preference.

    Raises:
        ValueError: margins are to come from scores, and there are none.
    """
    rows: Rows = []
    left_out: Counter[str] = Counter(unreadable=0, tied=0)
    for verdict in verdicts:
        wins = verdict["wins"]
        if wins is None:
            left_out["unreadable"] += 1
            continue
        is_tie = wins == 0.5
        if is_tie and (ties == "drop" or (ties == "keep" and held_out)):
            left_out["tied"] += 1
            continue
        better = int(wins < 0.5)
        if is_tie and ties == "coin":
            better = _coin(verdict, seed)
        for answer in (0, 1) if is_tie and ties == "keep" else (better,):
            rows.append(
                {
                    **{name: verdict[name] for name in ("id", "prompt", "preference", "response_0", "response_1")},
                    **({} if told is None else {"condition": told[verdict["preference"]]}),
                    "better": answer,
                    "clean_better": answer,
                    "margin": 0.0 if is_tie else _margin(verdict, better, margin_by),
                    "wins": wins,
                    **{name: value for name, value in verdict.items() if name.startswith(CARRIED)},
                }
            )
    return rows, left_out


def _coin(verdict: Mapping[str, Any], seed: int) -> int:
    """Of two texts the same one wins, whichever of them is called the first."""
    texts = verdict["response_0"], verdict["response_1"]
    return derive(seed, "tie", verdict["preference"], verdict["id"], *sorted(texts)) % 2 ^ int(texts[0] > texts[1])


def _margin(verdict: Mapping[str, Any], better: int, by: MarginBy) -> float:
    if by == "wins":
        return abs(verdict["wins"] - 0.5) * 2
    scores = verdict["score_0"], verdict["score_1"]
    if None in scores:
        raise ValueError(
            f"stage.margin_by=scores, but the judge gave no scores by {verdict['preference']}; choose "
            "stage.margin_by=wins, or a judge that scores"
        )
    return scores[better] - scores[1 - better]


def noisy(rows: Rows, noise: LabelNoise) -> Rows:
    """The rows with `better` turned round in some of those that no tie decided."""
    decided = [i for i, row in enumerate(rows) if row["wins"] != 0.5]
    identities = [
        "\x1f".join((rows[i]["id"], rows[i]["preference"], *sorted((rows[i]["response_0"], rows[i]["response_1"]))))
        for i in decided
    ]
    turned = {decided[place] for place in noise.flipped([each.encode("utf-8", "surrogatepass") for each in identities])}
    return [row | {"better": 1 - row["better"]} if i in turned else row for i, row in enumerate(rows)]
