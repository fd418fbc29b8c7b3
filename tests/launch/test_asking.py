"""What is asked of a sweep on the command line, and what is refused."""

from pathlib import Path

import pytest

from rlhf_lab.launch.asking import asked


@pytest.mark.parametrize("words", [[], ["algorithm=ppo", "seed=1"], ["algoritm=ppo"], ["name=status"], ["seed=1"]])
def test_a_run_is_not_a_verb(words):
    assert asked(words) is None


def test_a_verb_its_sweep_and_its_options():
    wish = asked(["status=sweeps/one/", "watch=10", "runs_dir=elsewhere"])
    assert wish is not None
    assert (wish.verb, wish.name, dict(wish.options)) == ("status", "sweeps/one", {"watch": "10"})
    assert (wish.runs_dir, wish.sweeps_dir) == (Path("elsewhere"), Path("sweeps"))
    wish = asked(["executor.at_once=3", "retry=one"])
    assert wish is not None
    assert dict(wish.options) == {"executor.at_once": "3"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["statsu=one"], "did you mean status=<sweep>"),
        (["retry=one", "cancel=one"], "one at a time"),
        (["status=one", "wacth=1"], "no option wacth; did you mean 'watch'"),
        (["cancel=one", "executor.at_once=3"], "no option executor.at_once"),
        (["retry=one", "algorithm.kl_coef=1"], "no option algorithm.kl_coef"),
        (["cancel="], "needs the name"),
    ],
)
def test_what_makes_no_sense_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        asked(words)


def test_a_sweep_that_is_not_there_is_refused_with_the_closest(tmp_path):
    (tmp_path / "algorithm-seed-1a").mkdir()
    (tmp_path / "algorithm-seed-1a/sweep.json").write_text("{}")
    wish = asked(["status=algoritm-seed-1a", f"sweeps_dir={tmp_path}", f"runs_dir={tmp_path}"])
    assert wish is not None
    with pytest.raises(ValueError, match="did you mean 'algorithm-seed-1a'"):
        wish.sweep()
