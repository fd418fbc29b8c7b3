"""Splits share no prompt, are divided in declared shares, and broken cells are named by row and remedy."""

from typing import Any

import pytest

from rlhf_lab.data.instructions import GoldGenerations
from rlhf_lab.data.selection import Between, Every
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.tiny import tiny_tokenizer
from tests.data.tables import numbered, written

TEMPLATE = Template(tiny_tokenizer(), "auto")
SHARES = {"train": 0.6, "candidate": 0.2, "safety": 0.1, "held_out": 0.1}
PAIR = {"chosen": "good", "rejected": "bad"}


def ids(data, split):
    return {prompt.id for prompt in data.prompts(split, TEMPLATE)}


def test_one_file_becomes_the_declared_splits_and_no_prompt_is_in_two(tmp_path):
    rows = [*numbered(600), *numbered(200)]
    data = written(tmp_path, {"train": rows}, shares=SHARES, bad_rows="drop", on_overlap="error")
    assert data.splits == ("candidate", "safety", "held_out")
    whose = {split: ids(data, split) for split in SHARES}
    assert sum(map(len, whose.values())) == len(set().union(*whose.values())) == 600
    (tmp_path / "again").mkdir()
    again = written(tmp_path / "again", {"train": rows[::-1][:500]}, shares=SHARES, bad_rows="drop", seed=9)
    for split in SHARES:  # neither order, company nor seed moves a prompt
        assert ids(again, split) <= whose[split]
    assert "divided by a hash of their prompt" in data.notes[0]


def test_other_splits_stay_and_a_share_cannot_take_their_name(tmp_path):
    data = written(tmp_path, {"train": numbered(300), "test": numbered(20, "other")}, shares=SHARES)
    assert data.splits == ("candidate", "safety", "held_out", "test")
    assert len(data.prompts("test", TEMPLATE)) == 20
    with pytest.raises(ValueError, match=r"has a split .test. of its own, so dataset\.shares cannot make another"):
        _ = written(tmp_path, {}, shares={"train": 0.5, "test": 0.5}).splits


def test_splits_that_share_prompts_are_refused_with_an_example_or_rid_of_them(tmp_path):
    splits = {"train": numbered(8), "test": [*numbered(3, "other"), *numbered(2)]}
    said = (
        r"2 prompt\(s\) of the training split 'train' are in 'test' too \(2 rows; first: .*\(train\), row 0 and "
        r".*\(test\), row 3\).*dataset\.on_overlap=drop"
    )
    with pytest.raises(ValueError, match=said):
        written(tmp_path, splits, on_overlap="error").prompts("train", TEMPLATE)
    dropped = written(tmp_path, splits, on_overlap="drop")
    assert ids(dropped, "train") == {p.id for p in written(tmp_path, splits).prompts("train", TEMPLATE)[2:]}
    assert len(dropped.prompts("test", TEMPLATE)) == 5
    assert dropped.counted.as_json()[0]["dropped"] == {"a prompt of the split test": 2}
    assert len(written(tmp_path, splits, on_overlap="keep").prompts("train", TEMPLATE)) == 8


def test_a_split_that_is_not_evaluated_may_share_prompts_and_case_counts_only_if_it_is_said_to(tmp_path):
    splits = {"train": numbered(4), "test": numbered(2, "PROMPT "), "extra": numbered(4)}
    exact = written(tmp_path, splits, on_overlap="error", eval_splits=["test"])
    assert len(exact.prompts("train", TEMPLATE)) == 4
    with pytest.raises(ValueError, match=r"2 prompt\(s\) of the training split"):
        written(tmp_path, splits, on_overlap="error", eval_splits=["test"], duplicates="normalised").prompts(
            "train", TEMPLATE
        )


def test_both_prompts_of_a_quadruple_are_kept_out_of_the_other_split(tmp_path):
    def four(strong: str, weak: str) -> dict[str, Any]:
        sides = {"strong": strong, "weak": weak}
        return {
            f"{side}_{name}": text
            for side, prompt in sides.items()
            for name, text in (("prompt", prompt), ("chosen", f"{prompt} good"), ("rejected", f"{prompt} bad"))
        }

    splits = {"train": [four("a", "b"), four("c", "d")], "test": [four("e", "a")]}
    with pytest.raises(ValueError, match=r"1 prompt.s. of the training split"):
        written(tmp_path, splits, on_overlap="error").quadruples("train", TEMPLATE)
    assert len(written(tmp_path, splits, on_overlap="drop").quadruples("train", TEMPLATE)) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": ["good"]}, r"row 2: chosen is .*of type list; expected a text.*dataset\.columns\.chosen"),
        ({"rejected": {"text": "bad"}}, r"row 2: rejected is .*of type dict; expected a text"),
        ({"chosen": True}, r"row 2: chosen is 'True', of type bool"),
        ({"prompt": 7}, r"row 2: a prompt is 7; expected a text"),
        ({"margin": "large"}, r"row 2: margin is 'large'; expected a finite number.*dataset\.select"),
        ({"margin": float("nan")}, r"row 2: margin is nan; expected a finite number"),
        ({"score_chosen": float("nan"), "score_rejected": 1}, r"row 2: score_chosen is nan; expected a finite number"),
        ({"chosen": None}, r"1 with an empty response \(first: row 2\).*dataset\.bad_rows=drop"),
        ({"chosen": float("nan")}, r"1 with an empty response \(first: row 2\)"),
        ({"id": "row 1"}, r"1 with the id of an earlier row \(first: row 2\).*dataset\.bad_rows=drop"),
        ({"id": None}, r"1 with no id \(first: row 2\)"),
    ],
)
def test_a_cell_of_the_wrong_kind_is_named_by_its_row_with_a_remedy(tmp_path, row, said):
    rows = [{"id": f"row {i}", **each, **PAIR} for i, each in enumerate(numbered(4))]
    rows[2] |= row
    data = written(tmp_path, {"train": rows}, columns={"id": "id"})
    with pytest.raises(ValueError, match=said):
        data.preferences("train", TEMPLATE)


