import base64
import hashlib
import io
import json
import math
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from rlhf_lab.report.canvas import DARK, LIGHT
from rlhf_lab.report.comparison import Mean
from rlhf_lab.report.summary import number
from rlhf_lab.report.sweep import basis, build_sweep_report, findings, headline, render
from rlhf_lab.report.sweep_figures import figures
from rlhf_lab.report.sweep_plots import combinations, over_time
from rlhf_lab.report.sweep_runs import read_sweep
from rlhf_lab.report.sweep_tables import Row, by_combination, by_factor, spelled
from rlhf_lab.report.sweep_values import Metric, Values, read_values
from tests.report.sweeps import make_sweep, online, scorer
from tests.report.test_report import ATTACK, BROWSER, Page

TWO_BY_TWO = {"algorithm": ["ppo", "ppo_lag"], "reward": ["single", "ensemble_uwo"], "seed": ["0", "1", "2"]}
SEEDS_ONLY = {"seed": ["0", "1", "2"]}
GOLD, COST = "eval/test/gold/helpfulness/mean", "eval/test/gold/cost/mean"


def one_failed(point: Mapping[str, str]) -> str:
    return "failed" if point["seed"] == "2" and point.get("algorithm") == "ppo" else "finished"


def read(root: Path) -> Values:
    return read_values(read_sweep(root))


def lasts(root: Path) -> Any:  # a DataFrame, whose operations no checker follows
    """The last line of every finished run with its factors, straight from the files."""
    rows = []
    for run in json.loads((root / "sweep.json").read_text())["runs"]:
        status = root / run["directory"] / "status.json"
        if status.exists() and json.loads(status.read_text())["state"] == "finished":
            lines = (root / run["directory"] / "metrics.jsonl").read_text().splitlines()
            rows.append(run["factors"] | json.loads(lines[-1]))
    return pd.DataFrame(rows)


def metric(values: Values, key: str) -> int:
    return [metric.key for metric in values.headline].index(key)


def named(rows: tuple[Row, ...], label: str) -> Row:
    return next(row for row in rows if row.label == label)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("sweeps") / "whole", TWO_BY_TWO)


@pytest.fixture(scope="module")
def with_losses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("sweeps") / "losses", TWO_BY_TWO, state=one_failed)


@pytest.fixture(scope="module")
def page(with_losses: Path) -> Page:
    return Page(build_sweep_report(with_losses))


def test_a_combination_is_the_mean_of_its_seeds_with_students_interval(whole: Path):
    values, frame = read(whole), lasts(whole)
    row = named(by_combination(values, "test"), "ppo_lag · single")
    chosen = frame[(frame.algorithm == "ppo_lag") & (frame.reward == "single")][GOLD].to_numpy()
    low, high = stats.t.interval(0.95, 2, loc=chosen.mean(), scale=stats.sem(chosen))
    cell = row.cells[metric(values, "gold/helpfulness")]
    assert (cell.after.value, cell.after.low, cell.after.high) == pytest.approx((chosen.mean(), low, high))
    assert cell.before == pytest.approx(1.25)
    assert (row.finished, row.planned) == (3, 3)


def test_a_level_beside_the_baseline_is_paired_by_seed_and_all_else(whole: Path):
    values, frame = read(whole), lasts(whole)
    table = by_factor(values)[0]
    found = next(pair for pair in table.pairs if pair.metric.key == "gold/cost")
    wide = frame.pivot_table(index=["reward", "seed"], columns="algorithm", values=COST)
    gaps = wide["ppo_lag"] - wide["ppo"]
    oracle: Any = stats.ttest_1samp(gaps.groupby("seed").mean(), 0)
    assert found.difference.mean.value == pytest.approx(gaps.mean())
    assert found.difference.p == pytest.approx(oracle.pvalue)
    assert found.p_adjusted == pytest.approx(max(oracle.pvalue, min(1, 2 * oracle.pvalue)))  # the least of two
    assert found.count == f"better in {(gaps < 0).sum()} of 6"  # of a cost, less is better
    assert found.verdict == "better"
    assert any(line.startswith("ppo_lag is better than ppo in gold cost: −") for line in findings([table]))


