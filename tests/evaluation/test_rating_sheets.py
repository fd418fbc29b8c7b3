"""What people wrote comes back to the response that they wrote it of; slips are named by file, row and remedy."""

import csv
import io

import pytest

from rlhf_lab.evaluation.matches import Answer, Match
from rlhf_lab.evaluation.rating_sheets import Scale, instructions, read_sheets, sheets, written
from rlhf_lab.records import Prompt

NAMES = ["old", "new", "odd"]
SCALE = Scale(most=2, ties=True)
CRITERIA = ["kind", "brief"]


def match(number, *texts):
    prompt = Prompt.from_text(f"request {number}")
    answers = tuple(Answer(split="test", prompt=prompt, sample=0, response=text, columns={}) for text in texts)
    return Match(key=("test", prompt.id, "", 0), prompt=prompt, answers=answers)


MATCHES = [match(i, f"old {i}", f"new {i}", f"odd {i}") for i in range(40)]
PAIRS = [("old", "new"), ("old", "odd")]


@pytest.fixture
def laid_out(tmp_path):
    """The key, and `fill(answer)`: the sheets with what `answer(row, criterion)` writes, as files."""
    key, rows, equal = sheets(MATCHES, PAIRS, NAMES, 2, seed=0)
    assert equal == 0

    def fill(answer, delimiter=",", encoding="utf-8"):
        files = []
        for rater, each in rows.items():
            table = list(csv.DictReader(io.StringIO(written(each, CRITERIA))))
            for row in table:
                row |= {criterion: answer(row, criterion) for criterion in CRITERIA}
            file = tmp_path / f"{rater}.csv"
            with file.open("w", encoding=encoding) as text:
                writer = csv.DictWriter(text, list(table[0]), delimiter=delimiter)
                writer.writeheader()
                writer.writerows(table)
            files.append(file)
        return files

    return key, fill


def prefers_new(row, criterion):
    """2 for whatever is newer, on the side on which it is shown."""
    return "-2" if row["response_a"].startswith(("new", "odd")) else "+2.0"


def test_preferences_come_back_to_the_contestants(laid_out):
    key, fill = laid_out
    for options in ({}, {"delimiter": ";"}, {"encoding": "utf-8-sig"}):
        found, absent = read_sheets(fill(prefers_new, **options), key, CRITERIA, SCALE, "error")
        assert absent == 0
        assert len(found) == 2 * 2 * 80
        assert {each.value for each in found} == {-2}  # of the first, which is the old one
    of_kind = {"kind": "1", "brief": "0"}
    found, _ = read_sheets(fill(lambda row, criterion: of_kind[criterion]), key, CRITERIA, SCALE, "error")
    for each in found:
        shown = {"kind": -1 if each.item.first_is_a else 1, "brief": 0}
        assert each.value == shown[each.criterion]


def test_sheets_are_blind_balanced_and_drawn_by_the_seed():
    key, rows, _ = sheets(MATCHES, PAIRS, NAMES, 2, seed=0)
    assert sheets(MATCHES, PAIRS, NAMES, 2, seed=0) == (key, rows, 0)
    assert sheets(MATCHES, PAIRS, NAMES, 2, seed=1)[1] != rows
    first, second = ([row[1] for row in each] for each in rows.values())
    assert first != second
    assert sorted(first) == sorted(second)
    sides = {rater: [each.first_is_a for each in key if each.rater == rater] for rater in rows}
    assert sides["rater_1"] != sides["rater_2"]
    for each in sides.values():
        assert 24 <= sum(each) <= 56  # of 80 coins
    shown = written([row[:2] for row in rows["rater_1"]], CRITERIA)
    assert "old" not in shown
    assert "new" not in shown


def test_equal_responses_are_left_out_and_formulas_are_not_computed():
    odd = [match(1, "same", " same\n", "x"), match(2, "=1+1", "-b", "@c")]
    key, rows, equal = sheets(odd, [("old", "new")], NAMES, 1, seed=0)
    assert (len(key), equal) == (1, 1)
    assert sorted(rows["rater_1"][0][3:]) == [" -b", " =1+1"]


def test_slips_are_named_by_file_row_and_remedy(laid_out):
    key, fill = laid_out
    file, other = fill(prefers_new)
    lines = file.read_text().splitlines()
    lines[3] = lines[3].replace("+2.0", "3").replace("-2", "3")
    lines[5] = lines[5].replace("rater_1,", "rater_1,f")
    lines[7] = lines[7].replace("rater_1", "somebody")
    lines[9] = lines[8]
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="Mend these rows") as refused:
        read_sheets([file, other], key, CRITERIA, SCALE, "drop")
    said = str(refused.value)
    assert f"{file}, row 4: kind is '3', expected one of -2, -1, 0, 1, 2" in said
    assert f"{file}, row 6: item 'f" in said
    assert "is not in the key" in said
    assert f"{file}, row 8: rater 'somebody' is not in the key" in said
    assert "and 1 more" in said


def test_ties_halves_and_words_are_no_values_where_they_are_not_allowed(laid_out):
    key, fill = laid_out
    for spelled, scale in (("0", Scale(most=2, ties=False)), ("1.5", SCALE), ("A", SCALE), ("nan", SCALE)):
        with pytest.raises(ValueError, match=rf"row 2: kind is '{spelled}', expected one of -2, -1,"):
            read_sheets(fill(lambda row, _, s=spelled: s), key, CRITERIA, scale, "drop")


def test_missing_ratings_are_refused_or_counted(laid_out):
    key, fill = laid_out
    files = fill(lambda row, criterion: "" if criterion == "brief" and row["prompt"] == "request 7" else "1")
    with pytest.raises(ValueError, match=r"4 of 320 ratings are missing, first brief of item .* by rater_.*=drop"):
        read_sheets(files, key, CRITERIA, SCALE, "error")
    found, absent = read_sheets(files, key, CRITERIA, SCALE, "drop")
    assert (len(found), absent) == (316, 4)
    found, absent = read_sheets(files[:1], key, CRITERIA, SCALE, "drop")
    assert (len(found), absent) == (158, 162)
    for missing in ("error", "drop"):
        with pytest.raises(ValueError, match="320 of 320 ratings are missing"):
            read_sheets(fill(lambda row, _: ""), key, CRITERIA, SCALE, missing)


def test_files_that_are_no_sheets(laid_out, tmp_path):
    key, _ = laid_out
    cases = {
        "headless.csv": (b"rater_1,abc,1,1\n", r"has the columns .* but not \['rater', 'item', 'kind', 'brief'\]"),
        "latin.csv": ("rater,item,kind,brief\nrater_1,é".encode("latin-1"), r"is not UTF-8 \(byte 30\)"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_sheets([tmp_path / name], key, CRITERIA, SCALE, "error")
    with pytest.raises(ValueError, match=r"nowhere.csv cannot be read"):
        read_sheets([tmp_path / "nowhere.csv"], key, CRITERIA, SCALE, "error")


def test_raters_are_told_what_each_value_means():
    told = instructions({"kind": "Which is kinder?"}, Scale(most=2, ties=True))
    assert "| -2 | A is much better |" in told
    assert "| 1 | B is slightly better |" in told
    assert "| 0 | neither is better |" in told
    assert "| kind | Which is kinder? |" in told
    assert "| 1 | B is better |" in instructions({"kind": "?"}, Scale(most=1, ties=False))
    assert "| 0 |" not in instructions({"kind": "?"}, Scale(most=1, ties=False))
