"""Arena, win rates and human sheets on policies that are sampled and on tables: joined by id, mirrored, resumed."""

import csv
import json

import pytest

from rlhf_lab.console import Console
from rlhf_lab.data import generations
from rlhf_lab.data.conditions import NoConditions
from rlhf_lab.data.generations import Generations
from rlhf_lab.data.tables import read_table
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Prompt, Verdict
from rlhf_lab.run import Run
from rlhf_lab.stages.arena import Arena
from rlhf_lab.stages.contestants import Contestants, names_of
from rlhf_lab.stages.human_ratings import HumanRatings
from rlhf_lab.stages.human_sheet import HumanSheet
from rlhf_lab.stages.win_rates import WinRates
from rlhf_lab.tracking import NoTracker

PATHS = ModelPaths(**dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={})
SAMPLING = {"max_new_tokens": 6, "min_new_tokens": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "batch_size": 64}
CPU = Hardware(device="cpu", dtype="float32", threads=1)
RATED = {"anchor": None, "anchor_rating": 1000.0, "virtual_ties": 1.0, "draws": 20, "length_control": True}


class LikesLong:
    """The longer response wins; shown second, a tie that is none wins too. Counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def check(self, criteria, promised=()):
        assert set(criteria) <= {"long", "short"}

    def load(self, hardware, template):
        return self

    def compare(self, comparisons, criterion):
        self.asked += len(comparisons)
        verdicts = []
        for each in comparisons:
            first, second = (len(text) for text in each.responses)
            wins = 0.5 if first == second else float((first > second) == (criterion == "long"))
            unread = each.prompt.request == "unreadable"
            verdicts.append(Verdict(by_order=(wins, None if unread else wins), asked=2, reasons=("because", "")))
        return verdicts


@pytest.fixture
def run_stage(tmp_path):
    """`run_stage(stage, name)` is the run directory and the metrics."""

    def go(stage, name):
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
            return tmp_path / name, stage.run(run)
        finally:
            run.close()

    return go


@pytest.fixture
def contestants(world):
    """`contestants(*policies)` with few prompts of the embedded world."""

    def make(*policies, **changes):
        settings = {
            "names": None,
            "splits": ["test"],
            "prompts": None,
            "samples_per_prompt": 1,
            "unmatched": "error",
            "model": PATHS,
            "dataset": world(train_size=4, eval_splits=["test", "ood_items"], eval_size=6),
            "conditions": NoConditions(),
            "evaluation_sampling": Sampling(**SAMPLING),
            "hardware": CPU,
            "prompts_per_shard": 4,
        }
        return Contestants(policies=[str(policy) for policy in policies], **{**settings, **changes})

    return make


@pytest.fixture
def table(tmp_path):
    """`table(name, texts)`: a generation table with the responses to each request, and their lengths as a score."""

    def write(name, texts, condition=""):
        rows = [
            {
                "split": "test",
                "condition": condition,
                "prompt_id": Prompt.from_text(request).id,
                "prompt": request,
                "sample": sample,
                "response": text,
                "score_length": float(len(text)),
                "gold_cost": float(text.count("!")),
            }
            for request, each in texts.items()
            for sample, text in enumerate(each)
        ]
        generations.write(tmp_path / f"{name}.parquet", rows, {})
        return tmp_path / f"{name}.parquet"

    return write


def arena(contestants, **changes):
    settings = {"rewards": None, "reward": "column/score_length", "cost": "column/gold_cost", "safe_up_to": 0.0}
    return Arena(contestants=contestants, model=PATHS, hardware=CPU, pairs_per_shard=2, **{**settings, **changes})


def judged(contestants, judge, **changes):
    settings = {"criteria": ["long"], "combinations": {}, "against": None, **RATED}
    return WinRates(
        contestants=contestants, model=PATHS, judge=judge, hardware=CPU, pairs_per_shard=4, **{**settings, **changes}
    )


OLD = {"a": ["one"], "b": ["three!"], "c": ["word"]}
NEW = {"c": ["word"], "a": ["seven"], "b": ["two"]}


def test_an_arena_of_tables_joins_by_id_and_mirrors(contestants, table, run_stage):
    old, new = table("old", OLD), table("new", NEW)
    directory, found = run_stage(arena(contestants(old, new, names=["old", "new"])), "run")
    assert found["arena/test/win_rate/mean"] == pytest.approx(0.5)
    assert found["arena/test/count/better_safe"] == found["arena/test/count/worse_safe"] == 1
    assert found["arena/test/baseline_unsafe/challenger_safe/count"] == 1
    assert found["arena/test/baseline_unsafe/challenger_safe/win_rate/mean"] == 0
    assert found["arena/test/reward_difference/mean"] == pytest.approx((2 - 3 + 0) / 3)
    with (directory / "comparisons.csv").open() as file:
        rows = {row["prompt"]: row for row in csv.DictReader(file)}
    assert (rows["b"]["baseline_response"], rows["b"]["challenger_response"]) == ("three!", "two")
    assert (rows["b"]["baseline_cost"], rows["b"]["challenger_reward"]) == ("1.0", "3.0")
    told = json.loads((directory / "arena.json").read_text())
    assert (told["baseline"], told["splits"]["test"]["cost"]["old"]["mean"]) == ("old", pytest.approx(1 / 3))
    _, other = run_stage(arena(contestants(new, old, names=["new", "old"])), "other")
    assert other["arena/test/reward_difference/mean"] == -found["arena/test/reward_difference/mean"]
    assert other["arena/test/baseline_safe/challenger_unsafe/win_rate/mean"] == 1


def test_tables_that_do_not_match_are_refused_with_counts(contestants, table, run_stage):
    few = table("few", {"a": ["one"]})
    with pytest.raises(ValueError, match=r"unmatched are 2 of 3 by new \(first: prompt"):
        run_stage(arena(contestants(few, table("new", NEW))), "run")
    directory, found = run_stage(arena(contestants(few, table("new", NEW), unmatched="drop")), "dropping")
    assert found["arena/test/prompts"] == 1
    assert (
        "2 of 3 responses of new answer what others were not asked; left out"
        in (directory / "warnings.jsonl").read_text()
    )
    with pytest.raises(ValueError, match=r"fewer than contestants.samples_per_prompt=2 responses to 1 of 1 pro"):
        run_stage(arena(contestants(few, few, names=["x", "y"], samples_per_prompt=2)), "more")


def test_policies_are_sampled_alike_kept_as_tables_and_not_sampled_again(contestants, run_stage, monkeypatch):
    both = contestants("embedded:tiny", "embedded:tiny", names=["x", "y"], samples_per_prompt=2)
    stage = arena(both, reward="gold/helpfulness", cost="gold/cost")
    directory, found = run_stage(stage, "run")
    assert found["arena/test/win_rate/mean"] == 0.5  # the same random numbers, the same policy
    assert found["arena/test/prompts"] == 6
    table = Generations.open(directory / "generations/y.parquet")
    assert (table.num_rows, table.num_samples("test")) == (12, 2)
    monkeypatch.setattr("rlhf_lab.stages.contestants.Generator.generate", None)
    assert run_stage(stage, "run") == (directory, found)
    again = contestants(directory / "generations/x.parquet", directory / "generations/y.parquet", samples_per_prompt=2)
    _, from_tables = run_stage(arena(again, reward="gold/helpfulness", cost="gold/cost"), "tables")
    assert from_tables["arena/test/reward/x/mean"] == found["arena/test/reward/x/mean"]


def test_as_many_prompts_as_asked_for_the_same_of_everybody(contestants, table, run_stage):
    texts = {f"request {i}": ["x" * i] for i in range(20)}
    turned = dict(reversed(texts.items()))
    _, found = run_stage(arena(contestants(table("one", texts), table("two", turned), prompts=7)), "run")
    assert found["arena/test/prompts"] == 7
    assert found["arena/test/win_rate/mean"] == 0.5


def test_prompts_are_drawn_from_those_that_all_share(contestants, table, run_stage, world):
    dataset = world(train_size=4, eval_splits=["test"], eval_size=40)
    template = Template(load_tokenizer("embedded:tiny"), dataset.template_style)
    some = {prompt.request: ["yes"] for prompt in dataset.prompts("test", template)[::4]}
    assert len(some) == 10
    changes = {"prompts": 5, "unmatched": "drop", "dataset": dataset, "names": ["policy", "table"]}
    both = contestants("embedded:tiny", table("some", some | {"another": ["no"]}), **changes)
    directory, found = run_stage(arena(both, reward="gold/helpfulness", cost="gold/cost"), "run")
    assert found["arena/test/prompts"] == 5
    assert Generations.open(directory / "generations/policy.parquet").num_rows == 5  # and no other is sampled


def test_win_rates_by_criterion_and_combination(contestants, table, run_stage):
    more = {**OLD, "unreadable": ["same"]}
    old, new = table("old", more), table("new", {**NEW, "unreadable": ["longer"]})
    both = contestants(old, new, names=["old", "new"])
    judge = LikesLong()
    directory, found = run_stage(judged(both, judge, combinations={"any": ["long", "short"]}), "run")
    assert judge.asked == 8
    assert found["win_rate/test/long/old/new/mean"] == pytest.approx(0.5)
    assert found["win_rate/test/long/old/new/excluded"] == 1
    assert found["win_rate/test/any/old/new/ties"] == 3
    assert found["verdicts/test/long/first_shown/mean"] == 0.5
    assert found["rating/test/long/old/mean"] == 1000
    rows = read_table(directory / "data/verdicts.parquet")
    of_a = next(row for row in rows if row["prompt_id"] == Prompt.from_text("a").id and row["criterion"] == "long")
    assert (of_a["first"], of_a["wins"], of_a["longer"], of_a["reason_first"]) == ("old", 0, -2, "because")
    (directory / "shards/verdicts_0001/rows.parquet").unlink()
    again = LikesLong()
    assert run_stage(judged(both, again, combinations={"any": ["long", "short"]}), "run") == (directory, found)
    assert again.asked == 4
    assert "2 of 8 verdicts could not be read" in (directory / "warnings.jsonl").read_text()


def test_three_contestants_all_against_all_or_against_one(contestants, table, run_stage):
    sizes = {name: {f"q{i}": ["x" * size] for i in range(4)} for name, size in (("s", 1), ("m", 2), ("l", 3))}
    three = contestants(*(table(name, texts) for name, texts in sizes.items()), names=["s", "m", "l"])
    _, found = run_stage(judged(three, LikesLong()), "run")
    assert found["win_rate/test/long/s/l/mean"] == 0
    points = [found[f"rating/test/long/{name}/mean"] for name in ("s", "m", "l")]
    assert points == sorted(points)
    judge = LikesLong()
    _, found = run_stage(judged(three, judge, against="s"), "against")
    assert judge.asked == 8
    assert {name.split("/")[3:5][0] for name in found if name.startswith("win_rate")} == {"m", "l"}


def test_sheets_go_out_and_come_back(contestants, table, run_stage, tmp_path):
    both = contestants(table("old", OLD), table("new", NEW), names=["old", "new"])
    made, found = run_stage(
        HumanSheet(contestants=both, criteria={"long": "Which is longer?"}, raters=2, most=1, ties=False), "sheet"
    )
    assert (found["human/items"], found["human/equal"]) == (2, 1)
    files = []
    for rater in ("rater_1", "rater_2"):
        with (made / f"sheets/{rater}.csv").open(encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["long"] = "1" if len(row["response_b"]) > len(row["response_a"]) else "-1"
        files.append(str(tmp_path / f"filled_{rater}.csv"))
        with open(files[-1], "w") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    verdicts, _ = run_stage(judged(both, LikesLong()), "judged")
    settings = {"key": str(made), "missing": "error", "verdicts": str(verdicts), **RATED}
    directory, found = run_stage(HumanRatings(ratings=files, **settings), "human")
    assert found["win_rate/test/long/old/new/mean"] == 0.5
    assert found["agreement/long/alpha/mean"] == found["judge_agreement/long/raters/mean"] == 1
    assert {row["rater"] for row in read_table(directory / "data/ratings.parquet")} == {"rater_1", "rater_2"}
    with pytest.raises(ValueError, match="2 of 4 ratings are missing"):
        HumanRatings(ratings=files[:1], **settings).check()
    with pytest.raises(ValueError, match=r"holds no key.parquet; name the run of stage=human_sheet"):
        HumanRatings(ratings=files, **{**settings, "key": str(tmp_path)}).check()


def test_names_come_from_what_tells_paths_apart():
    assert names_of(["runs/a0/sft/policy", "runs/ppo/generations.parquet"]) == ["sft", "ppo"]
    assert names_of(["tables/old.parquet", "embedded:tiny"]) == ["old", "embedded:tiny"]
    assert names_of(["runs/one/sft/policy", "runs/two/sft/policy"]) == ["one.sft", "two.sft"]
    with pytest.raises(ValueError, match="names one twice"):
        names_of(["runs/a", "runs/a"])


def test_refusals(contestants, table):
    one, two = table("one", OLD), table("two", NEW)
    with pytest.raises(ValueError, match=r"arena has two sides, contestants.policies names 3"):
        arena(contestants(one, two, "embedded:tiny"))
    with pytest.raises(ValueError, match=r"stage.reward=helpful, but the reward sources are \[\]; name one of them"):
        arena(contestants(one, two), reward="helpful").check()
    with pytest.raises(ValueError, match=r"contestants.splits has 'ood', but .*one.parquet has \['test'\]"):
        contestants(one, two, splits=["ood"]).check()
    with pytest.raises(ValueError, match=r"contestants.names=\['x', 'x'\]; expected 2 different ones"):
        contestants(one, two, names=["x", "x"])
    with pytest.raises(ValueError, match=r"takes two or more"):
        contestants(one)
    with pytest.raises(ValueError, match=r"stage.anchor=me, but the contestants are"):
        judged(contestants(one, two), LikesLong(), anchor="me")
    with pytest.raises(ValueError, match=r"stage.combinations.x=\['long'\]; it takes two criteria"):
        judged(contestants(one, two), LikesLong(), combinations={"x": ["long"]})
