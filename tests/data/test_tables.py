"""Rows from files of every kind, and bad rows found before any work."""

import json
import re
import subprocess

import datasets
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from rlhf_lab.data.fitting import RowFilter
from rlhf_lab.data.tables import (
    check_table,
    join_tables,
    need,
    prompt_of,
    read_splits,
    read_table,
    write_table,
)

ROWS = [{"prompt": 'a "quoted",\ncut', "response": "x\u2028y", "safe": True, "better": 1}] + [
    {"prompt": f"p{i}", "response": f"r{i}", "safe": i % 2 == 0, "better": i % 2} for i in range(4)
]


def save(path, rows):
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    assert read_splits(str(save(tmp_path / f"data{suffix}", ROWS)), None) == {"train": ROWS}


def test_what_the_datasets_library_saved_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    [file] = (tmp_path / "saved").glob("*.arrow")
    assert read_splits(str(file), None) == {"train": ROWS}


def test_a_folder_that_the_datasets_library_saved_has_its_splits_and_nothing_of_its_notes(tmp_path):
    splits = {"train": datasets.Dataset.from_list(ROWS[:3]), "test": datasets.Dataset.from_list(ROWS[3:])}
    datasets.DatasetDict(**splits).save_to_disk(str(tmp_path / "several"))
    assert read_splits(str(tmp_path / "several"), None) == {"train": ROWS[:3], "test": ROWS[3:]}
    splits["train"].save_to_disk(str(tmp_path / "one"))
    assert read_splits(str(tmp_path / "one"), None) == {"train": ROWS[:3]}


