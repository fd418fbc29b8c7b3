import json
import math
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_lab.data.tables import write_table
from rlhf_lab.report.canvas import in_words, rolling_mean
from rlhf_lab.report.figures import FIGURES, OVERVIEW
from rlhf_lab.report.page import build_report
from rlhf_lab.report.plots import (
    best_of_n,
    by_split,
    learning,
    metric_label,
    multipliers,
    overoptimisation,
    soups,
    trade_offs,
)
from rlhf_lab.report.run import read_run
from rlhf_lab.report.summary import comparisons, duration, not_finite, number, timings

ATTACK = '<script>alert("x")</script><img src="https://evil.example/x.png" onerror="alert(1)">'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def online_metrics(num_steps: int) -> list[dict[str, float]]:
    """What the main job logs: a proxy that runs away from its gold score, a cost that comes down to its limit."""
    noise = np.random.default_rng(0)
    lines = []
    for step in range(num_steps + 1):
        done = step / num_steps
        kl = 12 * done
        proxy, gold = 1.8 * done**0.7, 1.2 + 1.6 * done**0.6 - 0.7 * done**2
        cost, wobble = 0.30 - 0.34 * done, noise.normal(0, 1, 8)
        line = {
            "step": step,
            "episode": 64 * step,
            "objective/kl": kl + 0.3 * wobble[0],
            "objective/kl_coef": 0.05,
            "objective/scores": proxy + 0.1 * wobble[1],
            "objective/rlhf_reward": proxy - 0.05 * kl + 0.1 * wobble[1],
            "objective/entropy": 0.9 - 0.4 * done,
            "policy/approxkl_avg": 0.01 + 0.002 * wobble[2],
            "policy/clipfrac_avg": 0.1 + 0.01 * wobble[3],
            "policy/entropy_avg": 0.9 - 0.4 * done,
            "loss/policy_avg": 0.02 * wobble[4],
            "loss/value_avg": 0.5 * math.exp(-3 * done) + 0.1,
            "val/ratio": 1 + 0.003 * wobble[5],
            "val/num_eos_tokens": 60 - round(abs(wobble[6])),
            "rewards/helpful/mean": proxy + 0.1 * wobble[1],
            "rewards/helpful/std": 1.0,
            "ensemble/helpful/mean": proxy + 0.2 + 0.1 * wobble[1],
            "ensemble/helpful/std": 0.3 + 0.4 * done,
            "ensemble/helpful/min": proxy - 0.5 - 0.4 * done,
            "ensemble/helpful/penalty": 0.2 + 0.3 * done,
            "ensemble/helpful/disagreement": 0.3 + 0.45 * done + 0.02 * wobble[7],
            "cost/cost/mean": cost + 0.05 * wobble[2] - 0.03,
            "cost/cost/frac_violating": 0.5 - 0.3 * done,
            "lagrange/cost/lambda": 0.5 + 1.5 * math.sin(2.5 * done),
            "lagrange/cost/violation": cost - 0.03,
            "lagrange/cost/limit": 0.0,
            "lagrange/cost/at_cap": float(0.5 < done < 0.6),
            "gold/helpfulness/mean": gold + 0.08 * wobble[0],
            "gold/cost/mean": cost + 0.05 * wobble[3],
            "gold/humour/mean": 0.1 + 0.02 * wobble[4],
            "completions/mean_length": 15 + 6 * done + 0.3 * wobble[5],
            "completions/truncated_ratio": 0.02 + 0.03 * done,
            "kl/k1": kl,
            "kl/k2": kl * 1.1,
            "kl/k3": kl * 0.9,
            "time/rollout": 0.8,
            "time/scoring": 0.2,
            "time/update": 1.0,
            "throughput/update": 900.0 + step % 2,
            "memory/update": 1536.0 if step == 3 else 700.0,
            "lr": 1e-3 * (1 - done),
        }
        if step % 10 == 0 or step == num_steps:
            for split, shift in (("test", 0.0), ("ood_domain", -0.25)):
                line |= {
                    f"eval/{split}/gold/helpfulness/mean": gold + shift,
                    f"eval/{split}/gold/helpfulness/ci95": 0.053,
                    f"eval/{split}/gold/cost/mean": cost - shift / 2,
                    f"eval/{split}/gold/cost/ci95": 0.031,
                    f"eval/{split}/gold/humour/mean": 0.1,
                    f"eval/{split}/rewards/helpful/mean": proxy + shift / 2,
                    f"eval/{split}/cost/cost/mean": cost - 0.03,
                    f"eval/{split}/kl": kl,
                    f"eval/{split}/completions/mean_length": 15 + 6 * done,
                }
        lines.append(line)
    return lines


