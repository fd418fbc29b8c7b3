"""What a person sees while a run runs."""

import pytest

from rlhf_lab.console import Console, headline


def test_text_of_models_and_data_is_shown_as_it_is(capsys):
    console = Console()
    console.say("[bold]not markup[/] [/closing] of a :smile:")
    console.warn("[red]x[/]")
    said = capsys.readouterr().out
    assert "[bold]not markup[/] [/closing]" in said
    assert "WARNING [red]x[/]" in said


def test_samples_show_text_and_rounded_numbers(capsys):
    Console().samples("title", [{"prompt": "[a] b", "helpful": 0.12345}])
    said = capsys.readouterr().out
    assert "[a] b" in said
    assert "0.12" in said
    assert "0.123" not in said
    Console().samples("nothing", [])
    assert capsys.readouterr().out == ""


def test_steps_counts_all_and_says_the_last_with_its_values(capsys):
    latest: dict[str, float] = {}
    done = []
    for step in Console().steps("step", 3, 6, latest):
        done.append(step)
        latest["objective/kl"] = step / 8
    assert done == [3, 4, 5]
    [line] = capsys.readouterr().out.splitlines()
    assert "step 6/6" in line
    assert "kl 0.625" in line


def test_steps_says_how_long_it_will_still_take(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 30.0, 40.0])
    monkeypatch.setattr("rlhf_lab.console.time.monotonic", lambda: next(clock))
    for _ in Console().steps("step", 0, 4, {}):
        pass
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "step 1/4 · 10.0s each" in first
    assert first.endswith("30s left")
    assert last.endswith("40s")


def test_summary_and_headline(capsys):
    Console().summary({"output": "a/b", "metrics": "c"})
    assert "a/b" in capsys.readouterr().out
    assert headline({"objective/kl": 0.5, "gold/helpfulness/mean": 2.0, "x": 1.0}) == "gold 2, kl 0.5"


@pytest.mark.parametrize("total", [0, 2])
def test_a_run_that_is_done_already_has_no_steps(total, capsys):
    assert list(Console().steps("step", 2, total, {})) == []
    assert capsys.readouterr().out == ""
