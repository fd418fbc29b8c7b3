"""The generation table gives back what was written, by column and by prompt, and refuses what does not belong."""

import json

import numpy as np
import pytest
from pyarrow import parquet

from rlhf_lab.data import generation_writer
from rlhf_lab.data.generations import FILE, Generations, write
from rlhf_lab.data.tables import prompt_of

TALK = [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "hello"), ("user", "and now ?"))]


def row(number=0, sample=0, split="test", **other):
    asked = f"what is {number} ?"
    return {
        "run": "a",
        "step": 3,
        "split": split,
        "condition": "",
        "prompt_id": prompt_of(asked).id,
        "prompt": asked,
        "sample": sample,
        "response": f"{split} {number} {sample}",
        "finished": True,
        "finish_reason": "stop",
        "tokens": 2,
        "kl_k1": 0.5,
        "score_help": 10.0 * number + sample,
        "members_help": [float(number), float(sample), 1.0],
        "gold_help": -1.0,
        "verdict_kind": None if sample else 1.0,
    } | other


@pytest.fixture
def table(tmp_path, monkeypatch):
    """`table(rows)` is a generation table of these rows, written in groups of four."""
    monkeypatch.setattr(generation_writer, "ROWS_PER_GROUP", 4)

    def make(rows, **metadata):
        write(tmp_path / FILE, iter(rows), metadata)
        return Generations.open(tmp_path / FILE)

    return make


def test_columns_come_back_by_prompt_and_sample_whatever_the_groups(table):
    rows = [row(p, s, split) for split in ("test", "ood") for p in range(5) for s in range(3)]
    made = table(rows, sampling={"temperature": 1.0})
    assert (made.splits, made.rewards, made.gold, made.verdicts) == (("test", "ood"), ("help",), ("help",), ("kind",))
    assert (made.num_rows, made.metadata) == (30, {"sampling": {"temperature": 1.0}})
    assert made.matrix("score_help", "ood").tolist() == [[10.0 * p + s for s in range(3)] for p in range(5)]
    members = made.members("help", "test")
    assert members.shape == (5, 3, 3)
    assert members[4, 2].tolist() == [4.0, 2.0, 1.0]
    assert made.keys("ood") == [(prompt_of(f"what is {p} ?").id, "") for p in range(5)]
    assert np.isnan(made.matrix("verdict_kind", "test")).mean() == pytest.approx(2 / 3)
    assert list(made.rows("test", ["response", "tokens"]))[7] == {"response": "test 2 1", "tokens": 2}
    assert parquet.ParquetFile(made.path).num_row_groups == 8


