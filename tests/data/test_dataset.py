"""Prompts, demonstrations and pairs of a person's own table, and of the embedded world."""

import json
from pathlib import Path

import pytest
import yaml

from rlhf_lab.data.dataset import WORLD, Dataset
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.tiny import tiny_tokenizer

CONF = Path(__file__).resolve().parents[2] / "conf/dataset"
DEFAULTS = {
    "revision": None,
    "columns": {},
    "template": "auto",
    "max_prompt_tokens": 64,
    "max_response_tokens": 64,
    "bad_rows": "error",
    "on_conflict": "keep",
    "train_size": None,
    "train_split": "train",
    "eval_splits": None,
    "eval_size": 256,
    "hold_out": 0.1,
    "seed": 0,
}


@pytest.fixture(scope="module")
def template():
    return Template(tiny_tokenizer(), "auto")


@pytest.fixture
def table(tmp_path):
    """`table(rows, test=rows, **settings)` is a data set of these rows."""

    def make(rows, test=None, **settings):
        for name, part in (("train", rows), ("test", test)):
            if part is not None:
                (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        return Dataset(**{**DEFAULTS, "path": str(tmp_path), **settings})

    return make


def numbered(n, **columns):
    return [{"prompt": f"prompt {i}", **{k: v.format(i) for k, v in columns.items()}} for i in range(n)]


def test_prompts_and_demonstrations_through_a_mapping_of_columns(table, template):
    rows = [{"q": "one", "a": "yes"}, {"q": ["one", "yes", "two"], "a": "no"}]
    data = table(rows, columns={"prompt": "q", "response": "a"}, hold_out=0.0)
    assert [p.request for p in data.prompts("train", template)] == ["one", "two"]
    assert [(d.prompt.request, d.response) for d in data.demonstrations("train", template)] == [
        ("one", "yes"),
        ("two", "no"),
    ]


def test_preferences_as_chosen_and_rejected_or_as_two_sides(table, template):
    sided = [{"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 2}]
    [pair] = table(sided).preferences("train", template)
    assert (pair.chosen, pair.rejected, pair.margin) == ("good", "bad", 2.0)
    two = [
        {"prompt": "p", "response_0": "a", "response_1": "b", "better": 1},
        {"prompt": "q", "response_0": "c", "response_1": "d", "better": 0},
    ]
    pairs = table(two, hold_out=0.0).preferences("train", template)
    assert [(p.chosen, p.rejected, p.margin) for p in pairs] == [("b", "a", 0.0), ("c", "d", 0.0)]


def test_safety_pairs_put_the_safer_first_with_both_verdicts(table, template):
    row = {"prompt": "p", "response_0": "a", "response_1": "b", "safer": 1, "safe_0": False, "safe_1": True}
    [pair] = table([row]).safety_pairs("train", template)
    assert (pair.safer, pair.unsafer, pair.safer_is_unsafe, pair.unsafer_is_unsafe) == ("b", "a", False, True)


@pytest.mark.parametrize("value", ["False", "1", 2, -1, None, "a"])
def test_a_label_that_is_not_0_or_1_is_refused(table, template, value):
    row = {"prompt": "p", "response_0": "a", "response_1": "b", "safer": 1, "safe_0": value, "safe_1": True}
    with pytest.raises(ValueError, match=r"\(train\), row 0: safe_0 is .* expected 0 or 1"):
        table([row]).safety_pairs("train", template)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": " ", "response": "a"}, "an empty prompt"),
        ({"prompt": None, "response": "a"}, "an empty prompt"),
        ({"prompt": "p", "response": ""}, "an empty response"),
        ({"prompt": "prompt 0", "response": "answer 0"}, "a duplicate"),
        ({"prompt": "word " * 100, "response": "a"}, "dataset.max_prompt_tokens=64"),
        ({"prompt": "p", "response": "word " * 100}, "dataset.max_response_tokens=64"),
    ],
)
def test_bad_rows_are_refused_or_dropped_and_counted(table, template, row, reason):
    rows = [*numbered(3, response="answer {}"), row]
    with pytest.raises(ValueError, match=rf"1 with .*{reason}.*first: row 3.*dataset.bad_rows=drop"):
        table(rows, hold_out=0.0).demonstrations("train", template)
    data = table(rows, hold_out=0.0, bad_rows="drop")
    assert len(data.demonstrations("train", template)) == 3
    [note] = data.notes
    assert "dropped 1 of 4 rows" in note
    assert reason in note


def test_a_malformed_conversation_is_named_by_its_row(table, template):
    with pytest.raises(ValueError, match=r"\(train\), row 1: .*user speaks last"):
        table([{"prompt": "p"}, {"prompt": ["a", "b"]}], hold_out=0.0).prompts("train", template)


def test_a_single_split_is_held_out_by_prompt_and_that_is_said(table, template):
    data = table([row for row in numbered(100, response="a {}") for _ in range(2)], bad_rows="drop")
    assert data.splits == ("test",)
    ours = {p.id for p in data.prompts("train", template)}
    theirs = {p.id for p in data.prompts("test", template)}
    assert not ours & theirs
    assert len(ours | theirs) == 100
    assert "held out as 'test'" in data.notes[0]


def test_every_split_but_the_training_one_is_evaluated_unless_some_are_named(table, template):
    assert table(numbered(4), test=numbered(4)).splits == ("test",)
    assert table(numbered(4), test=numbered(4), eval_splits=[]).splits == ()
    with pytest.raises(ValueError, match=r"splits \['test', 'train'\], not \['valid'\]; change dataset.eval_splits"):
        _ = table(numbered(4), test=numbered(4), eval_splits=["valid"]).splits
    with pytest.raises(ValueError, match=r"not 'sft'; change dataset.train_split"):
        table(numbered(4), test=numbered(4), train_split="sft").prompts("sft", template)


def test_evaluating_on_the_training_split_loses_none_of_it(table, template):
    data = table(numbered(40), eval_splits=["train"])
    assert len(data.prompts("train", template)) == 40
    assert data.splits == ("train",)


def test_a_subset_is_drawn_by_the_seed(table, template):
    def drawn(seed):
        return [
            p.request for p in table(numbered(50), hold_out=0.0, train_size=10, seed=seed).prompts("train", template)
        ]

    assert len(drawn(0)) == 10
    assert drawn(0) == drawn(0) != drawn(1)


def safety_rows():
    """Of each row the first response is the safer; its verdicts and the other's in all combinations."""
    return [
        {"prompt": f"p{i}", "response_0": "a", "response_1": "b", "safer": 0, "safe_0": safe, "safe_1": other}
        for i, (safe, other) in enumerate([(1, 1), (1, 0), (0, 0), (0, 1)])
    ]


def test_safety_pairs_whose_labels_contradict_each_other(table, template):
    def read(policy):
        data = table(safety_rows(), hold_out=0.0, on_conflict=policy)
        return [(p.safer, p.safer_is_unsafe, p.unsafer_is_unsafe) for p in data.safety_pairs("train", template)], data

    sound = [("a", False, False), ("a", False, True), ("a", True, True)]
    kept, data = read("keep")
    assert kept == [*sound, ("a", True, False)]
    assert "in 1 of 4 pairs the safer response alone is labelled unsafe (first: row 3)" in data.notes[0]
    assert read("drop")[0] == sound
    assert read("relabel")[0] == [*sound, ("b", False, True)]
    with pytest.raises(ValueError, match=r"in 1 of 4 pairs .*first: row 3.*dataset.on_conflict=keep, drop or relabel"):
        read("error")
    quiet = table(safety_rows()[:3], hold_out=0.0, on_conflict="error")
    assert len(quiet.safety_pairs("train", template)) == 3
    assert not quiet.notes
    with pytest.raises(ValueError, match="none is left"):
        table(safety_rows()[3:], hold_out=0.0, on_conflict="drop").safety_pairs("train", template)


def test_rankings_are_read_in_their_order_or_by_their_ranks(table, template):
    rows = [{"prompt": "p", "responses": ["a", "b", "c"]}, {"prompt": "q", "responses": ["a", "b"]}]
    read = table(rows, hold_out=0.0).rankings("train", template)
    assert [(r.prompt.request, r.responses) for r in read] == [("p", ("a", "b", "c")), ("q", ("a", "b"))]
    ranked = [{"prompt": "p", "answers": ["a", "b", "c"], "place": [3, 1, 2]}]
    data = table(ranked, columns={"responses": "answers", "ranks": "place"}, hold_out=0.0)
    assert data.rankings("train", template)[0].responses == ("b", "c", "a")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"responses": ["a"]}, "row 1.*expected two or more"),
        ({"responses": "a b"}, "row 1.*expected two or more"),
        ({"responses": ["a", "b"], "ranks": [1, 1]}, "row 1.*expected 2 different numbers"),
        ({"responses": ["a", "b"], "ranks": [1]}, "row 1.*expected 2 different numbers"),
        ({"responses": ["a", "a"]}, "equal responses.*row 1"),
        ({"responses": ["a", None]}, "an empty response.*row 1"),
    ],
)
def test_rankings_that_rank_nothing_are_refused(table, template, row, said):
    rows = [{"prompt": "p", "responses": ["a", "b"], "ranks": None}, {"prompt": "q", **row}]
    with pytest.raises(ValueError, match=said):
        table(rows, hold_out=0.0).rankings("train", template)