def samples_at(
    step: int, *, better_by: float, response: str = "first wipe the sponge . enjoy !"
) -> list[dict[str, Any]]:
    """Twelve prompts of two splits; after training, prompt k has gained k / 10 times `better_by` in gold."""
    return [
        {
            "split": split,
            "id": f"{split}-{k}",
            "prompt": f"user : how do i clean the kitchen with sponge {k} ? bot :",
            "response": f"{response} [{split} {k} at {step}]",
            "finished": k != 5,
            "kl": 0.5 * step,
            "scores": {"helpful": 0.1 * k, "cost": -0.2},
            "members": {"helpful": [0.1 * k + 0.01 * member for member in range(5)]},
            "gold": {"helpfulness": 1 + 0.05 * k + better_by * (k - 3) / 10, "cost": 0.3 - 0.01 * k, "humour": 0.0},
        }
        for split in ("test", "ood_domain")
        for k in range(12)
    ]


def make_run(folder: Path, num_steps: int = 100) -> Path:
    """A finished run of the main job, as the stage writes it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("algorithm:\n  name: ppo_lag\nseed: 0\n")
    (folder / "overrides.yaml").write_text("- algorithm=ppo_lag\n- reward=ensemble_uwo\n")
    environment = {
        "git": {"sha": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
        "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "host": "node17",
        "python": "3.11.2",
        "command": "python launch.py algorithm=ppo_lag reward=ensemble_uwo",
        "artifacts": {"toy/sft": {"path": "runs/toy/sft", "sha256": "ab" * 32}},
        "env": {"API_TOKEN": "hunter2"},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    status = {"state": "finished", "stage": "ppo_lag", "started": "2025-01-01T10:00:00", "ended": "2025-01-01T10:04:10"}
    (folder / "status.json").write_text(json.dumps(status | {"seconds": 250.0, "peak_memory_mib": 812.5}))
    write_lines(folder / "metrics.jsonl", online_metrics(num_steps))
    write_lines(folder / "samples/step_000000.jsonl", samples_at(0, better_by=0.0))
    write_lines(folder / f"samples/step_{num_steps:06d}.jsonl", samples_at(num_steps, better_by=1.0))
    write_lines(folder / "warnings.jsonl", [{"step": 40, "message": "KL rose by 3 nats in one step"}])
    return folder


class Page(HTMLParser):
    """The text, the tables, and whatever a page would load or run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.hidden = self.in_cell = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag == "style"
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False
        if tag in ("th", "td"):
            self.in_cell = False
            self.rows[-1][-1] = " ".join(self.rows[-1][-1].split())

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def size_of_png(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "ppo_lag-uwo", num_steps=40)


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page(build_report(finished))


def test_verdict_and_summary_table_are_the_numbers_of_the_files(finished: Path, page: Page):
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    before, after = (f"{logged[k]['eval/test/gold/helpfulness/mean']:.2f}" for k in (0, -1))
    assert f"Gold helpfulness on held-out prompts {before} ± 0.05 → {after} ± 0.05" in page.words
    assert "gold cost 0.30 ± 0.03 → −0.04 ± 0.03, limit 0: met" in page.words
    rows = [row for row in page.rows if row and row[0] == "gold helpfulness"]
    change = logged[-1]["eval/test/gold/helpfulness/mean"] - logged[0]["eval/test/gold/helpfulness/mean"]
    assert rows[0][1:] == [f"{before} ± 0.05", f"{after} ± 0.05", f"+{change:.2f} ± {0.053 * 2**0.5:.2f}"]
    elsewhere = logged[-1]["eval/ood_domain/gold/helpfulness/mean"]
    assert rows[1][2] == f"{elsewhere:.2f} ± 0.05"  # a table of its own per split