def test_blocks_are_the_whole_prompt_by_prompt(table):
    made = table([row(p, s) for p in range(7) for s in range(3)])
    blocks = list(made.blocks("test", ["score_help", "members_help"], 2))
    assert [len(block["score_help"]) for block in blocks] == [2, 2, 2, 1]
    for name, whole in (
        ("score_help", made.matrix("score_help", "test")),
        ("members_help", made.members("help", "test")),
    ):
        assert np.array_equal(np.concatenate([block[name] for block in blocks]), whole)
    odd = table([row(p, members_help=[1.0] * (1 + p // 4)) for p in range(6)])
    with pytest.raises(ValueError, match="row 4 of test: members_help has 2 values, the first row 1"):
        list(odd.blocks("test", ["members_help"], 2))


def test_texts_are_grouped_by_prompt_under_its_condition(table):
    rows = [row(0, s, condition=told) for told in ("", "be kind") for s in range(2 if told else 3)]
    grouped = list(table(rows).texts("test"))
    assert [(prompt.condition, len(responses)) for prompt, responses in grouped] == [("", 3), ("be kind", 2)]
    assert grouped[0][0] == prompt_of("what is 0 ?")
    with pytest.raises(ValueError, match=r"first prompt of test has 3 samples, prompt 1 \(row 3\) has 2"):
        table(rows).matrix("score_help", "test")


def test_a_conversation_met_late_turns_all_prompts_into_conversations(table):
    rows = [row(p) for p in range(6)] + [row(6, prompt=TALK, prompt_id=prompt_of(TALK).id)] + [row(7)]
    made = table(rows, note=1)
    assert [prompt.id for prompt, _ in made.texts("test")] == [each["prompt_id"] for each in rows]
    assert [prompt.written for prompt, _ in made.texts("test")][5:] == ["what is 5 ?", TALK, "what is 7 ?"]
    assert made.metadata == {"note": 1}
    assert [path.name for path in made.path.parent.iterdir()] == [FILE]


def test_a_finished_run_is_named_by_its_folder_or_its_output(tmp_path):
    run = tmp_path / "run"
    (run / "policy").mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"state": "finished"}))
    with pytest.raises(ValueError, match=r"holds no generations.parquet, but \[\]"):
        Generations.open(run / "policy")
    write(run / "data" / FILE, [row()], {})
    assert {Generations.open(place).path for place in (run, run / "data", run / "policy")} == {run / "data" / FILE}
    (run / "status.json").write_text(json.dumps({"state": "stopped"}))
    with pytest.raises(ValueError, match="the run is stopped, not finished"):
        Generations.open(run)
    with pytest.raises(ValueError, match="no such file or folder"):
        Generations.open(tmp_path / "other")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "there is no response to write"),
        ([row(0, 1)], r"row 0 is sample 1 of prompt .*; expected 0"),
        ([row(0), row(1), row(0, 1)], r"row 2: prompt .* of test came before, with others between"),
        ([row(p) for p in range(5)] + [row(5, score_help="high")], r"row 5 has score_help='high', which is no double"),
        ([row(0), {k: v for k, v in row(1).items() if k != "tokens"}], r"row 1 .* the columns \['tokens'\]"),
        ([row(0), row(1, run="b")], r"row 1 is of run 'b' at step 3, those before of 'a'"),
        ([row(0, colour="red")], r"has no column 'colour'"),
        ([{"run": "a"}], r"row 0 has no \['split'"),
    ],
)
def test_rows_that_do_not_belong_are_refused_and_nothing_is_left(table, tmp_path, rows, said):
    with pytest.raises(ValueError, match=said):
        table(rows)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_computed_with_is_refused_by_row(table):
    with pytest.raises(ValueError, match=r"score_help is nan in row 1 of test, .* 1 of 3 rows"):
        table([row(0), row(1, score_help=float("nan")), row(2)]).matrix("score_help", "test")
    with pytest.raises(ValueError, match=r"row 1 of test: members_help has 1 values, the first row 3"):
        table([row(0), row(1, members_help=[1.0])]).members("help", "test")
    made = table([row(0)])
    with pytest.raises(ValueError, match=r"no column 'score_cost'; it has \['run'"):
        made.matrix("score_cost", "test")
    with pytest.raises(ValueError, match=r"no split 'ood'; it has \['test'\]"):
        made.column("tokens", "ood")
    made.path.write_bytes(made.path.read_bytes()[:400])
    with pytest.raises(ValueError, match="is no whole parquet file"):
        Generations.open(made.path)


def test_a_table_of_other_make_is_read_if_its_prompts_stand_together(table):
    made = table([row(p, s) for p in range(3) for s in range(2)])
    whole = parquet.read_table(made.path)
    for order, said in (([0, 2, 1, 3, 4, 5], "row 2 of test: prompt .* came before"), ([1, 0, 2, 3, 4, 5], "row 0 of")):
        parquet.write_table(whole.take(order), made.path)
        with pytest.raises(ValueError, match=said):
            Generations.open(made.path).matrix("score_help", "test")
    parquet.write_table(whole.drop_columns(["condition"]), made.path)
    with pytest.raises(ValueError, match=r"needs \['condition'\] too"):
        Generations.open(made.path)
