"""Values inside rows, by the way to them."""

import pytest

from rlhf_lab.data.paths import MISSING, reached, steps, value_at

ROW = {"info": {"post": "p", "tags": ["a", "b"]}, "turns": [{"content": "x"}, {"content": "y"}], "a.b": 1, "n": None}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("info.post", "p"),
        ("info.tags[1]", "b"),
        ("turns[-1].content", "y"),
        ("turns[0].content", "x"),
        ("a.b", 1),
        ("n", None),
        ("info", ROW["info"]),
        ("n.x", MISSING),
        ("turns[2].content", MISSING),
        ("turns.content", MISSING),
        ("info.post[0]", MISSING),
        ("info[0]", MISSING),
    ],
)
def test_a_path_leads_to_a_value_or_nowhere(path, value):
    assert value_at(ROW, path) == value


@pytest.mark.parametrize("path", ["", "a..b", ".a", "a.", "a[x]", "a[1", "a]b", "a[1]b"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ValueError, match="does not lead into a row"):
        steps(path)


def test_a_path_may_begin_with_a_place():
    assert steps("[0].x") == (0, "x")
    assert steps("a[1][-2].b.c") == ("a", 1, -2, "b", "c")


def test_reached_values_stand_in_columns_of_the_paths_names():
    rows = [ROW, {"info": {}, "turns": []}]
    assert reached(rows, ["info.post", "turns[-1].content", "n"]) == [
        ROW | {"info.post": "p", "turns[-1].content": "y"},
        rows[1],
    ]
    assert reached(rows, ["a.b"])[0] == ROW
    assert reached(rows, ["n"]) == rows
