"""A stage that learns how a judge errs: from a verdict table to a simulated judge that errs alike."""

import numpy as np
import pytest

from rlhf_lab.console import Console
from rlhf_lab.data import tiny_help
from rlhf_lab.data.tables import write_table
from rlhf_lab.data.verdicts import comparison, verdict_row
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.judges.gold import GoldJudge
from rlhf_lab.judges.manner import Manner
from rlhf_lab.judges.simulated import SimulatedJudge
from rlhf_lab.run import Run
from rlhf_lab.stages.fit_judge import MANNER, FitJudge
from rlhf_lab.tracking import NoTracker

PATHS = ModelPaths(**dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={})
TRUE = Manner(noise=0.8, flip=0.02, position_bias=0.9, inconsistency=0.4, tie_width=0.2)
GOLD = GoldJudge({"helpful": {"helpfulness": 1.0}}, 0.0)


def stage(path, criteria=None):
    hardware = Hardware(device="cpu", dtype="float32", threads=1)
    return FitJudge(verdicts=str(path), judge=GOLD, criteria=criteria, model=PATHS, hardware=hardware, draws=3)


@pytest.fixture
def verdicts(tmp_path):
    records = tiny_help.demonstrations("sft", 400, 0)
    pairs = [
        {"id": r.prompt.id, "prompt": r.prompt.written, "response_0": r.response, "response_1": other}
        for r in records
        for other in ("sure !", "sorry , i can not help with that .")
    ]
    said = SimulatedJudge(GOLD, TRUE, None, seed=5).compare([comparison(pair) for pair in pairs], "helpful")
    rows = [verdict_row(pair, "helpful", verdict) for pair, verdict in zip(pairs, said, strict=True)]
    write_table(rows, tmp_path / "test.parquet")
    return tmp_path / "test.parquet", [comparison(pair) for pair in pairs], said


def test_a_simulated_judge_of_the_fitted_manner_errs_as_the_judge_did(verdicts, tmp_path):
    path, asked, said = verdicts
    fitting = stage(path)
    fitting.check()
    run = Run.open(
        tmp_path / "run",
        config={"seed": 0, "keep_checkpoints": 2},
        overrides=[],
        artifacts={},
        tracker=NoTracker(),
        console=Console(),
    )
    try:
        metrics = fitting.run(run)
    finally:
        run.close()
    for name, true in vars(TRUE).items():
        assert metrics[f"{name}/mean"] == pytest.approx(true, abs=0.25)
        assert metrics[f"{name}/low"] <= metrics[f"{name}/high"]
    assert metrics["comparisons"] == 800
    alike = SimulatedJudge(
        GOLD, Manner(noise=9, flip=0, position_bias=0, inconsistency=0, tie_width=0), str(run.directory / MANNER), 6
    )
    alike.check(["helpful"])
    again = alike.load(None, None).compare(asked, "helpful")

    def profile(verdicts):
        by_order = np.array([verdict.by_order for verdict in verdicts])
        shown_first = (by_order[:, 0] + 1 - by_order[:, 1]).mean() / 2
        return shown_first, (by_order[:, 0] == by_order[:, 1]).mean(), by_order.mean()

    assert profile(again) == pytest.approx(profile(said), abs=0.06)


def test_what_cannot_be_fitted_is_refused_by_name(verdicts, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        stage(tmp_path / "absent.parquet").check()
    with pytest.raises(ValueError, match="asked for kindness"):
        stage(verdicts[0], ["kindness"]).check()
    stage(tmp_path / "run/verdicts/test.parquet").check({str(tmp_path / "run")})
    with pytest.raises(ValueError, match=r"judge.fitted=.*manner.json of a run of stage=fit_judge"):
        SimulatedJudge(GOLD, TRUE, str(tmp_path / "absent.json"), 0).check(["helpful"])
