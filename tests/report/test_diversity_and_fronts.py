"""What the pictures of diversity and of fronts show of a run's metrics."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_lab.report.canvas import LIGHT, png
from rlhf_lab.report.diversity_plots import across_inputs, per_input
from rlhf_lab.report.pareto_plots import fronts
from rlhf_lab.report.run import read_run


@pytest.fixture
def run_of(tmp_path):
    def make(*steps):
        text = "".join(json.dumps({"step": k, **metrics}) + "\n" for k, metrics in enumerate(steps))
        (tmp_path / "metrics.jsonl").write_text(text)
        return read_run(tmp_path)

    return make


def test_diversity_has_a_panel_for_each_measure_and_a_marker_for_each_table(run_of):
    values = {"per_input/sft": 0.8, "per_input/ppo": 0.2, "per_input_at_8_words/sft": 0.9, "across_inputs/sft": 0.95}
    metrics = {f"diversity/test/{place}/ead_words/mean": value for place, value in values.items()}
    metrics |= {f"diversity/test/{place}/ead_words/ci95": 0.01 for place in values}
    metrics |= {"diversity/test/per_input/sft/ead_words/low": 0.5, "diversity/test/per_input/sft/ead_words/high": 0.85}
    run = run_of(metrics | {"diversity/test/per_input/sft/self_bleu/mean": 0.5})
    ead, bleu = per_input(run)
    assert [name for _, name in ead.ticks] == ["all of each", "at 8 words"]
    assert [curve.label for curve in ead.curves] == ["sft", "ppo"]
    assert_allclose([curve.y for curve in ead.curves], [[0.8, 0.9], [0.2, np.nan]])
    assert ead.curves[0].ci is not None
    assert_allclose(ead.curves[0].ci, [[0.3, 0.01], [0.05, 0.01]])  # lopsided where it is
    assert ead.curves[0].x[0] < 0 < ead.curves[1].x[0]  # side by side
    assert bleu.title.startswith("Self-BLEU")
    [across] = across_inputs(run)
    assert_allclose(across.curves[0].y, [0.95])
    assert png([ead, bleu, across], LIGHT, 30)


def test_fronts_have_intervals_both_ways_and_a_line_through_the_best(run_of):
    def step(h, j, best):
        values = {"gold/h": h, "gold/j": j}
        found = {f"pareto/test/soup/{name}/{end}": v for name, mean in values.items()
                 for end, v in (("mean", mean), ("ci95", 0.1))}  # fmt: skip
        return found | {"pareto/test/soup/on_front": best}

    last = {"pareto/test/soup/hypervolume/mean": 3.0, "pareto/test/soup/hypervolume/ci95": 0.2}
    last |= {"pareto/test/soup/hypervolume/low": 1.0, "pareto/test/soup/hypervolume/high": 3.5}
    last |= {"pareto/soup/hours": 0.5, "pareto/soup/with_needs/hours": 2.0}
    shown = fronts(run_of(step(2, 0, 1), step(0, 0, 0), step(1, 1, 1), last))
    front, volume, time = shown
    line, markers = front.curves
    assert_allclose(line.x, [1, 2])
    assert_allclose(line.y, [1, 0])
    assert markers.x_ci is not None
    assert_allclose(markers.x_ci, [0.1] * 3)
    assert_allclose(volume.curves[0].y, [3])
    assert volume.curves[0].ci is not None
    assert_allclose(volume.curves[0].ci, [[2], [0.5]])
    assert [curve.y.tolist() for curve in time.curves] == [[0.5], [2.0]]
    assert png(shown, LIGHT, 30)
    assert fronts(run_of({"loss": 1.0})) == []
