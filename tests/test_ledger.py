"""A prompt serves for one test: what is entered, found again, refused, and what repeated tests may spend."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf_lab.ledger import Entry, Ledger, SpentPrompts, spent_on


def enter(
    path: Path,
    who: str,
    prompts: str = "abc",
    spending: bool = False,
    delta: float = 0.1,
    check: Callable[[float], None] = lambda spent: None,
) -> Entry:
    """Enter the test of a run on prompts that are called by one letter each."""
    return Ledger(path / "ledger.jsonl").enter(
        run=path / who,
        identity=f"identity of {who}",
        prompts=list(prompts),
        prompt_set=prompts,
        cost_model="c0ffee",
        policy=None,
        limit=0.5,
        delta=delta,
        spending=spending,
        check=check,
    )


def test_the_first_test_spends_all_and_is_written_down(tmp_path: Path):
    entry = enter(tmp_path / "runs", "first")
    assert (entry.test, entry.delta, entry.alpha_spent) == (1, 0.1, 0.1)
    (line,) = (tmp_path / "runs/ledger.jsonl").read_text().splitlines()
    assert json.loads(line)["prompts"] == ["a", "b", "c"]
    assert Ledger(tmp_path / "runs/ledger.jsonl").read() == [entry]


@pytest.mark.parametrize(("again", "shared"), [("abc", 3), ("cde", 1), ("a", 1)])
def test_a_second_test_on_any_of_the_prompts_is_refused(again: str, shared: int, tmp_path: Path):
    enter(tmp_path, "first")
    with pytest.raises(SpentPrompts, match=f"{shared} of these {len(again)} prompts .*last by .*/first; .*alpha_spend"):
        enter(tmp_path, "second", again)
    assert len(Ledger(tmp_path / "ledger.jsonl").read()) == 1


def test_fresh_prompts_and_the_same_test_again_are_no_second_use(tmp_path: Path):
    first = enter(tmp_path, "first")
    assert enter(tmp_path, "other", "xyz").test == 1
    assert enter(tmp_path, "first") == first
    assert len(Ledger(tmp_path / "ledger.jsonl").read()) == 2


def test_tests_under_spending_cost_less_each_time_and_never_more_than_delta_together(tmp_path: Path):
    entries = [enter(tmp_path, f"run {k}", spending=True) for k in range(5)]
    assert [entry.test for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[0].delta == pytest.approx(0.1 * 0.6079271)
    assert entries[2].delta == pytest.approx(entries[0].delta / 9)
    assert entries[-1].alpha_spent == pytest.approx(sum(entry.delta for entry in entries))
    assert sum(spent_on(k, 0.1) for k in range(1, 10_000)) == pytest.approx(0.1, rel=1e-4)
    assert sum(spent_on(k, 0.1) for k in range(1, 10_000)) < 0.1


def test_spending_that_begins_late_is_refused_for_delta_is_spent(tmp_path: Path):
    enter(tmp_path, "first")
    said = r"last by .*/first; these tests spent 0.1, and 0.0152 asked for test 2 .* bound.delta=0.1. Take fresh"
    with pytest.raises(SpentPrompts, match=said):
        enter(tmp_path, "second", spending=True)
    assert len(Ledger(tmp_path / "ledger.jsonl").read()) == 1


def test_a_test_on_prompts_of_several_tests_pays_for_all_of_them(tmp_path: Path):
    for who, prompts in (("one", "ab"), ("two", "cd")):
        assert enter(tmp_path, who, prompts, spending=True).test == 1  # 0.0608 each
    with pytest.raises(SpentPrompts, match=r"2 of these 3 prompts .* spent 0.1216, and 0.006755 asked for test 3"):
        enter(tmp_path, "union", "bcx", spending=True)
    assert enter(tmp_path, "fresh", "xyz", spending=True).test == 1


def test_parts_of_a_large_test_share_what_it_left(tmp_path: Path):
    entries = [enter(tmp_path, prompts, prompts, spending=True) for prompts in ("abcdefgh", *"abcdefgh")]
    assert [entry.test for entry in entries] == list(range(1, 10))
    assert entries[-1].alpha_spent == pytest.approx(sum(entry.delta for entry in entries))
    assert entries[-1].alpha_spent < 0.1


def test_what_the_caller_refuses_is_not_entered(tmp_path: Path):
    asked = []

    def refuse(spent: float) -> None:
        asked.append(spent)
        raise ValueError("too few")

    enter(tmp_path, "first", spending=True)
    with pytest.raises(ValueError, match="too few"):
        enter(tmp_path, "second", spending=True, check=refuse)
    assert asked == [pytest.approx(0.0151982, abs=1e-7)]  # a quarter of the first share
    assert len(Ledger(tmp_path / "ledger.jsonl").read()) == 1
    enter(tmp_path, "first", spending=True, check=refuse)  # resumed: it was allowed already


def test_tests_at_one_time_are_counted_one_after_the_other(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(lambda k: enter(tmp_path, f"run {k}", spending=True), range(24)))
    assert sorted(entry.test for entry in entries) == list(range(1, 25))
    assert len(Ledger(tmp_path / "ledger.jsonl").read()) == 24