def test_the_page_says_of_each_phase_its_share_its_rate_and_its_memory(page: Page):
    [update] = [row for row in page.rows if row and row[0] == "update"]
    assert update[:5] == ["update", "41 s", "16%", "900", "1.5 GiB"]
    [rollout] = [row for row in page.rows if row and row[0] == "rollout"]
    assert rollout[3:5] == ["", ""]


@pytest.mark.parametrize(
    ("mean", "ci", "said"),
    [(-0.2, 0.05, "met"), (-0.02, 0.05, "met, within the error"), (0.3, 0.05, "exceeded"), (0.01, None, "exceeded")],
)
def test_a_limit_is_met_exceeded_or_not_resolved(tmp_path: Path, mean: float, ci: float | None, said: str):
    run = tmp_path / "run"
    line = {"step": 0, "lagrange/cost/limit": 0.0, "cost/cost/mean": mean, "eval/test/gold/cost/mean": mean}
    write_lines(run / "metrics.jsonl", [line | ({} if ci is None else {"eval/test/gold/cost/ci95": ci})])
    title = Page(build_report(run)).words.split(" run Gold cost ")[0]
    assert title.split("limit 0: ")[1] == said


def test_every_promised_picture_is_there_and_shown_light_and_dark_with_words(finished: Path, page: Page):
    promised = {"overview", "reward", "gold", "cost", "lambda", "kl", "proxy_gold_gap", "ensemble", "lengths"}
    promised |= {"diagnostics", "held_out"}
    assert {path.stem for path in (finished / "plots").iterdir()} == promised
    for path in (finished / "plots").iterdir():
        width, height = size_of_png(path)
        assert 600 <= width <= 2400
        assert 300 <= height <= 2400
        assert path.stat().st_size > 4000
    assert len(page.named("img")) == len(page.named("source")) == len(promised)
    alts = [str(image["alt"]) for image in page.named("img")]
    assert "limit from 0 to 0" in alts[0]
    assert all(len(alt) > 40 for alt in alts)


def test_the_page_loads_nothing_and_runs_nothing(page: Page):
    assert not page.named("script")
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "srcset", "href"):
                assert str(value).startswith(("data:", "#")), (tag, key, str(value)[:60])
    policy = next(meta for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])


def test_provenance_is_shown_and_environment_variables_are_not(finished: Path, page: Page):
    for shown in ("0123456789abcdef", "uncommitted", "node17", "ab" * 32, "toy/sft", "2.13.0", "algorithm=ppo_lag"):
        assert shown in page.text
    assert "name: ppo_lag" in page.text
    assert "KL rose by 3 nats" in page.text
    assert "hunter2" in (finished / "environment.json").read_text()
    assert "hunter2" not in page.text
    assert "API_TOKEN" not in page.text


def test_what_a_model_wrote_is_shown_as_text_and_a_huge_response_is_cut(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=4)
    write_lines(run / "samples/step_000004.jsonl", samples_at(4, better_by=1.0, response=ATTACK + "z" * 1_000_000))
    (run / "overrides.yaml").write_text(f"- '{ATTACK}'\n")
    (run / "status.json").write_text(json.dumps({"state": "failed", "stage": "ppo_lag", "error": ATTACK}))
    write_lines(run / "warnings.jsonl", [{"step": 1, "message": ATTACK}])
    page = Page(build_report(run))
    assert page.text.count(ATTACK) >= 6  # as text: responses, what was typed, error, warning
    assert not page.named("script")
    assert all(str(image["src"]).startswith("data:image/png") for image in page.named("img"))
    assert "more characters in samples/" in page.text
    assert len(page.text) < 100_000


def test_prompts_are_picked_by_what_the_gold_score_did(finished: Path):
    shown = comparisons(read_run(finished))
    assert list(shown) == ["test", "ood_domain"]
    reasons = {comparison.before.id: comparison.why for comparison in shown["test"]}
    assert "best improved (+0.80)" in reasons["test-11"]  # prompt k gains (k - 3) / 10
    assert "worst (−0.30)" in reasons["test-0"]
    assert "typical (+0.30)" in reasons["test-6"]
    for comparison in shown["test"]:
        assert comparison.after is not None
        assert comparison.before.prompt == comparison.after.prompt