def test_a_condition_is_read_after_the_request_and_is_part_of_what_makes_a_row_new(table, template):
    pair = {"prompt": "how do i", "chosen": "good luck", "rejected": "enjoy"}
    turned = {**pair, "chosen": "enjoy", "rejected": "good luck"}
    rows = [{**pair, "condition": "please"}, {**turned, "condition": "first"}, {**pair, "condition": None}]
    read = table(rows, hold_out=0.0).preferences("train", template)
    assert [p.prompt.condition for p in read] == ["please", "first", ""]
    written = [template.text(template.prompt_tokens(p.prompt)) for p in read]
    assert "how do i please" in written[0]
    assert "how do i first" in written[1]
    assert "please" not in written[2]
    # a run on prompts draws conditions of its own, so here they are nothing and the prompts are one
    kept = table(rows, hold_out=0.0, bad_rows="drop").prompts("train", template)
    assert [prompt.condition for prompt in kept] == [""]


def test_a_condition_that_the_tokenizer_cannot_read_is_refused(table, template):
    rows = [{"prompt": "how do i", "chosen": "good luck", "rejected": "enjoy", "condition": "please <helpful>"}]
    with pytest.raises(ValueError, match=r"does not know, \['<helpful>'\] \(model.new_tokens adds them\)"):
        table(rows, hold_out=0.0).preferences("train", template)


