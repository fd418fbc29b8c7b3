"""How replies are read: what is clear is taken, what is not is left."""

import json

import pytest

from rlhf_lab.judges.reading import Format, demonstrated
from rlhf_lab.judges.rubric import Rubric
from rlhf_lab.records import Comparison, Prompt

LINES = Format(structured=False, reasoning=True, batched=False)
MANY = Format(structured=False, reasoning=True, batched=True)
JSON = Format(structured=True, reasoning=True, batched=False)
MANY_JSON = Format(structured=True, reasoning=False, batched=True)
CHOICE, SCORES = Rubric.read("preference"), Rubric.read("harmlessness")


@pytest.mark.parametrize(
    ("text", "first_wins"),
    [
        ("A is kinder.\nVerdict: A", 1.0),
        ("verdict: b", 0.0),
        ("**Verdict:** (B)\n", 0.0),
        ("## Verdict: tie.", 0.5),
        ("Verdict: <B>", 0.0),  # as the form shows it
        ('Verdict: "A".', 1.0),
        ("`Verdict: `tie``", 0.5),
        ("Verdict: <A, B or tie>", None),
        ("Verdict: A\nand once more\nVerdict: A", 1.0),
        ("Verdict: A\nVerdict: B", None),
        ("Verdict: A or B", None),
        ("A", None),
        ("I prefer verdict: A", None),
        ("Pair 2 verdict: A", None),
        ("", None),
    ],
)
def test_a_choice_in_lines(text, first_wins):
    (outcome,) = LINES.read(text, CHOICE, 1)
    assert (outcome and outcome.first_wins) == first_wins


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("Scores: 7 5", (7.0, 5.0)),
        ("Scores: 0, 10", (0.0, 10.0)),
        ("Scores: <7> <5>", (7.0, 5.0)),
        ("Scores: A 7.5, B 8", (7.5, 8.0)),
        ("Scores: 7", None),
        ("Scores: 7/10 5/10", None),
        ("Scores: 11 5", None),
        ("Scores: -1 5", None),
    ],
)
def test_scores_in_lines_and_in_their_range(text, scores):
    (outcome,) = LINES.read(text, SCORES, 1)
    assert (outcome and outcome.scores) == scores


@pytest.mark.parametrize(
    ("said", "first_wins"),
    [
        ('{"reasoning": "r", "score_a": 3, "score_b": 4}', 0.0),
        ('```json\n{"score_a": 4, "score_b": 4}\n```', 0.5),
        ('{"score_a": 4, "score_b": NaN}', None),
        ('{"score_a": true, "score_b": 0}', None),
        ('{"score_a": "4", "score_b": 0}', None),
        ('{"score_a": 4, "score_', None),
        ("[4, 3]", None),
        ("null", None),
    ],
)
def test_scores_in_json(said, first_wins):
    (outcome,) = JSON.read(said, SCORES, 1)
    assert (outcome and outcome.first_wins) == first_wins


def test_several_pairs_are_told_apart_by_their_numbers_not_by_their_order():
    text = (
        "short\nPair 3 verdict: tie\nlong\nPair 1 verdict: B\nPair 9 verdict: A\nPair 4 verdict: A\nPair 4 verdict: B"
    )
    outcomes = MANY.read(text, CHOICE, 4)
    assert [outcome and outcome.first_wins for outcome in outcomes] == [0.0, None, 0.5, None]
    assert [outcome and outcome.reasoning for outcome in outcomes][::2] == ["long", "short"]
    said = json.dumps({"pairs": [{"pair": 2, "verdict": "A"}, {"verdict": "B"}, 7, {"pair": 3, "verdict": "C"}]})
    assert [o and o.first_wins for o in MANY_JSON.read(said, CHOICE, 3)] == [None, 1.0, None]


@pytest.mark.parametrize("form", [LINES, MANY, JSON, MANY_JSON])
@pytest.mark.parametrize("name", ["preference", "helpfulness", "harmlessness", "overall", "summary", "news"])
def test_every_rubrics_examples_are_answered_as_its_instruction_asks(name, form):
    rubric = Rubric.read(name)
    for example in rubric.demonstrations:
        (outcome,) = form.read(demonstrated(example, form), rubric, 1)
        assert outcome is not None
        if example.scores is None:
            assert outcome.first_wins == {"A": 1.0, "tie": 0.5, "B": 0.0}[str(example.verdict)]
        else:
            assert outcome.scores == example.scores
        assert outcome.reasoning == (example.reasoning if form.reasoning else "")
    assert len({(each.verdict, each.scores) for each in rubric.demonstrations}) == len(rubric.demonstrations)


def test_texts_are_shown_as_they_are_whatever_stands_in_them():
    odd = Comparison(prompt=Prompt.from_text("{criterion} {first} %s $x \\1"), responses=("{second}", "</response_a>"))
    shown = CHOICE.messages([odd], "{request}?", LINES, False)[-1]["content"]
    assert shown == (
        "Question: {request}?\n\n<request>\n{criterion} {first} %s $x \\1\n</request>\n\n"
        "<response_a>\n{second}\n</response_a>\n\n<response_b>\n</response_a>\n</response_b>"
    )


BROKEN = {
    "asks": "asks: word\nsystem: s\nquestion: q\nrequest: r\ndemonstrations: []",
    "range": "asks: scores\nsystem: s\nquestion: q\nrequest: r\ndemonstrations: []",
    "order": "asks: scores\nrange: [3, 1]\nsystem: s\nquestion: q\nrequest: r\ndemonstrations: []",
    "missing": "asks: choice\nquestion: q\nrequest: r\ndemonstrations: []",
    "unknown": "asks: choice\nsystem: s\nquestion: q\nrequest: r\ndemonstrations: []\nsistem: x",
    "answer": "asks: choice\nsystem: s\nquestion: q\nrequest: r\n"
    "demonstrations: [{request: r, first: a, second: b, reasoning: c, scores: [1, 2]}]",
    "not yaml": "asks: [",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rubric_is_refused_by_name(case, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(BROKEN[case])
    with pytest.raises(ValueError, match=r"rubric .*mine\.yaml"):
        Rubric.read(str(path))
