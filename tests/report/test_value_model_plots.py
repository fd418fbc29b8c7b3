"""Pictures of value models hide no point: what is worse than usual is on the axis too."""

import json

import numpy as np
import pytest

from rlhf_lab.report.canvas import LIGHT, png
from rlhf_lab.report.run import read_run
from rlhf_lab.report.value_model_plots import value_models


@pytest.mark.parametrize(("worst", "floors"), [(0.1, [0.02, 0.02]), (0.6, [0.47, 0.4])])
def test_no_point_and_no_interval_is_below_the_axis(tmp_path, worst, floors):
    seen = {"observed": worst, "value": worst, "low": worst - 0.05, "high": worst + 0.2, "count": 7}
    drawn = {
        "reliability": [seen | {"predicted": 0.6}, seen | {"predicted": 0.8, "observed": 0.9}],
        "accuracy_by_margin": [seen | {"margin": 1.0}],
        "histogram": {"edges": [0.0, 1.0, 2.0], "counts": {"preferred": [1, 3], "other": [4, 0]}},
    }
    (tmp_path / "value_models.json").write_text(json.dumps({"helpful": {"test": drawn}}))
    said = {f"eval/test/value_model/helpful/accuracy/{end}": 0.5 for end in ("mean", "low", "high")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, **said}) + "\n")
    accuracy, calibration, margin, scores = value_models(read_run(tmp_path))
    assert [panel.y_range and panel.y_range[0] for panel in (calibration, margin)] == pytest.approx(floors)
    np.testing.assert_allclose(scores.curves[0].y, [0.25, 0.25, 0.75, 0.75])
    assert png([accuracy, calibration, margin, scores], LIGHT, 30)
