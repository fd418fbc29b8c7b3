"""Pairs of rollouts or of a generation table, asked once under each preference, become data; nothing is lost."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_lab.console import Console
from rlhf_lab.data.conditions import Preferences
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.generations import FILE, write
from rlhf_lab.data.preferences import Registry
from rlhf_lab.data.tables import read_table, write_table
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.judges.price import Price
from rlhf_lab.records import Verdict
from rlhf_lab.report.run import read_run
from rlhf_lab.report.verdict_plots import verdicts
from rlhf_lab.run import Run
from rlhf_lab.stages.judge_pairs import JudgePairs, verdict_metrics
from rlhf_lab.stages.pair_up import PairUp
from rlhf_lab.stages.rollout_pairs import RolloutPairs
from rlhf_lab.tracking import NoTracker

WORDS = {"helpful": "<helpful>", "humour": "<humour>"}
REGISTRY = Registry(
    dimensions={"substance": ["helpful"], "manner": ["humour"]},
    weights={"helpful": 1.0, "humour": 1.0},
    policy=WORDS,
    reward_model={name: f"<{name} scored>" for name in WORDS},
    judge={name: f"Which is more {name}?" for name in WORDS},
    new_tokens=list(WORDS.values()),
)
PATHS = ModelPaths(
    **dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"),
    new_tokens=list(WORDS.values()),
    learning_rates={},
)
HARDWARE = Hardware(device="cpu", dtype="float32", threads=1)
TABLE = {
    "revision": None,
    "columns": {},
    "template": "auto",
    "max_prompt_tokens": 64,
    "max_response_tokens": 64,
    "bad_rows": "error",
    "on_conflict": "keep",
    "train_size": None,
    "train_split": "train",
    "eval_splits": None,
    "eval_size": 256,
    "hold_out": 0.0,
    "seed": 0,
}


class Longer:
    """A judge that likes the longer response, by words or, for humour, the shorter; it cannot read what says "hm"."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, tuple[str, str]]] = []

    def check(self, criteria, promised=()) -> None:
        if unknown := set(criteria) - WORDS.keys():
            raise ValueError(f"no criterion {unknown}")

    def load(self, hardware, template) -> "Longer":
        return self

    def compare(self, comparisons, criterion) -> list[Verdict]:
        said = []
        for each in comparisons:
            assert each.prompt == each.prompt.plain
            self.asked.append((criterion, each.prompt.request, each.responses))
            first, second = (len(text.split()) * (-1 if criterion == "humour" else 1) for text in each.responses)
            won = 0.5 if first == second else float(first > second)
            read = None if "hm" in " ".join(each.responses).split() else won
            said.append(Verdict(by_order=(won, read), asked=2))
        return said


@pytest.fixture
def ran(tmp_path: Path):
    """`ran(stage, name)` is the run directory of a stage and its metrics."""

    def run_it(stage: Any, name: str) -> tuple[Path, dict[str, float]]:
        stage.check()
        run = Run.open(
            tmp_path / name,
            config={"seed": 0, "keep_checkpoints": 2},
            overrides=[],
            artifacts={},
            tracker=NoTracker(),
            console=Console(),
        )
        try:
            return run.directory, stage.run(run)
        finally:
            run.close()

    return run_it


def judging(path: Path, judge: Any, **changes: Any) -> JudgePairs:
    settings: dict[str, Any] = {
        "criteria": None,
        "conditioned": True,
        "ties": "drop",
        "margin_by": "wins",
        "noise": 0.0,
        "noise_recipe": "exact",
        "pairs_per_shard": 2,
    }
    return JudgePairs(
        model=PATHS,
        dataset=Dataset(path=str(path), **TABLE),  # type: ignore[arg-type]
        judge=judge,
        preferences=REGISTRY,
        hardware=HARDWARE,
        **settings | changes,
    )