def test_needed_columns_are_named(table, template):
    for read, said in (("prompts", "'prompt'"), ("demonstrations", "'prompt'"), ("safety_pairs", "'prompt'")):
        with pytest.raises(ValueError, match=said):
            getattr(table([{"text": "x"}]), read)("train", template)
    with pytest.raises(ValueError, match="'chosen' and 'rejected', or 'response_0'"):
        table([{"prompt": "x"}]).preferences("train", template)


def test_a_mapped_column_that_no_row_has_is_refused_by_what_reads_it(table, template):
    row = {"prompt": "p", "response": "r", "chosen": "good", "rejected": "bad", "margin": 2}
    data = table([row], columns={"margin": "margins"})
    with pytest.raises(ValueError, match=r"\['chosen', 'margin', .*but dataset.columns.margin says 'margins'; name"):
        data.preferences("train", template)
    assert len(data.prompts("train", template)) == len(data.demonstrations("train", template)) == 1
    conditioned = table([row, {**row, "prompt": "q", "told": "please"}], columns={"condition": "told"}, hold_out=0.0)
    assert [p.prompt.condition for p in conditioned.preferences("train", template)] == ["", "please"]
    with pytest.raises(ValueError, match=r"dataset.columns.chosen says 'best'"):
        table([{**row, "response_0": "a", "response_1": "b", "better": 0}], columns={"chosen": "best"}).preferences(
            "train", template
        )


@pytest.mark.parametrize(
    ("kind", "read"), [("better_response_id", "preferences"), ("safer_response_id", "safety_pairs"), ("", "prompts")]
)
def test_a_shared_mapping_is_held_against_what_is_read_only(table, template, kind, read):
    columns = yaml.safe_load((CONF / "pku_saferlhf.yaml").read_text())["columns"]
    row = {"prompt": "p", "response_0": "a", "response_1": "b", kind: 1}
    if read == "safety_pairs":
        row |= {"is_response_0_safe": False, "is_response_1_safe": True}
    assert len(getattr(table([row], columns=columns), read)("train", template)) == 1


def test_texts_of_a_csv_file_stay_as_they_are_written_under_any_name(tmp_path, template):
    (tmp_path / "train.csv").write_text("q,response,score\n007,0,1\n8,1.50,2\n")
    data = Dataset(**{**DEFAULTS, "path": str(tmp_path), "columns": {"prompt": "q"}, "hold_out": 0.0})
    read = [(d.prompt.request, d.response) for d in data.demonstrations("train", template)]
    assert read == [("007", "0"), ("8", "1.50")]


def test_a_response_of_zero_is_not_an_empty_one(table, template):
    [read] = table([{"prompt": "how many ?", "response": 0}]).demonstrations("train", template)
    assert read.response == "0"
    [ranked] = table([{"prompt": "how many ?", "responses": [0, 1]}]).rankings("train", template)
    assert ranked.responses == ("0", "1")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"margin": float("nan")}, "margin is nan"),
        ({"margin": "much"}, "margin is 'much'"),
        ({"score_chosen": 1.0, "score_rejected": float("-inf")}, "score_rejected is -inf"),
        ({"score_wit_chosen": None, "score_wit_rejected": 1.0}, "score_wit_chosen is None"),
    ],
)
def test_margins_and_scores_that_are_no_numbers_are_refused(table, template, columns, said):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(2)]
    with pytest.raises(ValueError, match=rf"\(train\), row 1: {said}; expected a finite number"):
        table([rows[0], {**rows[1], **columns}], hold_out=0.0).preferences("train", template)