def test_what_seeds_do_not_resolve_is_said(whole: Path):
    table = by_factor(read(whole))[1]
    assert (table.factor, table.baseline) == ("reward", "single")
    for pair in table.pairs:
        interval = pair.difference.mean
        if interval.low < 0 < interval.high:
            assert pair.verdict == "not resolved with 3 seeds"
    assert any(pair.verdict.startswith("not resolved with 3 seeds") for pair in table.pairs)


def test_a_margin_rests_on_what_every_level_has(with_losses: Path):
    values, frame = read(with_losses), lasts(with_losses)
    table = by_factor(values)[0]
    cell = named(table.levels, "ppo_lag").cells[metric(values, "gold/helpfulness")]
    both = frame[(frame.algorithm == "ppo_lag") & (frame.seed != "2")]  # where ppo failed, ppo_lag does not count
    assert cell.after.value == pytest.approx(both[GOLD].mean())
    assert (table.num_blocks, cell.after.num) == (4, 2)


def test_runs_that_failed_are_in_no_mean_and_are_said_loudly(with_losses: Path, page: Page):
    row = named(by_combination(read(with_losses), "test"), "ppo · single")
    assert (row.finished, row.planned, row.cells[0].after.num) == (2, 3, 2)
    assert "10 finished, 2 failed" in page.words
    assert "Runs failed, and their seeds are missing from the means: 1 of ppo · single, 1 of ppo · ens" in page.words
    assert "10 finished runs compared at the last evaluation of each; the other 2 are not in any mean." in page.words
    failed = [row for row in page.rows if "failed" in row]
    assert len(failed) == 2
    assert all(row[-1] == "OutOfMemoryError: CUDA out of memory" for row in failed)


def test_every_run_is_listed_with_its_own_page_if_it_has_one(with_losses: Path, page: Page):
    links = [str(link["href"]) for link in page.named("a") if str(link["href"]).endswith("/report.html")]
    assert len(links) == 10
    names = {run["name"] for run in json.loads((with_losses / "sweep.json").read_text())["runs"]}
    listed = [row for row in page.rows if row and row[0] in names]
    assert len(listed) == 12
    assert {row[-2] for row in listed} == {"1"}  # two sittings: requeued once
    assert any("41 s" in cell or "42 s" in cell for cell in listed[0])


def test_the_page_loads_nothing_and_runs_only_its_own_script(with_losses: Path, page: Page):
    text = (with_losses / "report.html").read_text()
    script = text.split("<script>")[1].split("</script>")[0]
    policy = next(str(m["content"]) for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert len(page.named("script")) == 1
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "srcset", "href"):
                assert str(value).startswith(("data:", "#")) or (tag == "a" and ":" not in str(value)), (tag, value)


def test_the_pictures_are_shown_light_and_dark_with_words(with_losses: Path, page: Page):
    drawn = {path.stem for path in (with_losses / "plots").iterdir()}
    assert drawn == {"final", "held_out", "training"}
    assert len(page.named("img")) == len(page.named("source")) == 3
    assert all(len(str(image["alt"])) > 60 and "nan" not in str(image["alt"]) for image in page.named("img"))


def test_the_tables_beside_the_page_load_in_one_line(with_losses: Path, page: Page):
    frame: Any = pd.read_parquet(with_losses / "metrics.parquet")
    assert list(frame.columns[:7]) == ["run", "state", "algorithm", "reward", "seed", "step", "episode"]
    assert frame.seed.dtype == np.int64
    assert len(frame) == 10 * 21 + 2 * 11
    last = frame[(frame.state == "finished") & (frame.step == 20)]
    pd.testing.assert_series_equal(
        last.groupby("algorithm")[GOLD].mean(), lasts(with_losses).groupby("algorithm")[GOLD].mean()
    )
    pd.testing.assert_frame_equal(pd.read_csv(with_losses / "metrics.csv"), frame, check_dtype=False)
    runs: Any = pd.read_csv(with_losses / "runs.csv")
    assert (runs.state == "failed").sum() == 2
    assert (with_losses / runs.directory[0] / "metrics.jsonl").is_file()
    assert runs["eval/test/gold/cost"].notna().all()