def pair(prompt: str, first: str, second: str, preference: str = "helpful") -> dict[str, str]:
    return {"prompt": prompt, "preference": preference, "response_0": first, "response_1": second}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    train = [
        pair("one", "a b", "c"),
        pair("one", "a b", "c", "humour"),
        pair("two", "d", "e f", "helpful+humour"),
        pair("two", "e f", "d"),  # asked already, the other way round
        pair("three", "g", "h"),  # a tie
        pair("four", "i", "hm j"),  # unreadable in one order
        pair("five", "k", "l m"),  # held out
    ]
    write_table(train, folder / "train.parquet")
    write_table([pair("five", "k l", "m"), pair("six", "n", "o p", "humour")], folder / "test.parquet")
    return folder


def test_each_pair_is_asked_once_under_each_preference_and_what_is_left_out_is_counted(pairs, ran):
    judge = Longer()
    run, metrics = ran(judging(pairs, judge), "judged")
    train = read_table(run / "data/train.parquet")
    assert Counter((r["prompt"], r["condition"], (r["response_0"], r["response_1"])[r["better"]]) for r in train) == {
        ("one", "<helpful scored>", "a b"): 1,
        ("one", "<humour scored>", "c"): 1,
        ("two", "<helpful scored>", "e f"): 1,
        ("two", "<humour scored>", "d"): 1,
    }
    assert {name.rpartition("/")[2]: value for name, value in metrics.items() if name.startswith("train/left_out")} == {
        "held_out": 1,
        "repeated": 1,
        "unreadable": 1,
        "tied": 1,
    }
    assert len(read_table(run / "verdicts/train.parquet")) == 6
    assert len(judge.asked) == len(set(judge.asked)) == 6 + 2
    held_out = {file.stem: len(read_table(file)) for file in (run / "data").glob("test*")}
    assert held_out == {"test": 2, "test_helpful": 1, "test_humour": 1}
    assert metrics["verdicts/train/helpful/unreadable"] == 1


def test_preferences_that_are_named_judge_every_pair_and_noise_is_for_training(pairs, ran):
    run, metrics = ran(judging(pairs, Longer(), criteria=["humour"], conditioned=False, noise=1.0), "named")
    train, test = (read_table(run / f"data/{name}.parquet") for name in ("train", "test"))
    assert {row["prompt"]: (row["response_0"], row["response_1"])[row["better"]] for row in train} == {
        "one": "a b",
        "two": "e f",
    }
    assert all(row["better"] == 1 - row["clean_better"] for row in train)
    assert [row["better"] == row["clean_better"] for row in test] == [True, True]
    assert metrics["train/left_out/repeated"] == 2
    assert metrics["test/left_out/repeated"] == 0
    assert "condition" not in train[0]
    assert not (run / "data/test_humour.parquet").exists()


def test_what_was_judged_before_a_kill_is_not_asked_again(pairs, ran):
    first, again = Longer(), Longer()
    run, _ = ran(judging(pairs, first), "killed")
    made = (run / "data/train.parquet").read_bytes()
    (run / "shards/train_0001/rows.parquet").unlink()
    ran(judging(pairs, again), "killed")
    assert again.asked == first.asked[2:4]
    assert (run / "data/train.parquet").read_bytes() == made


def test_its_data_are_what_a_reward_model_of_preferences_reads(pairs, ran):
    run, _ = ran(judging(pairs, Longer(), ties="keep"), "read")
    words = list(REGISTRY.wordings["reward_model"].values())
    template = Template(load_tokenizer("embedded:tiny", [w for word in words for w in word.split()]), "auto")
    records = Dataset(path=str(run / "data"), **TABLE).preferences("train", template)  # type: ignore[arg-type]
    told = [(r.prompt.request, r.prompt.condition, r.chosen, r.margin) for r in records if r.prompt.request != "two"]
    assert sorted(told) == [
        ("one", "<helpful scored>", "a b", 1.0),
        ("one", "<humour scored>", "c", 1.0),
        ("three", "<helpful scored>", "g", 0.0),
        ("three", "<helpful scored>", "h", 0.0),
    ]


