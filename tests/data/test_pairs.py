"""Pairs of responses: which are made of n samples, and which say nothing and are counted."""

from collections import Counter
from typing import Any

import pytest

from rlhf_lab.data.pairs import Pairing, couples, paired, said

HEAD = {"id": "p", "prompt": "how ?", "preference": "P1A", "told": "Be brief."}


def samples(*texts: str) -> list[dict[str, Any]]:
    return [{"response": text, "tokens": i} for i, text in enumerate(texts)]


def texts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["response_0"], row["response_1"]) for row in rows]


@pytest.mark.parametrize(
    ("pairing", "expected"), [("all", ["ab", "ac", "ad", "bc", "bd", "cd"]), ("once", ["ab", "cd"])]
)
def test_samples_are_paired_with_each_other_or_with_their_neighbour(pairing: Pairing, expected: list[str]):
    rows, left_out = couples(HEAD, samples(*"abcd"), pairing)
    assert texts(rows) == [(pair[0], pair[1]) for pair in expected]
    assert not left_out.total()
    assert rows[0] == {**HEAD, "response_0": "a", "response_1": "b", "tokens_0": 0, "tokens_1": 1}


def test_every_pair_is_a_row_or_counted():
    rows, left_out = couples(HEAD, samples("a", "b", "a", " "), "all")
    assert texts(rows) == [("a", "b")]
    assert left_out == {"unpaired": 0, "empty": 3, "equal": 1, "repeated": 1}
    rows, left_out = couples(HEAD, samples("a", "b", "b", "a", "c"), "once")
    assert texts(rows) == [("a", "b")]
    assert left_out == {"unpaired": 1, "empty": 0, "equal": 0, "repeated": 1}


def test_prompts_are_told_apart_by_their_preference_too():
    told = [{**HEAD, "preference": name, "response": text} for name in ("P1A", "P1B") for text in "ab"]
    rows, left_out = paired([*told, {**HEAD, "id": "q", "response": "c"}, {**HEAD, "id": "q", "response": "c"}], "all")
    assert [(row["id"], row["preference"]) for row in rows] == [("p", "P1A"), ("p", "P1B")]
    assert left_out["equal"] == 1
    assert said(left_out) == "left out 1 equal"
    assert said(Counter()) == "none left out"


def test_responses_under_different_words_are_no_pair_though_neither_is_a_preference():
    told = [
        {**HEAD, "preference": "", "told": words, "response": text} for words in ("<a=1>", "<a=2>") for text in "xy"
    ]
    rows, _ = paired(told, "all")
    assert [row["told"] for row in rows] == ["<a=1>", "<a=2>"]
