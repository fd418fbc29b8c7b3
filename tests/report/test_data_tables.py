"""The page says what a run read of its data, and what it left out."""

import json

import pytest

from rlhf_lab.report.data_tables import data_tables

SPLIT = {
    "split": "train",
    "reads": "safety_pairs",
    "total": 12000,
    "dropped": {"a duplicate of an earlier row": 1500, "an empty prompt": 2},
    "kept": 10498,
    "prompts": 9000,
    "prompt_tokens": {"min": 3, "median": 17.5, "p95": 40.0, "max": 512},
    "response_tokens": None,
    "labels": {"the safer response is unsafe": 0.256},
    "flipped": [3, 5, 8],
}


def test_every_count_is_written_out_and_what_there_is_not_is_left_empty(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"datasets": [{"name": "d", "path": "p", "splits": [SPLIT]}]}))
    [table] = data_tables(tmp_path)
    [row] = table.rows
    assert (table.name, table.path, row.split, row.reads) == ("d", "p", "train", "safety pairs")
    assert (row.total, row.kept, row.prompts) == ("12,000", "10,498", "9,000")
    assert row.dropped == ["1,500 a duplicate of an earlier row", "2 an empty prompt"]
    assert (row.prompt_tokens, row.response_tokens) == ("3 · 17.5 · 40 · 512", "")
    assert row.labels == ["the safer response is unsafe: 26 %", "wrong on purpose: 3"]


def test_a_run_without_an_account_has_no_table_and_a_broken_one_is_named(tmp_path):
    assert data_tables(tmp_path) == ()
    (tmp_path / "data.json").write_text('{"datasets": [{"name"')
    with pytest.raises(ValueError, match=r"data\.json is no account of data"):
        data_tables(tmp_path)
