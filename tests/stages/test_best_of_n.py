"""What is reported of the best of n is what its table says; what was sampled before a kill is not sampled again."""

import json
from itertools import combinations
from statistics import fmean

import pytest
import torch

from rlhf_lab.console import Console
from rlhf_lab.data.conditions import NoConditions
from rlhf_lab.data.tables import prompt_of, read_table
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.objectives import WeightedSum
from rlhf_lab.run import Run
from rlhf_lab.stages.best_of_n import BestOfN
from rlhf_lab.tracking import NoTracker
from rlhf_lab.types import Score

PATHS = ModelPaths(**dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={})
DATA = {"train_size": 4, "eval_splits": ["test", "ood_items"], "eval_size": 5}
SAMPLING = {"max_new_tokens": 8, "min_new_tokens": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "batch_size": 64}
N = 6
PLAIN = NoConditions()


class Vowels:
    """An ensemble of two: how many a's and how many e's; it is worth the former less the latter."""

    def __init__(self):
        self.asked = 0

    def check(self, promised=()): ...

    def load(self, hardware, policy):
        return self

    def score(self, rollout):
        self.asked += len(rollout)
        members = torch.tensor([[float(text.count(v)) for v in "ae"] for text in rollout.responses])
        return Score(value=members[:, 0] - members[:, 1], members=members)


@pytest.fixture
def best_of_n(tmp_path, world):
    """`best_of_n(source)` is the run directory and the last metrics."""

    def sample(source, name="run", weight=1.0, samples=N, sampling=(), prompts=4, conditions=PLAIN, **data):
        stage = BestOfN(
            model=PATHS,
            dataset=world(**{**DATA, **data}),
            rewards={"vowels": source},
            objective=WeightedSum({"vowels": weight}),
            sampling=Sampling(**{**SAMPLING, **dict(sampling)}),
            hardware=Hardware(device="cpu", dtype="float32", threads=1),
            samples_per_prompt=samples,
            prompts=prompts,
            prompts_per_shard=3,
            tokens_at_once=4096,
            conditions=conditions,
        )
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

    return sample


def by_prompt(directory, split):
    """Rows of a split, prompt by prompt, in the order in which they were drawn."""
    found = {}
    for row in read_table(directory / "data/generations.parquet"):
        if row["split"] == split:
            found.setdefault(row["prompt_id"], []).append(row)
    return list(found.values())


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_every_curve_is_the_mean_over_all_subsets_of_the_table(best_of_n, weight):
    directory, metrics = best_of_n(Vowels(), weight=weight)
    columns = {"objective": "objective", "rewards/vowels": "score_vowels", "gold/helpfulness": "gold_helpfulness"}
    for split in ("test", "ood_items"):
        prompts = by_prompt(directory, split)
        assert [len(rows) for rows in prompts] == [N] * 4
        for n in (1, 2, 4, N):
            for name, column in columns.items():
                expected = fmean(
                    max(drawn, key=lambda row: (weight * row["score_vowels"], row["sample"]))[column]
                    for rows in prompts
                    for drawn in combinations(rows, n)
                )
                assert metrics[f"best_of_n/{n}/{split}/{name}/mean"] == pytest.approx(expected, abs=1e-6)
                gain = metrics[f"best_of_n/{n}/{split}/{name}/mean"] - metrics[f"best_of_n/1/{split}/{name}/mean"]
                assert metrics[f"best_of_n/{n}/{split}/gain/{name}/mean"] == pytest.approx(gain, abs=1e-9)
    assert metrics["best_of_n/2/kl"] == pytest.approx(0.193147, abs=1e-6)


def test_the_table_keeps_the_members_and_belongs_to_its_response(best_of_n):
    directory, _ = best_of_n(Vowels())
    rows = read_table(directory / "data/generations.parquet")
    assert len({row["response"] for row in rows}) > len(rows) / 2
    for row in rows:
        assert row["members_vowels"] == [row["response"].count("a"), row["response"].count("e")]
        assert row["score_vowels"] == row["objective"] == row["members_vowels"][0] - row["members_vowels"][1]
        assert row["kl_k1"] == pytest.approx(0, abs=1e-4)  # the reference is the policy
        assert row["gold_humour"] == 0