def couple(strong, weak, **columns):
    """A row of two pairs, for these prompts."""
    sides = {"strong": strong, "weak": weak}
    return {
        f"{side}_{name}": text
        for side, prompt in sides.items()
        for name, text in (("prompt", prompt), ("chosen", "good"), ("rejected", "bad"))
    } | columns


def test_the_two_pairs_of_a_quadruple_have_conditions_of_their_own(table, template):
    rows = [
        couple("p", "q", strong_condition="please", weak_condition="first"),
        couple("p", "q", strong_condition="first", weak_condition=""),
        couple("p", "p", strong_condition="first", weak_condition="please"),  # two tastes in one pair
    ]
    read = table(rows, hold_out=0.0).quadruples("train", template)
    told = [(q.strong.prompt.condition, q.weak.prompt.condition) for q in read]
    assert told == [("please", "first"), ("first", ""), ("first", "please")]
    [both] = table([couple("p", "q", condition="please")]).quadruples("train", template)
    assert (both.strong.prompt.condition, both.weak.prompt.condition) == ("please", "please")


def test_a_quadruple_that_comes_twice_is_a_bad_row(table, template):
    rows = [couple("p", "q"), couple("q", "p"), couple("p", "q"), couple("p", "r")]
    with pytest.raises(ValueError, match=r"1 with a duplicate of an earlier row \(first: row 2\), of 4 rows"):
        table(rows, hold_out=0.0).quadruples("train", template)
    read = table(rows, hold_out=0.0, bad_rows="drop").quadruples("train", template)
    assert [(q.strong.prompt.request, q.weak.prompt.request) for q in read] == [("p", "q"), ("q", "p"), ("p", "r")]


def test_quadruples_are_held_out_by_their_strong_prompts_and_that_is_said(table, template):
    data = table([couple(f"p {i // 2}", f"q {i}") for i in range(100)])
    assert data.splits == ("test",)
    ours, theirs = ({q.strong.prompt.id for q in data.quadruples(s, template)} for s in ("train", "test"))
    assert not ours & theirs
    assert len(ours) + len(theirs) == 50
    assert "by a hash of their strong_prompt" in data.notes[0]


def test_what_has_nothing_to_be_held_out_by_is_refused(table):
    with pytest.raises(ValueError, match=r"columns \['a'\].*hash of 'prompt'.*dataset.columns.prompt=.*hold_out=0"):
        _ = table([{"a": "x"}, {"a": "y"}]).splits
    lone = table([{"prompt": "x"}] * 2)
    assert lone.splits == ()
    assert "one split and one prompt: nothing is held out" in lone.notes[0]


def test_tables_made_of_splits_have_names_of_their_own(table):
    data = table(numbered(4), test=numbered(4))
    assert data.made == {"train": "train", "test": "test"}
    assert table(numbered(4), eval_splits=["train"]).made == {"train": "train"}
    with pytest.raises(ValueError, match=r"training split 'test' of .* is called 'train', but so is a held-out split"):
        _ = table(numbered(4), test=numbered(4), train_split="test").made
    world = Dataset(**{**DEFAULTS, "path": WORLD, "train_size": 8, "train_split": "sft", "eval_splits": ["train"]})
    world.check()
    with pytest.raises(ValueError, match=r"'sft' of embedded.*dataset.eval_splits"):
        world.check(is_copied=True)


def test_the_world_has_gold_scores_and_no_end_or_list_of_splits(template):
    world = Dataset(**{**DEFAULTS, "path": WORLD, "train_size": 8, "eval_splits": ["test"], "eval_size": 4})
    assert set(world.gold) == {"helpfulness", "cost", "humour"}
    assert (len(world.prompts("train", template)), len(world.prompts("test", template))) == (8, 4)
    with pytest.raises(ValueError, match="draws prompts and demonstrations only"):
        world.preferences("train", template)
    with pytest.raises(ValueError, match="train_size is null"):
        Dataset(**{**DEFAULTS, "path": WORLD, "eval_splits": ["test"]})
    with pytest.raises(ValueError, match="eval_splits is null"):
        Dataset(**{**DEFAULTS, "path": WORLD, "train_size": 8})
