"""Rows of other makes, one at a time: what becomes of them, what is left out, and what is refused."""

import pytest

from rlhf_lab.data.dialogues import Contexts, Talks, Transcripts
from rlhf_lab.data.instructions import GoldGenerations, Instructions
from rlhf_lab.data.shapes import Dropped, shaped
from rlhf_lab.data.summaries import Article, Post, Summaries

TRANSCRIPTS = Transcripts(chosen="chosen", rejected="rejected")
CONTEXTS = Contexts(context="context", chosen="chosen", rejected="rejected", roles={"human": "user"})
TALKS = Talks(messages=None, chosen="chosen", rejected="rejected", score_chosen="a", score_rejected="b")
ALPACA = Instructions(
    instruction="instruction", input="input", joined="\n", response="output", answers=None, preference=None,
    counts_from=1, condition=None, leave_out=["as an AI"],
)  # fmt: skip
PAIRS = Instructions(
    instruction="instruction", input=None, joined="\n", response=None, answers=["x[0]", "x[1]"], preference="p",
    counts_from=1, condition=None, leave_out=[],
)  # fmt: skip
POST = Post(subreddit="s", title="t", post="p")
SUMMARIES = Summaries(of=POST, summary=None, summaries=["x[0]", "x[1]"], preference="c", keep={"sub": "s"})


def test_rows_know_where_they_came_from_and_why_others_are_not_there():
    def numbers(row):
        if row["n"] < 0:
            raise Dropped("less than nothing")
        return [{"k": k} for k in range(row["n"])]

    rows = [{"n": 2}, {"n": -1}, {"n": 0}, {"n": -3}, {"n": 1}]
    made, origin, dropped = shaped(rows, numbers, "file (train)")
    assert made == [{"k": 0}, {"k": 1}, {"k": 0}]
    assert origin == [0, 0, 4]
    assert dropped == {"less than nothing": [1, 3]}


@pytest.mark.parametrize("ending", ["", " ", "\n", "s", "</s", ": x", "\n\nHuman", "\n\nHumanity: a word", "Human: x"])
def test_dialogues_keep_every_letter(ending):
    turns = ["cats", "other person", f"Paris{ending}"]
    shared = "".join(f"\n\n{role}: {turn}" for role, turn in zip(("Human", "Assistant", "Human"), turns, strict=True))
    [row] = TRANSCRIPTS({"chosen": f"{shared}\n\nAssistant: yes{ending}", "rejected": f"{shared}\n\nAssistant: no"})
    assert [message["content"] for message in row["prompt"]] == turns
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    assert (row["chosen"], row["rejected"], row["response"]) == (f"yes{ending}", "no", f"yes{ending}")


def test_dialogues_may_leave_a_turn_empty_without_a_space():
    shared = "\n\nHuman: a\n\nAssistant:\n\nHuman: b"
    [row] = TRANSCRIPTS({"chosen": f"{shared}\n\nAssistant: c", "rejected": f"{shared}\n\nAssistant:"})
    assert [message["content"] for message in row["prompt"]] == ["a", "", "b"]
    assert (row["chosen"], row["rejected"]) == ("c", "")


