"""Scores land beside the response that they are of, in every kind of table; what was scored is not scored again."""

import json
import statistics

import pytest
import torch

from rlhf_lab.console import Console
from rlhf_lab.data.dataset import WORLD, Dataset
from rlhf_lab.data.tables import read_table
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.run import Run
from rlhf_lab.stages.score_table import ScoreTable
from rlhf_lab.tracking import NoTracker
from rlhf_lab.types import Score

PATHS = ModelPaths(**dict.fromkeys(("base", "policy", "reference", "critic"), "embedded:tiny"), learning_rates={})
DATA = {
    "revision": None,
    "columns": {},
    "template": "auto",
    "max_prompt_tokens": 64,
    "max_response_tokens": 64,
    "bad_rows": "drop",
    "on_conflict": "keep",
    "train_size": None,
    "train_split": "train",
    "eval_splits": None,
    "eval_size": 256,
    "hold_out": 0.0,
    "seed": 0,
}
PAIRS = [
    {"prompt": "one", "response_0": "a", "response_1": "b c", "better": 1, "note": 7},
    {"prompt": "two", "response_0": "", "response_1": "d", "better": 0, "note": 8},
    {"prompt": "three", "response_0": "e f g", "response_1": "h", "better": 0, "note": 9},
]


class Words:
    """Counts the words of a prompt and of its response, and how often it was asked."""

    def __init__(self):
        self.asked = 0

    def check(self, promised=()): ...

    def load(self, hardware, policy):
        return self

    def score(self, rollout):
        self.asked += len(rollout)
        pairs = zip(rollout.prompts, rollout.responses, strict=True)
        value = torch.tensor([100.0 * len(prompt.request) + len(text.split()) for prompt, text in pairs])
        return Score(value=value, members=value[:, None])


@pytest.fixture
def scored(tmp_path):
    """`scored(rows, reads)` is the run directory after scoring `rows` by `source`."""

    def score(rows, reads, source, name="run", standardised_by=None, **data):
        table = tmp_path / "rows.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = Dataset(**{**DATA, "path": str(table), **data})
        hardware = Hardware(device="cpu", dtype="float32", threads=1)
        stage = ScoreTable(
            model=PATHS,
            dataset=dataset,
            rewards={"words": source},
            hardware=hardware,
            reads=reads,
            standardised_by=standardised_by,
            rows_per_shard=2,
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
            stage.run(run)
        finally:
            run.close()
        return tmp_path / name

    return score


def test_pairs_get_a_column_a_side_and_keep_their_own(scored):
    run = scored(PAIRS, "preferences", Words())
    rows = read_table(run / "data/train.parquet")
    assert [row["note"] for row in rows] == [7, 9]  # the pair with an empty response is dropped
    assert [(row["score_words_0"], row["score_words_1"]) for row in rows] == [(301, 302), (503, 501)]
    assert {**PAIRS[0], "score_words_0": 301, "score_words_1": 302} == rows[0]


def test_sides_that_are_named_and_demonstrations(scored):
    sided = [{"prompt": "one", "chosen": "a b", "rejected": "c"}]
    [row] = read_table(scored(sided, "preferences", Words(), "sided") / "data/train.parquet")
    assert (row["score_words_chosen"], row["score_words_rejected"]) == (302, 301)
    told = [{"q": "four", "response": "a b c"}]
    run = scored(told, "demonstrations", Words(), "told", columns={"prompt": "q"})
    assert read_table(run / "data/train.parquet") == [{"q": "four", "response": "a b c", "score_words": 403}]


def test_the_embedded_world_becomes_a_table(scored):
    run = scored([], "demonstrations", Words(), path=WORLD, train_size=5, eval_splits=["sft_test"], eval_size=3)
    sizes = {path.stem: len(read_table(path)) for path in (run / "data").iterdir()}
    assert sizes == {"train": 5, "sft_test": 3}
    for row in read_table(run / "data/train.parquet"):
        assert row["score_words"] == 100 * len(row["prompt"]) + len(row["response"].split())


def test_statistics_are_those_of_all_responses_of_the_training_split(scored):
    run = scored(PAIRS, "preferences", Words())
    values = [301, 302, 503, 501]
    found = json.loads((run / "statistics.json").read_text())["words"]
    assert found == pytest.approx({"mean": statistics.mean(values), "sd": statistics.pstdev(values), "count": 4})


def test_other_splits_and_other_tables_are_standardised_by_the_training_split(scored, tmp_path):
    """RiC divides by the spread of what it learns from, wherever a score is read."""
    world = {"path": WORLD, "train_size": 20, "eval_splits": ["sft_test"], "eval_size": 6}
    run = scored([], "demonstrations", Words(), standardised_by="train", **world)
    train, test = (read_table(run / f"data/{name}.parquet") for name in ("train", "sft_test"))
    scores = [row["score_words"] for row in train]
    mean, sd = statistics.mean(scores), statistics.pstdev(scores)
    assert statistics.pstdev(row["standardised_words"] for row in train) == pytest.approx(1.0)
    expected = [(row["score_words"] - mean) / sd for row in test]
    assert [row["standardised_words"] for row in test] == pytest.approx(expected)
    later = scored(PAIRS, "preferences", Words(), "later", standardised_by=str(run / "statistics.json"))
    for row in read_table(later / "data/train.parquet"):
        for side in (0, 1):
            assert row[f"standardised_words_{side}"] == pytest.approx((row[f"score_words_{side}"] - mean) / sd)
    for text, said in (
        ("{}", "KeyError: 'words'"),
        ('{"words": {"mean": 1, "sd": 0, "count": 2}}', "expected above 0"),
    ):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            scored(PAIRS, "preferences", Words(), "refused", standardised_by=str(tmp_path / "other.json"))


def test_the_interval_of_a_mean_is_over_prompts(scored):
    """Two responses to a prompt are not independent: three prompts, two degrees of freedom."""
    rows = [{"prompt": "one", "response_0": "a", "response_1": text, "better": 1} for text in ("b c", "d e", "f g")]
    others = [{"prompt": prompt, "response_0": "a", "response_1": "b c", "better": 1} for prompt in ("four", "three")]
    run = scored(rows + others, "preferences", Words(), "interval")
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    means = [301.5, 401.5, 501.5]
    assert logged["train/words/ci95"] == pytest.approx(4.302653 * statistics.stdev(means) / 3**0.5, rel=1e-5)


def test_what_was_scored_before_a_kill_is_not_scored_again(scored):
    again = Words()
    more = [{**row, "prompt": f"{row['prompt']} {i}"} for i in range(3) for row in PAIRS]
    run = scored(more, "preferences", Words(), "broken")
    table = (run / "data/train.parquet").read_bytes()
    (run / "shards/train_0001/rows.parquet").unlink()
    assert scored(more, "preferences", again, "broken") == run
    assert again.asked == 4  # two rows, two sides
    assert (run / "data/train.parquet").read_bytes() == table


def test_refuses_pairs_of_the_world_no_source_and_a_column_that_is_there(scored):
    with pytest.raises(ValueError, match=r"stage.reads=preferences, but embedded:tiny_help draws prompts"):
        scored([], "preferences", Words(), path=WORLD, train_size=5, eval_splits=[])
    with pytest.raises(ValueError, match="no reward source to score by"):
        scored(PAIRS, "preferences", None)
    with pytest.raises(ValueError, match="'score_words_0' already; leave that source out"):
        scored([{**row, "score_words_0": 1.0} for row in PAIRS], "preferences", Words())
