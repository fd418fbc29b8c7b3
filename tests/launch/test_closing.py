"""When the page of a sweep is drawn, and by whom."""

import json
import os
from pathlib import Path

import pytest

from rlhf_lab.launch.closing import close
from rlhf_lab.launch.compose import Plan
from rlhf_lab.launch.sweep import SUBMISSION, Sweep, freeze


def swept(root: Path, count: int = 2) -> Sweep:
    plans = [
        Plan(
            directory=root / f"s{seed}",
            config={"name": f"s{seed}", "seed": seed},
            overrides=(f"seed={seed}",),
            num_processes=1,
        )
        for seed in range(count)
    ]
    git = {"sha": "", "dirty": False, "diff": ""}
    return freeze(root, plans, command="python launch.py -m seed=0,1", git=git, executor={"kind": "here"})


def end(sweep: Sweep, run: int, state: str) -> None:
    (sweep.runs[run].directory / "status.json").write_text(json.dumps({"state": state, "seconds": 1.0}))


def test_who_ends_last_draws_the_page_once(tmp_path: Path):
    sweep = swept(tmp_path / "sweep")
    assert close(sweep.root) is None
    end(sweep, 0, "finished")
    assert close(sweep.root) is None
    end(sweep, 1, "failed")
    page = close(sweep.root)
    assert page is not None
    assert page == sweep.root / "report.html"
    assert page.stat().st_size > 1000
    assert close(sweep.root) is None


def test_a_run_that_is_done_again_has_the_page_drawn_again(tmp_path: Path):
    sweep = swept(tmp_path / "sweep")
    for run in (0, 1):
        end(sweep, run, "failed")
    page = close(sweep.root)
    assert page is not None
    os.utime(page, (0, 0))  # long before what follows
    end(sweep, 1, "running")
    assert close(sweep.root) is None
    end(sweep, 1, "finished")
    assert close(sweep.root) == page


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_run_that_goes_on_some_day_keeps_a_sweep_open(state: str, tmp_path: Path):
    sweep = swept(tmp_path / "sweep")
    end(sweep, 0, "finished")
    end(sweep, 1, state)
    assert close(sweep.root) is None


def test_a_run_that_was_submitted_alone_has_its_own_page_only(tmp_path: Path):
    sweep = swept(tmp_path / "alone" / SUBMISSION, count=1)
    end(sweep, 0, "finished")
    assert close(sweep.root) is None
    assert not (sweep.root / "report.html").exists()


def test_a_page_that_cannot_be_drawn_is_said_and_fails_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sweep = swept(tmp_path / "sweep")
    for run in (0, 1):
        end(sweep, run, "finished")
    (sweep.root / "metrics.csv").mkdir()  # in the way of a file of that name
    assert close(sweep.root) is None
    assert "could not be drawn" in capsys.readouterr().out