def test_the_best_is_the_response_with_the_highest_objective(best_of_n):
    directory, metrics = best_of_n(Vowels())
    best = {(row["split"], row["prompt_id"]): row for row in read_table(directory / "data/best.parquet")}
    assert len(best) == 8
    for split in ("test", "ood_items"):
        prompts = by_prompt(directory, split)
        for rows in prompts:
            chosen = best[split, rows[0]["prompt_id"]]
            assert chosen["objective"] == max(row["objective"] for row in rows)
            assert chosen["response"] == rows[chosen["sample"]]["response"]
        gold = fmean(best[split, rows[0]["prompt_id"]]["gold_helpfulness"] for rows in prompts)
        assert metrics[f"eval/{split}/gold/helpfulness/mean"] == pytest.approx(gold, abs=1e-6)


def test_what_was_sampled_before_a_kill_is_not_sampled_again(best_of_n):
    directory, metrics = best_of_n(Vowels())
    tables = {path: path.read_bytes() for path in (directory / "data").iterdir()}
    (directory / "shards/ood_items_0001/rows.parquet").unlink()
    again = Vowels()
    assert best_of_n(again) == (directory, metrics)
    assert again.asked == N  # the second shard holds the fourth prompt alone
    assert {path: path.read_bytes() for path in tables} == tables


def test_every_condition_is_a_split_of_its_own_and_reaches_the_table(best_of_n):
    class Told:
        """Each request plainly, and told to be brief."""

        streams, new_tokens = ("vowels",), ()

        def check(self, template): ...

        def drawn(self, prompts, seed):
            raise AssertionError("nothing is trained here")

        def evaluated(self, prompts):
            return {"": list(prompts), "brief": [p.conditioned("please be brief", {"vowels": 2.0}) for p in prompts]}

    directory, metrics = best_of_n(Vowels(), conditions=Told(), eval_splits=["test"])
    rows = {split: by_prompt(directory, split) for split in ("test", "test:brief")}
    plain, told = ([prompt[0] for prompt in each] for each in rows.values())
    assert [row["prompt_id"] for row in plain] == [row["prompt_id"] for row in told]
    assert ({row["condition"] for row in plain}, {row["condition"] for row in told}) == ({""}, {"please be brief"})
    assert [row["response"] for row in plain] != [row["response"] for row in told]
    assert f"best_of_n/{N}/test:brief/gold/helpfulness/mean" in metrics
    assert {row["condition"] for row in read_table(directory / "data/best.parquet")} == {"", "please be brief"}


def test_samples_beyond_one_block_are_new_ones(best_of_n, monkeypatch):
    monkeypatch.setattr("rlhf_lab.stages.best_of_n.SAMPLES_AT_ONCE", 4)
    directory, _ = best_of_n(Vowels(), samples=7)
    for rows in by_prompt(directory, "test"):
        assert [row["sample"] for row in rows] == list(range(7))
        assert {row["response"] for row in rows[:4]}.isdisjoint(row["response"] for row in rows[4:])


def test_a_training_split_may_be_sampled(best_of_n):
    directory, metrics = best_of_n(Vowels(), eval_splits=["train"])
    assert {row["split"] for row in read_table(directory / "data/best.parquet")} == {"train"}
    assert "best_of_n/1/train/objective/mean" in metrics


def test_prompts_of_several_turns_keep_them_and_their_ids(best_of_n, world, tmp_path):
    talk = ["how do i mix", "the bread", "and the egg ?"]
    asked = [{"prompt": prompt} for prompt in ("hello", "thanks", "how do i cook", talk, talk[:1])]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*asked, asked[0]]))
    table = {"path": str(tmp_path / "asked.jsonl"), "train_size": None, "eval_splits": ["train"], "bad_rows": "drop"}
    directory, _ = best_of_n(Vowels(), prompts=5, **table)  # shards of 3, so the first has single turns only
    expected = {prompt_of(row["prompt"]).id for row in asked}
    for name in ("best", "generations"):
        file = directory / f"data/{name}.parquet"
        assert {row["prompt_id"] for row in read_table(file)} == expected
        assert world(**{**table, "path": str(file)}).prompt_ids("train") == expected
    shown = [json.loads(line) for line in (directory / "samples/step_000001.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in shown} == {"hello", "thanks", "how do i cook", "and the egg ?", "how do i mix"}
    assert "dropped 1 of 6 rows" in (directory / "warnings.jsonl").read_text()


def test_refusals(best_of_n):
    with pytest.raises(ValueError, match=r"objective reads \['vowels'\], but the reward sources are \[\]"):
        best_of_n(None)
    with pytest.raises(ValueError, match=r"sampling.temperature=0 draws one response N times"):
        best_of_n(Vowels(), sampling={"temperature": 0.0})
    with pytest.raises(ValueError, match=r"dataset.eval_splits is empty"):
        best_of_n(Vowels(), eval_splits=[])
