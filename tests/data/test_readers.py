"""Broken files of every kind: the error names the file, the line or row, and what to do."""

import gzip
import json
import resource
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_lab.data.readers import read_table
from rlhf_lab.data.tables import read_splits

GOOD = b'{"prompt": "p", "response": "r"}\n'


def not_utf8() -> pa.Table:
    """A table whose second text is no UTF-8, as a careless writer leaves it."""
    letters = pa.py_buffer(b"ab\xff")
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 3)))
    return pa.table({"prompt": pa.Array.from_buffers(pa.string(), 2, [None, offsets, letters])})


def parquet_bytes(folder: Path, table: pa.Table) -> bytes:
    parquet.write_table(table, folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("latin1.jsonl", GOOD + b'{"prompt": "caf\xe9"}\n', r"line 2 is not UTF-8 \(byte 15: 0xe9\); .*iconv"),
        ("cut.jsonl", GOOD + b'{"prompt": "how do', r"line 2 is not JSON and has no end, so the file is half written"),
        ("broken.jsonl", b'{"prompt": \n' + GOOD, r"line 1 is not JSON .*mend or remove it"),
        ("deep.jsonl", GOOD + b'{"prompt": ' + b"[" * 100_000 + b"\n", r"line 2 is not JSON"),
        ("list.jsonl", GOOD + b"[1, 2]\n", r"line 2 is not an object of columns, but \[1, 2\]"),
        ("cut.json", b'[{"prompt": "a"}, {"pro', r"a half-written one .*write it again"),
        ("mixed.json", b'[{"prompt": "a"}, 7]', r"not a list of objects: row 1 is 7"),
        ("latin1.json", b'[{"prompt": "caf\xe9"}]', r"byte 16 is not UTF-8; .*iconv"),
        ("ragged.csv", b"prompt,response\na,b\nc,d,e\n", r"Row #3: Expected 2 columns, got 3: c,d,e; mend that row"),
        ("short.csv", b"prompt,response\na,b\nc\n", r"Row #3: Expected 2 columns, got 1"),
        ("latin1.csv", b"prompt,response\na,b\ncaf\xe9,d\n", r"Row #3: .*invalid UTF8.*; .*iconv"),
        ("twice.csv", b"prompt,prompt\na,b\n", r"columns \['prompt'\] are there twice"),
        ("not.parquet", b"PAR1 but nothing else", r"half written or something else: write it again"),
        ("not.arrow", b"neither stream nor file", r"half written or something else: write it again"),
    ],
)
def test_what_is_broken_is_named_with_its_place_and_a_remedy(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as .*{said}"):
        read_table(tmp_path / name)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_half_written_parquet_file_is_refused_wherever_it_ends(tmp_path, share):
    whole = parquet_bytes(tmp_path, pa.table({"prompt": [f"p{i}" for i in range(500)]}))
    (tmp_path / "half.parquet").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"half\.parquet cannot be read as \.parquet.*write it again"):
        read_table(tmp_path / "half.parquet")


def test_a_text_in_parquet_that_is_no_utf8_is_named_by_row_and_column(tmp_path):
    (tmp_path / "t.parquet").write_bytes(parquet_bytes(tmp_path, not_utf8()))
    with pytest.raises(ValueError, match=r"row 1: prompt is not UTF-8"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize(("name", "head"), [("long.jsonl", GOOD), ("long.csv", b"prompt\n")])
def test_a_line_without_end_is_refused_before_it_is_read(tmp_path, name, head):
    with (tmp_path / name).open("wb") as file:
        file.write(head)
        for _ in range(40):
            file.write(b"x" * 2**18)  # ten megabytes in all; the limit is lowered to one
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=rf"{name} cannot be read.*(line 2|a row) is longer than 1,048,576 bytes"):
        read_table(tmp_path / name, longest=2**20)
    assert time.process_time() - begun < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # in KiB


def test_a_line_just_as_long_as_allowed_is_read(tmp_path):
    line = json.dumps({"prompt": "x" * 50}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(line)
    assert len(read_table(tmp_path / "a.jsonl", longest=len(line))) == 1
    with pytest.raises(ValueError, match="line 1 is longer"):
        read_table(tmp_path / "a.jsonl", longest=len(line) - 1)


def test_a_byte_order_mark_and_other_line_ends_are_no_fault(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n" + GOOD)
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf[{"prompt": "p", "response": "r"}]')
    assert read_table(tmp_path / "a.jsonl") == [{"prompt": "p", "response": "r"}] * 2
    assert read_table(tmp_path / "b.json") == [{"prompt": "p", "response": "r"}]


def test_a_missing_shard_and_an_empty_one_are_refused(tmp_path):
    for k in (0, 2):
        (tmp_path / f"train-0000{k}-of-00003.jsonl").write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"\(train\) has 2 of 3 files, number 1 is missing.*fetch it again"):
        read_splits(str(tmp_path), None)
    (tmp_path / "train-00001-of-00003.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00001-of-00003\.jsonl of 3 is empty: it is half written"):
        read_splits(str(tmp_path), None)
    (tmp_path / "train-00001-of-00003.jsonl").write_bytes(GOOD)
    assert len(read_splits(str(tmp_path), None)["train"]) == 3


def test_a_truncated_or_damaged_archive_is_named(tmp_path):
    packed = gzip.compress(GOOD * 500)
    for name, content in (("cut", packed[:-20]), ("damaged", packed[:30] + b"\xff" * 8 + packed[38:])):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.jsonl\.gz cannot be unpacked as \.gz.*fetch it again"):
            read_table(tmp_path / f"{name}.jsonl.gz")