def test_measures_of_a_judge_that_always_prefers_what_it_sees_first():
    rows = [
        {"id": f"p{i // 2}", "preference": "x", "wins_shown_first": 1.0, "wins_shown_second": 0.0, "wins": 0.5}
        for i in range(6)
    ]
    fair = [{**row, "preference": "y", "wins_shown_second": 1.0, "wins": 1.0} for row in rows]
    metrics = verdict_metrics(rows + fair)
    assert [metrics[f"x/{key}/mean"] for key in ("first_shown", "consistent", "tied")] == [1.0, 0.0, 1.0]
    assert [metrics[f"y/{key}/mean"] for key in ("first_shown", "consistent", "tied")] == [0.5, 1.0, 0.0]
    assert metrics["y/consistent/ci95"] == 0.0
    half_read = [{**rows[0], "wins_shown_second": None, "wins": None}]
    assert verdict_metrics(half_read)["x/first_shown/mean"] == 1.0
    assert "x/consistent/mean" not in verdict_metrics(half_read)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": ["funny"]}, "'funny' is no preference"),
        ({"criteria": []}, "expected different preferences, or null"),
        ({"criteria": ["humour", "helpful"], "conditioned": False}, "would contradict each other"),
        ({"conditioned": False}, "would contradict each other"),
    ],
)
def test_refuses_before_anything_is_loaded(pairs, changes, message):
    with pytest.raises(ValueError, match=message):
        judging(pairs, Longer(), **changes).check()


def test_what_is_priced_beforehand_is_what_is_asked_piece_by_piece(pairs, ran):
    class Priced(Longer):
        def __init__(self) -> None:
            super().__init__()
            self.priced, self.judged = list[Any](), list[Any]()

        def price(self, comparisons, criterion) -> Price:
            self.priced.append((criterion, comparisons))
            return Price()

        def compare(self, comparisons, criterion) -> list[Verdict]:
            self.judged.append((criterion, comparisons))
            return super().compare(comparisons, criterion)

    judge = Priced()
    ran(judging(pairs, judge), "priced")
    assert judge.priced == judge.judged
    assert len(judge.priced) > 4  # not one for each preference


def test_a_pair_that_does_not_say_its_preference_is_refused(tmp_path, ran):
    file = tmp_path / "own.jsonl"
    rows = [{"prompt": "one", "response_0": "a", "response_1": "b c"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"row 0: the pair does not say .* stage.criteria="):
        ran(judging(file, Longer()), "unsaid")


def rollouts(world, **changes: Any) -> RolloutPairs:
    settings: dict[str, Any] = {"told": ["humour", "helpful"], "samples_per_prompt": 2, "pairing": "all"}
    return RolloutPairs(
        model=PATHS,
        dataset=world(train_size=6, train_split="preferences", eval_splits=["preferences_test"], eval_size=3),
        conditions=Preferences(REGISTRY, "subset"),
        sampling=Sampling(max_new_tokens=6, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=64),
        hardware=HARDWARE,
        prompts_per_shard=5,
        **settings | changes,
    )


def test_rollouts_are_pairs_under_each_preference_and_a_kill_changes_nothing(world, ran):
    run, metrics = ran(rollouts(world, samples_per_prompt=3), "rollouts")
    rows = read_table(run / "data/train.parquet")
    assert metrics["train/pairs"] + sum(v for k, v in metrics.items() if "train/left_out" in k) == 6 * 2 * 3
    asked = {(row["id"], row["preference"], row["told"]) for row in rows}
    assert {(name, told) for _, name, told in asked} == {("humour", "<humour>"), ("helpful", "<helpful>")}
    assert len({row["id"] for row in rows}) == 6
    assert all(row["response_0"] != row["response_1"] and row["sample_0"] < row["sample_1"] for row in rows)
    assert {"gold_helpfulness_0", "gold_humour_1", "finished_0", "tokens_1"} <= rows[0].keys()
    made = (run / "data/train.parquet").read_bytes()
    (run / "shards/preferences_0001/rows.parquet").unlink()
    ran(rollouts(world, samples_per_prompt=3), "rollouts")
    assert (run / "data/train.parquet").read_bytes() == made


def test_drawn_preferences_are_named_as_the_registry_reads_them(world, ran):
    run, _ = ran(rollouts(world, told=None), "drawn")
    rows = read_table(run / "data/train.parquet")
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["told"] == REGISTRY.words(REGISTRY.held(row["preference"]), "policy") for row in rows)
    judged, _ = ran(judging(run / "data", Longer(), ties="coin"), "drawn_judged")
    sampled = {row["id"]: row["preference"] for row in rows}
    said = read_table(judged / "verdicts/train.parquet")
    assert all(row["preference"] in sampled[row["id"]] for row in said)
    assert len(said) == sum(name.count("+") + 1 for name in sampled.values())