def test_curves_are_means_over_seeds_at_the_evaluations_that_all_have(whole: Path):
    values = read(whole)
    sweep = values.sweep
    [panel] = over_time(sweep, combinations(sweep), values.headline[metric(values, "gold/helpfulness")])
    curve = next(curve for curve in panel.curves if curve.label == "ppo · single")
    assert curve.x.tolist() == [320.0 * k for k in range(5)]  # episodes: 64 a step, every fifth step
    frame = lasts(whole)
    ends = frame[(frame.algorithm == "ppo") & (frame.reward == "single")][GOLD]
    assert curve.y[-1] == pytest.approx(ends.mean())
    assert curve.ci is not None
    assert curve.ci[-1] == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(ends))
    assert sum(curve.kind == "thread" for curve in panel.curves) == 12


def test_a_curve_ends_where_its_shortest_seed_does(tmp_path: Path):
    def unequal(point: Mapping[str, str], noise: np.random.Generator) -> list[dict[str, float]]:
        return online(point, noise, num_steps=20 if point["seed"] == "0" else 10)

    values = read(make_sweep(tmp_path / "sweep", SEEDS_ONLY, metrics=unequal))
    [panel] = over_time(values.sweep, combinations(values.sweep), values.headline[0])
    assert panel.curves[-1].x.tolist() == [0.0, 320.0, 640.0]


def test_a_limit_is_drawn_and_every_method_is_held_against_it(whole: Path):
    values = read(whole)
    cost = values.headline[metric(values, "gold/cost")]
    assert (cost.limit, cost.better) == (0.0, -1)
    [panel] = over_time(values.sweep, combinations(values.sweep), cost)
    assert panel.curves[-1].kind == "limit"
    cell = named(by_combination(values, "test"), "ppo · single").cells[metric(values, "gold/cost")]
    assert cell.limit.startswith("exceeded")


