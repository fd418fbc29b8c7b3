"""Labels that contradict each other, labels that are wrong on purpose, and what is counted of a split."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_lab.data.statistics import of_stage
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.tiny import tiny_tokenizer
from rlhf_lab.stages.score_table import ScoreTable
from tests.data.tables import numbered, written

TEMPLATE = Template(tiny_tokenizer(), "auto")


def votes(*ways: str):
    """Rows of pairs: "a>b" for each, all to one prompt."""
    return [{"prompt": "p", "chosen": way[0], "rejected": way[-1]} for way in ways]


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("keep", ["a>b", "b>a", "c>d", "e>f", "f>e"]),
        ("drop", ["c>d"]),
        ("relabel", ["b>a", "c>d"]),  # two to one for b; e and f are even
    ],
)
def test_pairs_preferred_both_ways_round_are_settled_by_the_policy(tmp_path, policy, left):
    rows = votes("a>b", "b>a", "c>d", "b>a", "e>f", "f>e")
    data = written(tmp_path, {"train": rows}, bad_rows="drop", on_conflict=policy)
    pairs = data.preferences("train", TEMPLATE)
    assert [f"{pair.chosen}>{pair.rejected}" for pair in pairs] == left
    assert any("4 of 5 pairs are preferred both ways round (first: row 0)" in note for note in data.notes)
    [counted] = data.counted.as_json()
    lost = {"a duplicate of an earlier row": 1} | ({"contradicting labels": 5 - len(left)} if len(left) < 5 else {})
    assert counted["dropped"] == lost
    assert counted["total"] == counted["kept"] + sum(lost.values())


def test_pairs_preferred_both_ways_round_may_be_an_error(tmp_path):
    data = written(tmp_path, {"train": votes("a>b", "b>a")}, on_conflict="error")
    with pytest.raises(ValueError, match=r"2 of 2 pairs are preferred both ways.*first: row 0.*keep, drop or relabel"):
        data.preferences("train", TEMPLATE)
    with pytest.raises(ValueError, match="none is left"):
        written(tmp_path, {}, on_conflict="drop").preferences("train", TEMPLATE)


def test_noise_exchanges_the_pairs_of_training_only_and_says_which(tmp_path):
    rows = numbered(40, chosen="good {}", rejected="bad {}")
    for i, row in enumerate(rows):
        row |= {"score_chosen": 2.0 + i, "score_rejected": 1.0, "score_h_chosen": 5.0, "score_h_rejected": 3.0}
    splits = {"train": rows, "test": numbered(10, "other", chosen="good {}", rejected="bad {}")}
    data = written(tmp_path, splits, noise=0.25)
    pairs = data.preferences("train", TEMPLATE)
    flipped = [i for i, pair in enumerate(pairs) if pair.chosen.startswith("bad")]
    assert len(flipped) == 10
    assert data.counted.as_json()[0]["flipped"] == flipped
    for i, pair in enumerate(pairs):  # scores are of responses, so the preferred one of a wrong label is the worse
        sign = -1 if i in flipped else 1
        assert (pair.margin, pair.gaps) == (sign * (1.0 + i), {"h": sign * 2.0})
    assert all(pair.chosen.startswith("good") for pair in data.preferences("test", TEMPLATE))
    assert data.counted.as_json()[1]["flipped"] is None
    assert any("the labels of 10 of 40 pairs are wrong on purpose" in note for note in data.notes)


def test_noise_exchanges_safety_pairs_with_their_verdicts(tmp_path):
    rows = numbered(20, response_0="a {}", response_1="b {}")
    for row in rows:
        row |= {"safer": 0, "safe_0": True, "safe_1": False}
    pairs = written(tmp_path, {"train": rows}, noise=0.5, noise_recipe="exact").safety_pairs("train", TEMPLATE)
    wrong = [pair for pair in pairs if pair.safer.startswith("b")]
    assert len(wrong) == 10
    assert all(pair.safer_is_unsafe and not pair.unsafer_is_unsafe for pair in wrong)


def test_noise_where_there_is_no_label_is_refused(tmp_path):
    data = written(tmp_path, {"train": numbered(4, response="r {}")}, noise=0.25)
    with pytest.raises(ValueError, match=r"dataset\.noise=0\.25, but demonstrations have no label to be wrong"):
        data.check((), "demonstrations")
    with pytest.raises(ValueError, match=r"dataset\.noise=0\.25, but rows are copied as they are"):
        data.table("train", "demonstrations", TEMPLATE)


def test_what_a_stage_read_is_counted_by_split(tmp_path):
    rows = numbered(30, response_0="a b c {}", response_1="a {}")
    for i, row in enumerate(rows):
        row["better"] = int(i >= 20)
    rows.append({**rows[0]})
    rows.append({**rows[1], "prompt": " "})
    data = written(tmp_path, {"train": rows}, bad_rows="drop", train_size=31)
    data.preferences("train", TEMPLATE)
    stage = object.__new__(ScoreTable)  # whatever of this package holds a data set
    stage.__dict__ |= {"dataset": data, "again": {"same": data}, "other": SimpleNamespace(dataset=data)}
    [found] = of_stage(stage)["datasets"]
    assert (found["name"], found["path"]) == ("dataset", str(tmp_path))
    [split] = json.loads(json.dumps(found["splits"]))
    assert split["total"] == 32
    assert split["dropped"].pop("another row drawn (train_size)") == 1
    assert split["kept"] == 32 - 1 - sum(split["dropped"].values())
    lengths = [len(TEMPLATE.response_tokens(row[side])) for row in rows[:30] for side in ("response_0", "response_1")]
    whole = written(tmp_path, {}, bad_rows="drop")
    pairs = whole.preferences("train", TEMPLATE)
    [split] = whole.counted.as_json()
    assert (split["kept"], split["prompts"]) == (len(pairs), 30)
    assert split["response_tokens"] == {
        "min": min(lengths),
        "median": np.median(lengths),
        "p95": np.percentile(lengths, 95),
        "max": max(lengths),
    }
    assert split["labels"]["response_0 is preferred"] == pytest.approx(20 / 30)
    assert split["labels"]["the preferred response is the longer"] == pytest.approx(20 / 30)
