"""Splits by a hash of the prompt: apart, stable, in their shares; and what two splits share is found."""

from collections import Counter

import pytest

from rlhf_lab.data import splits
from rlhf_lab.data.splits import Table, check_shares, divide, hold_out, overlap


def test_hold_out_keeps_prompts_apart_and_does_not_depend_on_order_or_company():
    rows = [{"prompt": f"p{i % 400}", "n": i} for i in range(1200)]

    def held(rows, share):
        kept, held = hold_out(rows, "prompt", share)
        assert sorted(kept + held) == list(range(len(rows)))
        ours, theirs = {rows[i]["prompt"] for i in kept}, {rows[i]["prompt"] for i in held}
        assert not ours & theirs
        return theirs

    theirs = held(rows, 0.2)
    assert 0.14 < len(theirs) / 400 < 0.26  # five standard deviations of a binomial either side would be 0.1
    assert held(rows[::-1][:600], 0.2) <= theirs
    assert set() != held(rows, 0.1) <= theirs


def test_hold_out_of_a_few_rows_is_neither_nothing_nor_all():
    kept, held = hold_out([{"prompt": f"p{i}"} for i in range(3)], "prompt", 0.001)
    assert (len(kept), len(held)) == (2, 1)
    assert hold_out([{"prompt": "only"}] * 3, "prompt", 0.5) == ([0, 1, 2], [])


SHARES = {"train": 0.7, "candidate": 0.1, "safety": 0.1, "held_out": 0.1}


def test_prompts_are_divided_in_their_shares_whatever_stands_beside_them():
    keys = [f"prompt {i % 4000}" for i in range(12000)]
    found = divide(keys, SHARES)
    assert sorted(i for rows in found.values() for i in rows) == list(range(12000))
    whose = {split: {keys[i] for i in rows} for split, rows in found.items()}
    assert sum(map(len, whose.values())) == 4000  # no prompt in two
    for split, share in SHARES.items():
        deviation = (share * (1 - share) / 4000) ** 0.5
        assert abs(len(whose[split]) / 4000 - share) < 5 * deviation
    few = keys[5000:5200][::-1]
    for split, rows in divide(few, SHARES).items():
        assert {few[i] for i in rows} <= whose[split]


def test_shares_that_fall_short_of_one_by_rounding_leave_no_prompt_behind_their_last_border(monkeypatch):
    monkeypatch.setattr(splits, "_place", lambda text: 1 - 2**-32)  # the last place that a hash may have
    assert divide(["some prompt"], {"a": 0.5, "b": 0.5 - 9e-10}) == {"a": [], "b": [0]}


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"train": 0.7, "test": 0.2}, "add up to 0.9"),
        ({"candidate": 0.5, "test": 0.5}, "no share for the training split 'train'"),
        ({"train": 1.0, "test": 0.0}, "that of 'test' is not between 0 and 1"),
    ],
)
def test_shares_that_are_none_are_refused(shares, said):
    with pytest.raises(ValueError, match=said):
        check_shares(shares, "train")
    check_shares(SHARES, "train")


def test_what_two_splits_share_is_counted_in_prompts_and_in_rows_with_an_example():
    ours = [("a",), ("b", "c"), ("d",), ("c",), ()]
    theirs = [("x",), ("c",), ("d", "y"), ()]
    found = overlap(ours, theirs)
    assert found is not None
    assert (found.prompts, found.rows, found.example) == (2, [1, 2, 3], (1, 1))
    assert overlap(ours, [("x",), ()]) is None


def test_a_row_is_named_by_its_place_in_its_file_through_every_choice():
    table = Table.of("d (train)", [("a.jsonl", [{"n": 0}, {"n": 1}]), ("b.jsonl", [{"n": 2}, {"n": 3}, {"n": 4}])])
    assert table.where(1) == "d (train), row 1 of a.jsonl"
    chosen = table.take([4, 2], "not chosen").take([0], "not chosen")
    assert [row["n"] for row in chosen.rows] == [4]
    assert chosen.where(0) == "d (train), row 2 of b.jsonl"
    assert (chosen.total, Counter(chosen.lost)) == (5, Counter({"not chosen": 4}))
    alone = Table.of("d (train)", [("a.jsonl", [{"n": 0}])])
    assert alone.where(0) == "d (train), row 0"
    assert table.take([0, 1]).total == 2  # the rest is of another split, and not lost