def test_while_nothing_is_finished_runs_are_compared_where_all_have_been(tmp_path: Path):
    def waiting(point: Mapping[str, str]) -> str | None:
        return {"0": "running", "1": "stopped", "2": None}[point["seed"]]

    root = make_sweep(tmp_path / "sweep", SEEDS_ONLY, state=waiting)
    longer = online({"seed": "1"}, np.random.default_rng(1))[:16]
    (root / "seed=1/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in longer))
    values = read(root)
    assert basis(values) == (
        "Provisional: no run is finished. 2 runs compared at step 10, the last that all of them have."
    )
    assert headline(values.sweep) == "3 seeds: 1 running, 1 pending, 1 stopped"
    key = values.headline[metric(values, "gold/helpfulness")]
    member = next(member for member in values.sweep.members if member.name == "seed=1")
    assert values.of(member, key).after == longer[10][GOLD]
    assert "This sweep is not complete" in render(values, [])


def test_a_sweep_in_which_nothing_has_begun_has_a_page(tmp_path: Path):
    page = Page(build_sweep_report(make_sweep(tmp_path / "sweep", TWO_BY_TWO, state=lambda _: None)))
    assert "12 pending" in page.words
    assert "No run has logged anything yet." in page.words
    assert not page.named("img")
    assert len(pd.read_csv(tmp_path / "sweep/runs.csv")) == 12
    assert pd.read_parquet(tmp_path / "sweep/metrics.parquet").empty


def test_seeds_alone_give_one_row_and_no_pairs(tmp_path: Path):
    values = read(make_sweep(tmp_path / "sweep", SEEDS_ONLY))
    [row] = by_combination(values, "test")
    assert (row.label, row.cells[0].after.num) == ("all runs", 3)
    assert by_factor(values) == ()
    assert {figure.name for figure in figures(values)} == {"final", "held_out", "training"}


def test_without_seeds_nothing_has_an_interval_and_nothing_is_resolved(tmp_path: Path):
    values = read(make_sweep(tmp_path / "sweep", {"algorithm": ["ppo", "ppo_lag"]}))
    assert all(math.isnan(row.cells[0].after.half_width) for row in by_combination(values, "test"))
    assert "±" not in str(by_combination(values, "test")[0].cells[0])
    verdicts = {pair.verdict for pair in by_factor(values)[0].pairs}
    assert verdicts == {"one seed: chance cannot be told from effect"}


def test_two_kinds_of_seeds_are_neither_of_them_a_factor(tmp_path: Path):
    sweep = read_sweep(
        make_sweep(tmp_path / "s", {"algorithm": ["ppo"], "seed": ["0", "1"], "artifact_seed": ["7", "8"]})
    )
    assert list(sweep.factors) == ["algorithm"]
    assert headline(sweep) == "algorithm (ppo) × 2 seeds × 2 artifact seeds: 4 finished"
    assert len({member.seed for member in sweep.members}) == 4


def test_methods_of_unequal_metrics_are_compared_in_what_each_has(tmp_path: Path):
    def mixed(point: Mapping[str, str], noise: np.random.Generator) -> list[dict[str, float]]:
        if point["algorithm"] == "ppo":
            return online(point, noise)
        return [{"step": k, "loss/nll": 2.0 / k, "eval/sft_test/loss/nll": 2.1 / k} for k in range(1, 8)]

    values = read(make_sweep(tmp_path / "sweep", {"algorithm": ["ppo", "sft"], **SEEDS_ONLY}, metrics=mixed))
    assert list(values.metrics) == ["test", "sft_test", "ood_domain"]
    ppo, sft = by_combination(values, "test")
    assert ppo.cells[0].after.num == 3
    assert str(sft.cells[0]) == "—"
    assert str(by_combination(values, "sft_test")[1].cells[0]).startswith("0.30")
    assert by_factor(values)[0].pairs == ()
    assert "They did not end at the same step" not in basis(values)  # sft has no evaluation of this split
    assert "nothing can be paired with ppo" in " ".join(render(values, []).split())


def test_a_sweep_of_value_models_is_judged_by_accuracy_then_loss(tmp_path: Path):
    factors = {"learner.lr": ["1e-4", "1e-3"], "seed": ["0", "1", "2", "3"]}
    values = read(make_sweep(tmp_path / "sweep", factors, metrics=scorer))
    assert [(metric.key, metric.better) for metric in values.headline] == [("accuracy", 1), ("loss/pairwise", -1)]
    assert findings(by_factor(values))[0].startswith("lr=1e-3 is better than lr=1e-4 in accuracy: +0.0")


def test_runs_without_evaluation_are_compared_by_their_training(tmp_path: Path):
    def trained(point: Mapping[str, str], noise: np.random.Generator) -> list[dict[str, float]]:
        return [
            {key: value for key, value in line.items() if not key.startswith("eval/")} for line in online(point, noise)
        ]

    values = read(make_sweep(tmp_path / "sweep", SEEDS_ONLY, metrics=trained))
    assert [metric.key for metric in values.headline] == [
        *("objective/scores", "objective/kl", "completions/mean_length"),
    ]
    assert by_combination(values, "")[0].cells[0].after.num == 3
    assert "in training" in render(values, [])


def test_runs_that_end_at_unequal_steps_are_compared_at_their_ends_and_it_is_said(tmp_path: Path):
    def unequal(point: Mapping[str, str], noise: np.random.Generator) -> list[dict[str, float]]:
        return online(point, noise, num_steps=20 if point["algorithm"] == "ppo" else 10)

    values = read(make_sweep(tmp_path / "s", {"algorithm": ["ppo", "ppo_lag"], "seed": ["0", "1"]}, metrics=unequal))
    assert "(2 runs at step 10, 2 runs at step 20)" in basis(values)
    frame = lasts(tmp_path / "s")
    cell = named(by_combination(values, "test"), "ppo_lag").cells[metric(values, "gold/helpfulness")]
    assert cell.after.value == pytest.approx(frame[frame.algorithm == "ppo_lag"][GOLD].mean())


def test_a_last_value_that_is_not_finite_is_not_replaced_by_an_earlier_one(tmp_path: Path):
    root = make_sweep(tmp_path / "sweep", SEEDS_ONLY)
    path = root / "seed=0/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1][GOLD] = "nan"  # as a run spells it
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = read(root)
    [row] = by_combination(values, "test")
    assert [cell.after.num for cell in row.cells[:2]] == [2, 3]
    assert math.isnan(values.of(values.sweep.members[0], values.headline[0]).after)


def test_a_damaged_run_does_not_cost_the_page(tmp_path: Path):
    root = make_sweep(tmp_path / "sweep", SEEDS_ONLY)
    (root / "seed=0/metrics.jsonl").write_text("nonsense\n{}\n")
    shutil.rmtree(root / "seed=1")
    sweep = read_sweep(root)
    assert [member.state for member in sweep.members] == ["unreadable", "pending", "finished"]
    assert "line 1 is not JSON" in sweep.members[0].error
    assert "line 1 is not JSON" in render(read(root), [])


def test_numbers_that_are_swept_are_drawn_by_value_and_as_a_map(tmp_path: Path):
    factors = {"algorithm": ["ppo", "ppo_lag"], "algorithm.kl_coef": [".1", ".01", "3e-2"], "seed": ["0", "1", "2"]}
    root = make_sweep(tmp_path / "sweep", factors)
    values = read(root)
    found = {figure.name: figure for figure in figures(values)}
    assert set(found) == {"final", "held_out", "training", "response_kl_coef", "heat", "coordinates"}
    frame = lasts(root).groupby(["algorithm", "algorithm.kl_coef"])[GOLD].mean()
    for word, (algorithm, kl_coef) in (("highest", frame.idxmax()), ("lowest", frame.idxmin())):
        said = f"{word} {number(frame[algorithm, kl_coef])} at algorithm {algorithm}, kl_coef {kl_coef}"
        assert said in found["heat"].alt.split("Gold cost by")[0]
    table = next(table for table in by_factor(values) if table.factor == "algorithm.kl_coef")
    assert table.baseline == "kl_coef=.1"  # the first as typed
    for figure in found.values():
        light, dark = (Image.open(io.BytesIO(figure.draw(theme, 40))) for theme in (LIGHT, DARK))
        assert light.size == dark.size
        assert 100 < light.width < 1200
        papers = [np.asarray(image.convert("RGB"))[0, 0] for image in (light, dark)]
        assert papers[0].min() > 250
        assert papers[1].max() < 40


def test_many_combinations_become_small_multiples(tmp_path: Path):
    factors = {"algorithm": ["ppo", "ppo_lag"], "algorithm.kl_coef": [".01", ".02", ".05", ".1", ".2"], "seed": ["0"]}
    found = {figure.name: figure for figure in figures(read(make_sweep(tmp_path / "sweep", factors)))}
    assert {"held_out_gold_helpfulness", "held_out_by_algorithm", "training_by_kl_coef"} <= set(found)
    assert found["held_out_gold_helpfulness"].num_panels == 2
    assert "held_out" not in found


def test_names_with_slashes_and_signs_are_linked_and_drawn(tmp_path: Path):
    root = make_sweep(tmp_path / "sweep", {"model/size": ["a b", "c"], "seed": ["0", "1"]})
    stored = json.loads((root / "sweep.json").read_text())
    (root / "deep").mkdir()
    shutil.move(root / stored["runs"][0]["directory"], root / "deep/x=1?#é")
    stored["runs"][0]["directory"] = "deep/x=1?#é"
    (root / "sweep.json").write_text(json.dumps(stored))
    page = Page(build_sweep_report(root))
    assert "deep/x%3D1%3F%23%C3%A9/report.html" in [link["href"] for link in page.named("a")]
    assert "a b" in page.words


def test_names_and_errors_are_shown_as_text(tmp_path: Path):
    root = make_sweep(tmp_path / "sweep", {"algorithm": ["ppo", "x"], "seed": ["0", "1"]}, state=lambda _: "failed")
    stored = json.loads((root / "sweep.json").read_text())
    stored["name"] = stored["command"] = stored["runs"][0]["name"] = ATTACK
    stored["runs"][0]["factors"]["algorithm"] = ATTACK
    (root / "sweep.json").write_text(json.dumps(stored))
    (root / stored["runs"][0]["directory"] / "status.json").write_text(json.dumps({"state": "failed", "error": ATTACK}))
    page = Page(build_sweep_report(root))
    assert page.text.count(ATTACK) >= 5
    assert len(page.named("script")) == 1
    assert all(str(image["src"]).startswith("data:image/png") for image in page.named("img"))


def test_a_run_from_before_a_factor_was_added_takes_it_from_what_was_typed(tmp_path: Path):
    root = make_sweep(tmp_path / "sweep", {"algorithm": ["ppo", "ppo_lag"], "seed": ["0"]})
    stored = json.loads((root / "sweep.json").read_text())
    stored["factors"] = {"algorithm": ["ppo", "ppo_lag"], "reward": ["single", "ensemble_uwo"]}
    stored["runs"][0] |= {"overrides": ["algorithm=ppo", "reward=ensemble_uwo"], "factors": {"algorithm": "ppo"}}
    (root / "sweep.json").write_text(json.dumps(stored))
    assert [member.combination for member in read_sweep(root).members] == [("ppo", "ensemble_uwo"), ("ppo_lag", "—")]


def test_two_factors_whose_keys_end_alike_are_told_apart(tmp_path: Path):
    sweep = read_sweep(make_sweep(tmp_path / "s", {"learner.lr": ["1", "2"], "critic.lr": ["1", "2"]}))
    assert sweep.label(("1", "2")) == "learner.lr=1 · critic.lr=2"


@pytest.mark.parametrize(
    ("value", "half_width", "scale", "said"),
    [
        (0.002, 0.3, 1.0, "0.00 ± 0.30"),
        (-0.002, 0.3, 1.0, "0.00 ± 0.30"),
        (0.8, 0.001, 1.0, "0.80 ± 0.00"),
        (0.003, 0.001, 1.0, "3.00e−03 ± 1.00e−03"),
        (0.002, 0.003, 0.004, "2.00e−03 ± 3.00e−03"),
        (0.002, math.nan, 1.0, "0.00"),
    ],
)
def test_small_numbers_are_written_as_finely_as_they_matter(value: float, half_width: float, scale: float, said: str):
    mean = Mean(value=value, half_width=half_width, num=3)
    assert spelled(mean, scale).replace("\N{NO-BREAK SPACE}", " ") == said


def test_metrics_that_differ_in_no_pair_are_named_once(whole: Path):
    values = read(whole)
    table = by_factor(values)[1]
    assert {metric.key for metric in table.equal} == {"kl", "completions/mean_length"}
    assert not {metric.key for metric in table.equal} & {pair.metric.key for pair in table.pairs}
    assert "Equal in every pair: KL to the reference (nats), length (tokens)." in " ".join(render(values, []).split())


def test_what_is_no_sweep_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is not a sweep: it has no sweep\.json"):
        build_sweep_report(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lacks \['factors', 'name', 'runs'\]"):
        build_sweep_report(tmp_path)


def test_pictures_of_what_a_sweep_was_before_do_not_stay(tmp_path: Path):
    root = make_sweep(tmp_path / "sweep", SEEDS_ONLY, metrics=scorer)
    (root / "plots").mkdir()
    (root / "plots/held_out_by_algorithm.png").write_bytes(b"")
    build_sweep_report(root)
    assert {path.stem for path in (root / "plots").iterdir()} == {"final", "training"}


def test_metrics_are_told_by_the_name_under_which_they_were_logged(whole: Path):
    values = read(whole)
    kl = Metric(split="test", key="kl", label="", better=0, limit=math.nan)
    assert values.headline[metric(values, "kl")].at(values.sweep.members[0].run, 20) == pytest.approx(
        kl.series(values.sweep.members[0].run).at(20)
    )


@pytest.mark.slow
def test_two_hundred_runs_make_a_page_of_bounded_size(tmp_path: Path):
    factors = {
        "algorithm": ["ppo", "ppo_lag"],
        "reward": ["single", "ensemble_uwo"],
        "algorithm.kl_coef": [".01", ".02", ".05", ".1", ".2"],
        "learner.lr": ["1e-5", "1e-4"],
        "seed": ["0", "1", "2", "3", "4"],
    }
    built = build_sweep_report(make_sweep(tmp_path / "sweep", factors))
    page = Page(built)
    assert built.stat().st_size < 4_000_000
    assert len(page.named("img")) < 20
    assert sum(str(link["href"]).endswith("/report.html") for link in page.named("a")) == 200


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_a_browser_runs_the_script_of_the_page_and_blocks_nothing(with_losses: Path, page: Page, tmp_path: Path):
    assert BROWSER is not None
    options = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    options += "disable-component-update disable-sync enable-logging=stderr dump-dom "
    options += f"proxy-server=127.0.0.1:9 user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, *(f"--{option}" for option in options.split()), (with_losses / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "ERR_" in line]
    assert not said, said
    assert "<output>12 of 12</output>" in done.stdout
    assert done.stdout.count('<button type="button">') > 8
