"""The ledger on disk: replies outlive their process, half lines are healed, two processes do not ask the same."""

import subprocess
import sys

import pytest

from rlhf_lab.judges.reply_ledger import Reply, ReplyLedger, SpendCap, digest


def reply(text="yes", dollars=1.0):
    return Reply(text=text, finish="stop", prompt_tokens=1, reply_tokens=1, dollars=dollars, model="m")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "m.jsonl"


def opened(path, cap=None):
    return ReplyLedger(path, {"model": "m"}, cap)


def test_what_was_answered_is_there_for_whoever_opens_it_next(path):
    ledger = opened(path)
    with ledger.held():
        for key in ("one", "two"):
            ledger.asked(key, 5.0)
            ledger.answered(key, reply(f"{key} λ\n{{}}"))
    again = opened(path)
    assert again["two"] == ledger["two"] == reply("two λ\n{}")
    assert ("one" in again, "three" in again, len(again)) == (True, False, 2)


def test_a_half_line_is_not_read_and_is_cut_off_by_the_next_who_writes(path):
    ledger = opened(path)
    with ledger.held():
        ledger.asked("one", 1.0)
        ledger.answered("one", reply())
    whole = path.read_bytes()
    for cut in (1, 20, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[:-cut])
        healed = opened(path)
        assert "one" not in healed
        with healed.held():
            healed.asked("one", 1.0)
            healed.answered("one", reply("again"))
        assert opened(path)["one"].text == "again"


def test_a_damaged_line_is_refused_with_its_place(path):
    with opened(path).held():
        pass
    start = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"key": "x", "dol\n')
    with pytest.raises(ValueError, match=rf"the line at byte {start}: .*Restore the file, or delete the line"):
        opened(path)


def test_spending_counts_replies_and_the_highest_price_of_what_may_have_been_paid(path):
    ledger = opened(path, cap=10.0)
    with ledger.held():
        ledger.asked("answered", 5.0)
        assert ledger.spent == 5.0
        ledger.answered("answered", reply(dollars=1.0))
        assert ledger.spent == 1.0
        ledger.asked("refused", 5.0)
        ledger.lost("refused", "HTTP 429", was_paid=False)
        assert ledger.spent == 1.0
        ledger.asked("cut", 3.0)
        ledger.lost("cut", "timeout", was_paid=True)
        assert ledger.spent == 4.0
        ledger.asked("in flight", 5.0)
        with pytest.raises(SpendCap, match=r"spend_cap=10 dollars, of which 9\.0000"):
            ledger.asked("too much", 2.0)
    again = opened(path)
    assert (again.spent, again.in_flight) == (9.0, {"in flight"})
    with again.held():
        again.asked("in flight", 5.0)
        again.answered("in flight", reply(dollars=2.0))
    assert (opened(path).spent, opened(path).in_flight) == (11.0, frozenset())  # the first may have been paid too


def test_two_processes_side_by_side_find_what_the_other_asked(path):
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from rlhf_lab.judges.reply_ledger import Reply, ReplyLedger\n"
        "ledger = ReplyLedger(Path(sys.argv[1]), {}, None)\n"
        "print('opened', flush=True)\n"
        "sys.stdin.readline()\n"
        "with ledger.held():\n"
        "    print('one' in ledger, flush=True)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "opened\n"
    ledger = opened(path)
    with ledger.held():
        other.stdin.write("go\n")
        other.stdin.flush()
        ledger.asked("one", 1.0)
        ledger.answered("one", reply())
    assert other.stdout.readline() == "True\n"
    assert other.wait(10) == 0


def test_keys_depend_on_every_part_and_on_nothing_else():
    assert digest({"a": 1, "b": [2.0, "x"]}, 0) == digest({"b": [2.0, "x"], "a": 1}, 0)
    assert len({digest({"a": 1}, 0), digest({"a": 1}, 1), digest({"a": 1.5}, 0), digest({"b": 1}, 0)}) == 4