def test_rollouts_refuse_unknown_preferences_one_sample_and_greedy_sampling(world):
    with pytest.raises(ValueError, match=r"names 'wit', but the conditions are \['helpful'"):
        rollouts(world, told=["wit"]).check()
    with pytest.raises(ValueError, match="a pair needs 2 or more"):
        rollouts(world, samples_per_prompt=1).check()


def test_a_generation_table_becomes_pairs_split_by_prompt(tmp_path, ran):
    rows = [
        {
            "split": "test",
            "condition": condition,
            "prompt_id": f"p{i:02d}",
            "prompt": f"ask {i}",
            "sample": sample,
            "response": f"r{sample}",
            "finished": True,
            "tokens": sample,
            "gold_worth": float(i + sample),
        }
        for condition in ("", "<helpful> <humour>")
        for i in range(40)
        for sample in range(4)
    ]
    write(tmp_path / FILE, rows, {})
    stage = PairUp(
        generations=str(tmp_path / FILE), preferences=REGISTRY, train_split=None, hold_out=0.25, pairing="once"
    )
    run, metrics = ran(stage, "paired")
    train, test = (read_table(run / f"data/{name}.parquet") for name in ("train", "test"))
    assert len(train) + len(test) == metrics["train/pairs"] + metrics["test/pairs"] == 2 * 40 * 2
    assert not {row["id"] for row in train} & {row["id"] for row in test}
    assert 0 < len({row["id"] for row in test}) < 20
    assert {(row["told"], row["preference"]) for row in train} == {("", ""), ("<helpful> <humour>", "helpful+humour")}
    for row in train:
        assert row["gold_worth_1"] - row["gold_worth_0"] == row["tokens_1"] - row["tokens_0"] == 1
    with pytest.raises(ValueError, match=r"has the splits \['test'\], stage.train_split=other"):
        ran(
            PairUp(
                generations=str(tmp_path / FILE), preferences=REGISTRY, train_split="other", hold_out=0.1, pairing="all"
            ),
            "no",
        )


def test_the_page_shows_each_preference_of_each_split(pairs, ran):
    directory, _ = ran(judging(pairs, Longer(), ties="coin"), "drawn")
    panels = {panel.title: panel for panel in verdicts(read_run(directory))}
    tied = panels["Ties, of both orders together"]
    assert [name for _, name in tied.ticks] == ["helpful", "humour"]
    by_split = {curve.label: curve.y.tolist() for curve in tied.curves if curve.kind == "estimates"}
    assert by_split == {"train": [pytest.approx(1 / 3), 0.0], "test": [0.0, 0.0]}  # "hm j" could not be read
    assert verdicts(replace(read_run(directory), metrics={0: {"train/pairs": 1.0}})) == []