def test_a_csv_file_keeps_texts_that_look_like_something_else(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,response,answer,margin\n007,1.50,true,1.50\n2020-01-01,NA,,2\n")
    rows = read_table(tmp_path / "t.csv", ["prompt", "response", "answer"])
    assert rows == [
        {"prompt": "007", "response": "1.50", "answer": "true", "margin": 1.5},
        {"prompt": "2020-01-01", "response": "NA", "answer": "", "margin": 2.0},
    ]
    assert [row["prompt"] for row in read_table(tmp_path / "t.csv")] == ["007", "2020-01-01"]


def test_a_folder_is_read_by_splits(tmp_path):
    save(tmp_path / "train-00000-of-00002.jsonl", ROWS[:2])
    save(tmp_path / "train-00001-of-00002.jsonl", ROWS[2:3])
    (tmp_path / "test").mkdir()
    save(tmp_path / "test" / "part.parquet", ROWS[3:])
    (tmp_path / "README.md").write_text("not data")
    assert read_splits(str(tmp_path), None) == {"train": ROWS[:3], "test": ROWS[3:]}


def test_written_tables_are_read_back(tmp_path):
    write_table(ROWS, tmp_path / "t.parquet")
    assert read_splits(str(tmp_path / "t.parquet"), None)["train"] == ROWS


def test_a_column_of_some_rows_is_empty_in_the_others(tmp_path):
    write_table([{"a": 1}, {"b": "x", "a": 2}, {"c": [1.0]}], tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet") == [
        {"a": 1, "b": None, "c": None},
        {"a": 2, "b": "x", "c": None},
        {"a": None, "b": None, "c": [1.0]},
    ]


def test_prompts_of_one_turn_and_of_several_stand_in_one_table_with_their_ids(tmp_path):
    prompts = [prompt_of("hi"), prompt_of(["hi", "hello", "bye"]), prompt_of("bye")]
    rows = [{"prompt": prompt.written, "id": prompt.id} for prompt in prompts]
    write_table(rows, tmp_path / "t.parquet")
    for k, row in enumerate(rows):  # of one kind each
        write_table([row], tmp_path / f"{k}.parquet")
    join_tables([tmp_path / f"{k}.parquet" for k in range(3)], tmp_path / "joined.parquet")
    for name in ("t", "joined"):
        read = read_table(tmp_path / f"{name}.parquet")
        assert [prompt_of(row["prompt"]) for row in read] == prompts
        assert [row["id"] for row in read] == [prompt.id for prompt in prompts]
    write_table(rows[::2], tmp_path / "t.parquet")
    assert [row["prompt"] for row in read_table(tmp_path / "t.parquet")] == ["hi", "bye"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "line 2 is not JSON"),
        ("b.jsonl", '["x"]\n', "line 1 is not an object"),
        ("c.json", "[1, 2]", "not a list of objects"),
        ("d.parquet", "not parquet", "cannot be read as .parquet"),
        ("e.arrow", "not arrow either", "cannot be read as .arrow"),
        ("f.csv", "a,b\n1,2,3\n", "cannot be read as .csv"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said) as refused:
        read_splits(str(tmp_path / name), None)
    assert name in str(refused.value)


def test_an_empty_file_has_no_rows_and_a_run_needs_one(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    [(split, rows)] = read_splits(str(tmp_path / "empty.jsonl"), None).items()
    assert (split, rows) == ("train", [])
    with pytest.raises(ValueError, match=r"d \(train\) is empty; a run on prompts needs at least one row"):
        need(rows, {}, ["prompt"], "d (train)", "a run on prompts")


def test_a_missing_column_is_named_with_what_is_there_and_how_to_map_it():
    with pytest.raises(ValueError, match=r"columns \['question', 'reply'\].*needs 'prompt'.*dataset.columns.prompt="):
        need([{"question": "", "reply": ""}], {"response": "reply"}, ["response", "prompt"], "d", "a run")
    need([{"question": "", "reply": ""}], {"response": "reply", "prompt": "question"}, ["response", "prompt"], "d", "a")


def test_paths_that_may_be_hub_ids_pass_and_others_must_exist(tmp_path):
    check_table("owner/name")
    for path in ("/nope", "./nope", "nope", "a/b/c", "owner/name.jsonl"):
        with pytest.raises(ValueError, match=re.escape(f"dataset.path={path}")):
            check_table(path)


def test_prompts_may_be_texts_turns_or_messages():
    assert [dict(m) for m in prompt_of("hi").messages] == [{"role": "user", "content": "hi"}]
    turns = prompt_of(["hi", "hello", "bye"])
    assert [m["role"] for m in turns.messages] == ["user", "assistant", "user"]
    assert turns.request == "bye"
    assert prompt_of([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]).request == "u"
    assert prompt_of("hi").id == prompt_of(["hi"]).id != turns.id


@pytest.mark.parametrize(
    "value", [["hi", "hello"], [{"role": "user"}], [3], 7, [{"role": "assistant", "content": "x"}], []]
)
def test_prompts_that_no_user_ends_are_refused(value):
    with pytest.raises(ValueError, match=r"prompt|turn|conversation"):
        prompt_of(value)


def test_bad_rows_are_counted_by_reason_and_refused_or_dropped():
    def found(policy) -> RowFilter:
        bad = RowFilter("data (train)", policy)
        bad.reject("row 3", "an empty prompt")
        bad.reject("row 5", "a duplicate of an earlier row")
        bad.reject("row 7", "an empty prompt")
        return bad

    with pytest.raises(
        ValueError, match=r"2 with an empty prompt \(first: row 3\); 1 with a dup.*dataset.bad_rows=drop"
    ):
        found("error").report(10)
    assert "dropped 3 of 10 rows: 2 with an empty prompt (first: row 3); 1 with" in found("drop").report(10)
    with pytest.raises(ValueError, match="no row is left of 3"):
        found("drop").report(3)
    assert RowFilter("d", "error").report(10) == ""


def test_local_files_need_neither_the_hub_library_nor_its_cache(tmp_path):
    file = save(tmp_path / "d.jsonl", ROWS)
    code = (
        "import sys; from rlhf_lab.data.tables import read_splits;"
        f"read_splits({str(file)!r}, None); sys.exit('datasets' in sys.modules)"
    )
    assert subprocess.run(["python", "-c", code], check=False).returncode == 0


def test_tables_are_joined_in_order(tmp_path):
    rows = [{"text": str(i), "members": [float(i)] * (1 + i % 3)} for i in range(7)]
    for k, part in enumerate((rows[:3], rows[3:4], rows[4:])):
        write_table(part, tmp_path / f"{k}.parquet")
    join_tables([tmp_path / f"{k}.parquet" for k in range(3)], tmp_path / "all.parquet")
    assert read_table(tmp_path / "all.parquet") == rows