def test_every_member_of_an_ensemble_is_listed_beside_its_aggregate(page: Page):
    assert ["helpful", "1.10", "1.10 · 1.11 · 1.12 · 1.13 · 1.14"] in page.rows


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"state": "failed", "stage": "ppo_lag", "error": "CUDA out of memory"}, "This run failed in stage ppo_lag"),
        ({"state": "running", "stage": "ppo_lag"}, "This run is not finished (state: running, stage ppo_lag)"),
        (None, "This run is not finished (state: unknown)"),
    ],
)
def test_a_run_that_did_not_end_says_so(tmp_path: Path, status: dict[str, str] | None, said: str):
    run = tmp_path / "run"
    half_written = json.dumps({"step": 0, "objective/kl": 0.5}) + '\n{"step": 1, "objec'
    run.mkdir()
    (run / "metrics.jsonl").write_text(half_written)
    if status is not None:
        (run / "status.json").write_text(json.dumps(status))
    page = Page(build_report(run))
    assert said in page.words
    assert (status or {}).get("error", "") in page.words
    assert "No evaluation on held-out prompts was recorded" in page.words


def test_a_finished_run_has_no_banner(page: Page):
    assert "banner" not in " ".join(str(attributes.get("class")) for _, attributes in page.tags)


def test_a_directory_with_nothing_in_it_still_gives_a_page(tmp_path: Path):
    page = Page(build_report(tmp_path))
    assert not page.named("img")
    assert "Provenance" in page.text


def test_offline_runs_show_their_loss_and_accuracy(tmp_path: Path):
    lines = [{"step": k, "loss/pairwise": 0.7 - 0.01 * k, "accuracy": 0.5 + 0.01 * k, "lr": 1e-5} for k in range(20)]
    for k, accuracy in ((0, 0.52), (19, 0.73)):
        lines[k] |= {"eval/test/loss/pairwise": 0.6, "eval/test/accuracy": accuracy, "eval/test/accuracy/ci95": 0.02}
    run = tmp_path / "reward_model"
    write_lines(run / "metrics.jsonl", lines)
    page = Page(build_report(run))
    assert "Accuracy on held-out test 0.52 ± 0.02 → 0.73 ± 0.02" in page.words
    assert {path.stem for path in (run / "plots").iterdir()} == {"overview", "learning", "diagnostics"}


def test_the_accuracy_of_finished_value_models_is_no_learning_curve(tmp_path: Path):
    said = {
        "eval/test/value_model/cost/accuracy/mean": 0.8,
        "gap/cost/ood/accuracy/low": 0.1,
        "gap/cost/ood/accuracy/mean": 0.2,
    }
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0} | said])
    assert learning(read_run(tmp_path)) == []


def test_values_that_are_not_finite_are_named_and_break_no_figure(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=40)
    lines = online_metrics(40)
    for line in lines[12:15]:
        line["loss/policy_avg"] = math.nan
    lines[20]["objective/kl"] = math.inf
    for line in lines:
        line["lagrange/cost/lambda"] = math.nan
    lines[-1]["eval/test/gold/helpfulness/mean"] = math.nan
    write_lines(run / "metrics.jsonl", lines)
    page = Page(build_report(run))
    assert "loss/policy_avg was not finite at 3 of 41 logged steps, first at step 12" in page.words
    assert "objective/kl was not finite at 1 of 41" in page.words
    assert "→ not finite" in page.words
    assert not multipliers(read_run(run))


def test_values_that_are_not_finite_are_read_as_a_run_spells_them(tmp_path: Path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "a": "nan", "b": "-inf", "c": 1.0, "note": "infinite"}])
    run = read_run(tmp_path)
    assert set(run.metrics[1]) == {"step", "a", "b", "c"}
    assert [line.split(" was ")[0] for line in not_finite(run)] == ["a", "b"]


