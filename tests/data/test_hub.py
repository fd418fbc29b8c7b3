"""Files by their names: in a copy of a data set on this machine, compressed or not."""

import gzip
import json
import lzma

import datasets
import pytest

from rlhf_lab.data.hub import files_of, from_hub
from rlhf_lab.data.tables import check_table, read_splits, read_table

ROWS = [{"prompt": "p\u2028q", "n": 1}, {"prompt": "r", "n": 2}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def folder(tmp_path):
    for name in ("a/train.jsonl", "b/train.jsonl", "b/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}) + "\n")
    return tmp_path


def test_splits_are_the_files_of_their_patterns_in_order(folder):
    named = {"train": ["b/train.json*", "a/train.json*"], "test": "*/test.jsonl", "none": None}
    assert read_splits(str(folder), None, named=named) == {
        "train": [{"name": "b/train.jsonl"}, {"name": "a/train.jsonl"}],
        "test": [{"name": "b/test.jsonl"}],
    }


def test_a_pattern_without_a_file_is_named_with_what_to_do(folder):
    with pytest.raises(ValueError, match=r"has no file c/\*\.jsonl \(dataset\.files\.val\).*dataset\.files=null"):
        files_of(folder, {"val": "c/*.jsonl"})


def test_a_file_alone_is_the_only_split_that_is_named(folder):
    file = str(folder / "b/test.jsonl")
    assert list(read_splits(file, None, named={"test": "x/*.jsonl"})) == ["test"]
    assert list(read_splits(file, None, named={"train": "x", "test": "y"})) == ["train"]
    assert list(read_splits(file, None)) == ["train"]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_are_read_as_they_were(tmp_path, suffix, pack):
    file = tmp_path / f"train.jsonl{suffix}"
    file.write_bytes(pack(LINES.encode()))
    check_table(str(file))
    assert read_table(file) == ROWS
    assert read_splits(str(tmp_path), None, named={"train": "train.jsonl*"}) == {"train": ROWS}
    assert read_splits(str(tmp_path), None) == {"train": ROWS}
    file.write_bytes(pack(LINES.encode() * 50)[:-20])
    with pytest.raises(ValueError, match=rf"train\.jsonl\{suffix} cannot be unpacked as \{suffix}: .*; fetch it again"):
        read_table(file)
    file.write_bytes(pack(b'{"a": 1}\n{"a"'))
    with pytest.raises(ValueError, match=rf"train\.jsonl\{suffix} cannot be read as \.jsonl: line 2 is not JSON"):
        read_table(file)


def test_a_file_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(ValueError, match="unknown kind of file"):
        check_table(str(tmp_path / "x.txt.gz"))
    for pattern in ("data/train-*", "data.txt"):
        with pytest.raises(ValueError, match=r"dataset\.files has .*; expected a name that ends with one of \.jsonl"):
            from_hub("owner/name", None, {"train": pattern})
    with pytest.raises(ValueError, match="one data set is of one kind"):
        from_hub("owner/name", None, {"train": "a.csv", "test": "b.jsonl.gz"})


def test_the_hub_is_asked_for_these_files_at_this_revision(monkeypatch):
    asked = []

    def load(kind, data_files, split):
        asked.append((kind, data_files, split))
        return datasets.Dataset.from_list([{"n": len(asked)}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    named = {"train": ["a-*.json", "b.json"], "test": "t.jsonl.gz", "val": None}
    assert from_hub("o/n", "refs/pr/1", named) == {"train": [{"n": 1}], "test": [{"n": 2}]}
    at = "hf://datasets/o/n@refs%2Fpr%2F1"
    assert asked == [("json", [f"{at}/a-*.json", f"{at}/b.json"], "train"), ("json", [f"{at}/t.jsonl.gz"], "train")]
    asked.clear()
    from_hub("o/n", None, {"train": "x/*.parquet"})
    assert asked == [("parquet", ["hf://datasets/o/n/x/*.parquet"], "train")]