@pytest.mark.parametrize(
    ("shape", "row", "said"),
    [
        (TRANSCRIPTS, {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "an answer to nobody"),
        (CONTEXTS, {"context": [], "chosen": {"text": "a"}, "rejected": {"text": "b"}}, "an answer to nobody"),
        (TALKS, {"chosen": [], "rejected": [], "a": 1, "b": 2}, "does not end with the assistant's answer"),
        (
            TALKS,
            {
                side: [{"role": "user", "content": side}, {"role": "assistant", "content": "x"}]
                for side in ("chosen", "rejected")
            },
            "answers to different requests",
        ),
        (ALPACA, {"instruction": "feel", "input": "", "output": "AS AN AI, no"}, "the words 'as an AI'"),
        (PAIRS, {"instruction": "a", "x": ["1", "2"], "p": 0}, "no preference"),
        (PAIRS, {"instruction": "a", "x": ["1", "2"], "p": None}, "no preference"),
        (SUMMARIES, {"s": "x\nTITLE: y", "t": "t", "p": "p", "x": ["1", "2"], "c": 0}, "a heading of a post"),
        (SUMMARIES, {"s": "x", "t": "t", "p": None, "x": ["1", "2"], "c": 0}, "no post"),
    ],
)
def test_rows_that_are_left_out_say_why(shape, row, said):
    with pytest.raises(Dropped, match=said):
        shape(row)


@pytest.mark.parametrize(
    ("shape", "row", "said"),
    [
        (TRANSCRIPTS, {"chosen": "\n\nHuman: a"}, r"'rejected' leads nowhere"),
        (TRANSCRIPTS, {"chosen": 3, "rejected": "x"}, r"chosen is '3'; expected a text"),
        (CONTEXTS, {"context": [{"role": "bot", "text": "x"}]}, r"a turn has the role 'bot'"),
        (CONTEXTS, {"context": "hello"}, r"context is 'hello'; expected a list"),
        (CONTEXTS, {"context": ["hello"]}, r"context has the turn 'hello'; expected its role and its text"),
        (TALKS, {"chosen": [{"role": "user"}], "rejected": []}, r"'content' leads nowhere"),
        (PAIRS, {"instruction": "a", "x": ["1", "2"], "p": 3}, r"p is 3; expected 1 or 2"),
        (PAIRS, {"instruction": "a", "x": ["1", "2"], "p": True}, r"p is True; expected 1 or 2"),
        (PAIRS, {"instruction": "a", "x": ["1"], "p": 1}, r"'x\[1\]' leads nowhere"),
        (SUMMARIES, {"s": "s", "t": "t", "p": "p", "x": ["1", "2"], "c": 2}, r"c is 2; expected 0 or 1"),
    ],
)
def test_rows_that_are_not_as_expected_are_refused_by_name(shape, row, said):
    with pytest.raises(ValueError, match=said):
        shape(row)
    with pytest.raises(ValueError, match=rf"file \(train\), row 0: .*{said}"):
        shaped([row], shape, "file (train)")


def test_scores_that_are_no_numbers_are_refused():
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    row = {"chosen": talk, "rejected": talk, "a": 1, "b": "2"}
    with pytest.raises(ValueError, match="b is '2'; expected a number"):
        TALKS(row)
    assert TALKS(row | {"b": 2})[0]["margin"] == -1.0


def test_generations_without_a_score_for_each_are_refused():
    shape = GoldGenerations(instruction="i", input=None, joined="", answers="a", scores="s", most=None)
    with pytest.raises(ValueError, match="a has 2 responses, s 1 scores"):
        shape({"i": "q", "a": ["x", "y"], "s": [1.0]})


def test_a_shape_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="needs messages, or chosen and rejected"):
        Talks(messages=None, chosen="x", rejected=None, score_chosen=None, score_rejected=None)
    with pytest.raises(ValueError, match="a score of one side"):
        Talks(messages=None, chosen="x", rejected="y", score_chosen="s", score_rejected=None)
    with pytest.raises(ValueError, match="name two summaries"):
        Summaries(of=POST, summary=None, summaries=["a"], preference="c", keep={})
    with pytest.raises(ValueError, match="name two columns of answers"):
        Instructions(
            instruction="i", input=None, joined="", response=None, answers=["a", "b"], preference=None,
            counts_from=0, condition=None, leave_out=[],
        )  # fmt: skip


def test_posts_are_read_back_whatever_they_hold():
    for post in ("x", "a\nTL;DR: b", "a\nPOST: b", "a\nTITLE: b\n", "\nTL;DR:", "other person"):
        assert Post.parse(Post.write("tifu", "a title", post)) == ("tifu", "a title", post)
    [row] = SUMMARIES({"s": "x", "t": "t", "p": "a  b c", "x": ["1", "2"], "c": 1})
    assert (row["words"], row["characters"]) == (4, 6)
    assert (row["sub"], row["better"], row["response"]) == ("x", 1, "2")
    assert Article(article="a")({"a": "x"}) == ("x", "ARTICLE: x\nTL;DR:")
    with pytest.raises(ValueError, match="is no post of Reddit"):
        Post.parse("ARTICLE: x\nTL;DR:")