@pytest.mark.parametrize(
    "absent", ["gold/", "ensemble/", "cost/", "lagrange/", "eval/", "rewards/", "objective/", "time/"]
)
def test_any_family_of_metrics_may_be_absent(tmp_path: Path, absent: str):
    lines = [{key: value for key, value in line.items() if not key.startswith(absent)} for line in online_metrics(3)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    run = read_run(tmp_path)
    for spec in (OVERVIEW, *FIGURES):
        shown = spec.panels(run)
        assert all(np.isfinite(curve.y).any() for panel in shown for curve in panel.curves)
        assert "nan" not in in_words(shown)
    timings(run)


def test_splits_are_never_blended(finished: Path):
    helpfulness = by_split(read_run(finished))[0]
    assert [curve.label for curve in helpfulness.curves] == ["test", "ood_domain"]
    np.testing.assert_allclose(helpfulness.curves[0].y - helpfulness.curves[1].y, 0.25)


def test_gains_are_against_the_root_of_kl_in_spreads_of_the_first_responses(finished: Path):
    run = read_run(finished)
    curves = {curve.label: curve for curve in overoptimisation(run)[0].curves}
    np.testing.assert_allclose(curves["gold, test"].x, np.sqrt(12 * np.array([0, 10, 20, 30, 40]) / 40))
    first = [row["gold"]["helpfulness"] for row in samples_at(0, better_by=0.0) if row["split"] == "test"]
    gain = run.series("eval/test/gold/helpfulness/mean").value
    spread = (sum((score - sum(first) / 12) ** 2 for score in first) / 11) ** 0.5
    np.testing.assert_allclose(curves["gold, test"].y, (gain - gain[0]) / spread)


def test_shares_of_time_add_up_to_the_wall_clock(finished: Path):
    parts = {part.name: part for part in timings(read_run(finished))}
    assert parts["update"].seconds == pytest.approx(41.0)
    assert parts["everything else"].seconds == pytest.approx(250 - 41 * 2.0)
    assert sum(part.share for part in parts.values()) == pytest.approx(1.0)
    assert (parts["update"].rate, parts["update"].memory_mib) == (900.0, 1536.0)  # 20 of the 41 steps are odd
    assert math.isnan(parts["rollout"].rate)


def test_smoothing_keeps_a_straight_line_straight_and_skips_what_is_not_finite():
    line = np.linspace(3.0, 7.0, 50)
    np.testing.assert_allclose(rolling_mean(line, 4), line)
    line[20] = np.nan
    smoothed = rolling_mean(line, 4)
    assert np.flatnonzero(np.isnan(smoothed)).tolist() == [20]
    assert smoothed[19] == pytest.approx(np.nanmean(line[15:24]))


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0.00"), (-0.04, "−0.04"), (1234.5, "1,234"), (3e-5, "3.00e−05"), (math.nan, "not finite")],
)
def test_numbers_are_written_for_reading(value: float, said: str):
    assert number(value) == said


def test_durations_are_written_for_reading():
    assert [duration(seconds) for seconds in (0.5, 42, 250, 3900)] == ["0.5 s", "42 s", "4 min 10 s", "1 h 5 min"]


def test_a_malformed_line_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        build_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_report(tmp_path / "nowhere")


def test_a_page_that_cannot_be_finished_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    former = build_report(tmp_path).read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        build_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == former
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_a_browser_without_network_opens_the_page_from_disk(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=12)
    write_lines(run / "samples/step_000012.jsonl", samples_at(12, better_by=1.0, response=ATTACK))
    page, picture = build_report(run), tmp_path / "page.png"
    assert BROWSER is not None
    options = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars "
    options += "disable-component-update disable-sync window-size=1200,1600 enable-logging=stderr dump-dom "
    options += f"proxy-server=127.0.0.1:9 user-data-dir={tmp_path / 'profile'} screenshot={picture}"
    command = [BROWSER, *(f"--{option}" for option in options.split()), page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # a blocked script, and a request that failed, are reported on the console
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "ERR_" in line]
    assert not said, said
    assert "&lt;script&gt;alert" in done.stdout
    assert "<script" not in done.stdout
    assert size_of_png(picture) == (1200, 1600)