def test_a_row_is_numbered_as_its_file_counts_it_whatever_was_left_out_before(tmp_path):
    rows = [{**each, **PAIR} for each in numbered(40)]
    rows[31]["margin"] = "?"
    for k, part in enumerate((rows[:30], rows[30:])):
        written(tmp_path, {f"train-{k}-of-2": part})
    data = written(tmp_path, {"test": [{**numbered(1)[0], **PAIR}]}, on_overlap="drop")
    with pytest.raises(ValueError, match=r"\(train\), row 1 of train-1-of-2\.jsonl: margin is '\?'"):
        data.preferences("train", TEMPLATE)


def test_bad_rows_of_several_files_are_named_by_the_file_that_holds_them(tmp_path):
    rows = [{**each, **PAIR} for each in numbered(6)]
    rows[4]["chosen"] = " "
    for k, part in enumerate((rows[:3], rows[3:])):
        written(tmp_path, {f"train-{k}-of-2": part})
    with pytest.raises(ValueError, match=r"1 with an empty response \(first: row 1 of train-1-of-2\.jsonl\)"):
        written(tmp_path, {}).preferences("train", TEMPLATE)


def test_a_row_that_cannot_be_selected_is_named_as_its_file_counts_it(tmp_path):
    rows = [{**each, **PAIR, "n": i, "m": 0.0} for i, each in enumerate(numbered(10))]
    rows[8]["m"] = float("nan")
    parts = [Between(column=column, low=low, high=None, unit="value") for column, low in (("n", 4), ("m", 0))]
    data = written(tmp_path, {"train": rows}, select=Every(parts=parts))
    with pytest.raises(ValueError, match=r"\(train\), row 8: m is 'nan'.*mend the row"):
        data.preferences("train", TEMPLATE)


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({"hold_out": 0.3}, 20),
        ({"shares": {"train": 0.5, "test": 0.5}}, 20),
        ({"select": Between(column="sample", low=0, high=2, unit="value"), "rest": "late"}, 40),  # both have of each
    ],
)
def test_rows_of_which_a_shape_makes_several_are_counted_as_they_were_read(tmp_path, settings, read):
    rows = [
        {"instruction": f"prompt {i}", "answers": ["a", "b", "c", "d", "e"], "scores": [1, 2, 3, 4, 5]}
        for i in range(20)
    ]
    shape = GoldGenerations(
        instruction="instruction", input=None, joined="", answers="answers", scores="scores", most=None
    )
    data = written(tmp_path, {"train": rows}, shape=shape, **settings)
    made = [len(data.demonstrations(split, TEMPLATE)) for split in ("train", *data.splits)]
    counted = data.counted.as_json()
    assert sum(made) == 100
    assert len(made) == 2
    assert sum(each["total"] for each in counted) == read
    assert all(0 < each["total"] < each["kept"] for each in counted)


def test_a_text_that_is_no_unicode_is_a_bad_row(tmp_path):
    rows = [{**each, **PAIR} for each in numbered(4)]
    rows[1]["chosen"], rows[2]["rejected"], rows[3]["condition"] = "half \ud83d", "\udc00", "\ud83d"
    data = written(tmp_path, {"train": rows}, bad_rows="drop")
    assert [pair.prompt.request for pair in data.preferences("train", TEMPLATE)] == ["prompt 0"]
    assert any("3 with a text that is no Unicode" in note for note in data.notes)
    rows[2]["prompt"] = "half \ud83d"
    with pytest.raises(ValueError, match=r"row 2: prompt is no Unicode.*half of a surrogate pair; mend the row"):
        written(tmp_path, {"train": rows}, bad_rows="drop").preferences("train", TEMPLATE)


def test_a_column_that_some_rows_alone_lack_is_there_and_their_cells_are_empty(tmp_path):
    rows = [numbered(1)[0], *({**each, **PAIR} for each in numbered(3, "other"))]
    data = written(tmp_path, {"train": rows}, bad_rows="drop")
    assert len(data.preferences("train", TEMPLATE)) == 3
    assert any("1 with an empty response (first: row 0)" in note for note in data.notes)


def test_prompts_that_are_the_same_but_for_case_are_held_out_together(tmp_path):
    rows = [{**each, **PAIR} for each in (*numbered(40), *numbered(40, "PROMPT "))]
    data = written(
        tmp_path, {"train": rows}, hold_out=0.3, duplicates="normalised", on_overlap="error", bad_rows="drop"
    )
    assert 0 < len(data.prompts("test", TEMPLATE)) < 40