def test_best_of_n_is_drawn_by_its_kl_and_by_n_with_costs_apart(tmp_path: Path):
    gain = "best_of_n/test/gain"
    lines = [
        {"step": n, "best_of_n/kl": math.log(n) - (n - 1) / n, "eval/test/gold/helpfulness/mean": n / 8}
        | {f"{gain}/{name}/{key}": value for name in scores for key, value in (("mean", scores[name]), ("ci95", 0.1))}
        for n, scores in (
            (1, {"objective": 0.0, "gold/helpfulness": 0.0, "gold/cost": 0.0}),
            (4, {"objective": 0.7, "gold/helpfulness": 0.5, "gold/cost": 0.2}),
        )
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    by_kl, by_n, costs = best_of_n(read_run(tmp_path))
    assert [curve.label for curve in by_kl.curves] == ["proxy, the objective", "gold helpfulness"]
    assert [curve.label for curve in costs.curves] == ["gold cost"]
    assert by_kl.curves[0].x.tolist() == pytest.approx([0, 0.636294])
    assert by_n.curves[1].x.tolist() == [0, 2]
    assert by_n.curves[1].y.tolist() == [0, 0.5]
    assert "Gold helpfulness on held-out prompts 0.12 → 0.50" in Page(build_report(tmp_path)).words
    assert {path.stem for path in (tmp_path / "plots").iterdir()} >= {"overview", "best_of_n"}


def test_soups_are_drawn_as_a_path_between_the_single_policies(tmp_path: Path):
    points = [(0.0, 1.0, 1.2, 0.9), (0.5, 0.5, 2.0, 0.6), (1.0, 0.0, 2.2, 0.1), (0.3, 0.7, 1.7, 0.8)]
    lines = [
        {"step": k, "soup/weight/0": one, "soup/weight/1": other}
        | {"eval/test/gold/helpfulness/mean": x, "eval/test/gold/humour/mean": y, "eval/test/gold/humour/ci95": 0.05}
        for k, (one, other, x, y) in enumerate(points)
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    [drawn] = soups(read_run(tmp_path))
    path, mixed, written = drawn.curves
    assert (drawn.x_label, drawn.y_label) == ("gold helpfulness", "gold humour")
    assert list(zip(path.x, path.y, strict=True)) == [(1.2, 0.9), (2.0, 0.6), (2.2, 0.1)]
    assert sorted(zip(mixed.x, mixed.y, strict=True)) == [(1.2, 0.9), (2.2, 0.1)]
    assert list(zip(written.x, written.y, strict=True)) == [(1.7, 0.8)]
    assert soups(read_run(make_run(tmp_path / "other", num_steps=4))) == []


def test_trade_offs_are_drawn_as_asked_against_obtained_and_as_fronts(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=4)
    assert trade_offs(read_run(run)) == []
    rows = [
        {"split": split, "phase": phase}
        | {f"desired_{name}": w + k for k, name in enumerate(("kind", "brief"))}
        | {f"obtained_{name}": phase + w * k for k, name in enumerate(("kind", "brief"))}
        for split in ("test", "other")
        for phase in (0, 1, 2)
        for w in (0.0, 0.5, 1.0)
    ]
    (run / "data").mkdir()
    write_table(rows, run / "data/preference_grid.parquet")
    kind, brief, front = trade_offs(read_run(run))
    assert [curve.label for curve in brief.curves] == ["after the offline part", "after iteration 2", "as asked"]
    assert brief.curves[1].x.tolist() == [1.0, 1.5, 2.0]
    assert brief.curves[1].y.tolist() == [2.0, 2.5, 3.0]
    assert kind.curves[0].y.tolist() == [0.0, 0.0, 0.0]
    assert (front.curves[1].x.tolist(), front.curves[1].y.tolist()) == ([2.0, 2.0, 2.0], [2.0, 2.5, 3.0])


def test_a_run_that_obtains_what_it_is_asked_for_says_how_well():
    assert metric_label("ric/humour/correlation") == "correlation of humour asked for and obtained"
    assert metric_label("ric/humour/correlation_of_means") == "correlation of humour asked for and obtained, over means"
