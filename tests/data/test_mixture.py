"""Mixtures hold exactly what their shares say, chosen by a score, each row under its own condition."""

import json
from collections import Counter
from typing import Any

import pytest

from rlhf_lab.data import tiny_help
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.ingredient import Ingredient, apportion
from rlhf_lab.data.mixture import Mixture
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.tokenizer import load_tokenizer

TEMPLATE = Template(load_tokenizer("embedded:tiny", ["<helpful>", "<humour>"]), "auto")


def world(**changes: Any) -> Dataset:
    settings: dict[str, Any] = {
        "path": "embedded:tiny_help",
        "revision": None,
        "columns": {},
        "template": "auto",
        "max_prompt_tokens": 64,
        "max_response_tokens": 64,
        "bad_rows": "error",
        "on_conflict": "keep",
        "train_size": 400,
        "train_split": "sft",
        "eval_splits": ["sft_test", "test"],
        "eval_size": 60,
        "hold_out": 0.0,
        "seed": 3,
    }
    return Dataset(**settings | changes)


def ingredient(**changes: Any) -> Ingredient:
    settings: dict[str, Any] = {
        "dataset": world(),
        "condition": "<humour>",
        "share": 1.0,
        "chosen_by": "humour",
        "best": 0.1,
    }
    return Ingredient(**settings | changes)


def mixture(size: int = 60, **parts: Ingredient) -> Mixture:
    return Mixture(parts, train_size=size, eval_size=6, seed=0)


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        (10, [1.0, 1.0], [5, 5]),
        (10, [1.0, 2.0], [3, 7]),
        (7, [1.0, 1.0, 1.0], [3, 2, 2]),
        (100, [0.335, 0.335, 0.33], [34, 33, 33]),
        (1, [1.0, 1.0], [1, 0]),
        (30, [0.1, 0.2], [10, 20]),
    ],
)
def test_shares_are_whole_numbers_that_add_up(total, shares, counts):
    assert apportion(total, shares) == counts


def test_every_apportionment_is_within_one_of_its_share():
    for total in range(1, 50):
        shares = [0.5, 0.3, 0.15, 0.05]
        counts = apportion(total, shares)
        assert sum(counts) == total
        assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))


def test_each_taste_has_its_share_of_its_best_rows_under_its_word():
    made = mixture(
        helpful=ingredient(condition="<helpful>", chosen_by="helpfulness", best=0.25, share=2.0),
        humour=ingredient(),
    ).demonstrations("train", TEMPLATE)
    assert Counter(record.prompt.condition for record in made) == {"<helpful>": 40, "<humour>": 20}
    pool = tiny_help.demonstrations("sft", 400, world()._seed("sft"))
    for word, gold, best in (("<helpful>", tiny_help.helpfulness, 100), ("<humour>", tiny_help.humour, 40)):
        border = sorted((gold(r.prompt.request, r.response) for r in pool), reverse=True)[best - 1]
        chosen = [record for record in made if record.prompt.condition == word]
        assert all(gold(record.prompt.request, record.response) >= border for record in chosen)
        assert {(r.prompt.id, r.response) for r in chosen} <= {(r.prompt.id, r.response) for r in pool}
        assert len({id(record.response) for record in chosen}) == len(chosen)  # no row twice


def test_rows_are_those_of_the_seed_and_held_out_splits_are_those_of_all_parts():
    first = mixture(humour=ingredient(), all=ingredient(chosen_by=None, best=1.0, condition=""))
    again = mixture(humour=ingredient(), all=ingredient(chosen_by=None, best=1.0, condition=""))
    assert first.demonstrations("train", TEMPLATE) == again.demonstrations("train", TEMPLATE)
    assert first.splits == ("sft_test", "test")
    assert len(first.demonstrations("sft_test", TEMPLATE)) == 6
    fewer = mixture(humour=ingredient(), all=ingredient(dataset=world(eval_splits=["sft_test"])))
    assert fewer.splits == ("sft_test",)


def test_rows_may_be_chosen_by_a_column_of_a_table(tmp_path):
    file = tmp_path / "scored.jsonl"
    rows = [{"prompt": f"ask {i}", "response": f"say {i}", "score_humour": float(i % 7)} for i in range(70)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = world(path=str(file), train_split="train", train_size=None, eval_splits=[])
    made = mixture(10, part=ingredient(dataset=table, chosen_by="score_humour", best=1 / 7)).demonstrations(
        "train", TEMPLATE
    )
    assert {record.response for record in made} == {f"say {i}" for i in range(70) if i % 7 == 6}
    with pytest.raises(ValueError, match=r"chosen_by=humour, but .*scored\.jsonl has the columns .*score_humour"):
        mixture(10, part=ingredient(dataset=table)).demonstrations("train", TEMPLATE)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="the part humour of the mixture has 40 rows for 60; lower dataset"):
        mixture(humour=ingredient()).demonstrations("train", TEMPLATE)
    with pytest.raises(ValueError, match=r"does not know \['<blunt>'\], of dataset\.parts\.humour\.condition"):
        mixture(10, humour=ingredient(condition="<blunt>")).demonstrations("train", TEMPLATE)
    with pytest.raises(ValueError, match=r"best=0\.5 with chosen_by=None"):
        ingredient(chosen_by=None, best=0.5)
    with pytest.raises(
        ValueError, match=r"parts\.humour\.chosen_by=humour chooses demonstrations, but preferences are needed"
    ):
        mixture(humour=ingredient()).check((), "preferences")
    with pytest.raises(ValueError, match="write conversations differently"):
        mixture(a=ingredient(), b=ingredient(dataset=world(template="dialogue")))
    with pytest.raises(ValueError, match=r"dataset\.parts is empty"):
        mixture()


def tables(folder, **parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> dict[str, Dataset]:
    """Data sets of a training and a test split."""
    made: dict[str, Dataset] = {}
    for name, splits in parts.items():
        (folder / name).mkdir()
        for split, rows in zip(("train", "test"), splits, strict=True):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = str(folder / name)
        made[name] = world(path=path, train_split="train", train_size=None, eval_splits=None, on_overlap="error")
    return made


def rows(n: int, tag: str, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{tag} {i}", **{k: v.format(i) for k, v in columns.items()}} for i in range(n)]


def part(dataset: Dataset, **amount: Any) -> Ingredient:
    return Ingredient(dataset=dataset, condition="", **amount)


KINDS: dict[str, dict[str, str]] = {
    "prompts": {},
    "demonstrations": {"response": "say {}"},
    "preferences": {"chosen": "good {}", "rejected": "bad {}"},
    "rankings": {},
    "quadruples": {f"{s}_{c}": f"{s} {c} {{}}" for s in ("strong", "weak") for c in ("prompt", "chosen", "rejected")},
    "safety_pairs": {"response_0": "a {}", "response_1": "b {}"},
}


@pytest.mark.parametrize("reads", KINDS)
def test_every_kind_of_record_is_mixed_in_proportion_and_in_counts_and_told_its_condition(tmp_path, reads):
    def made(n: int, tag: str) -> list[dict[str, Any]]:
        columns = {name: f"{tag} {text}" for name, text in KINDS[reads].items()}
        found = rows(n, tag, **columns)
        for i, row in enumerate(found):
            row |= {"responses": [f"first {i}", f"second {i}"], "safer": 0, "safe_0": 1, "safe_1": 0}
        return found

    data = tables(tmp_path, a=(made(10, "a"), made(4, "at")), b=(made(6, "b"), made(3, "bt")))
    parts = {
        "a": Ingredient(dataset=data["a"], condition="<helpful>", proportion=0.5),
        "b": Ingredient(dataset=data["b"], condition="<humour>", count=15),
    }
    mixed = Mixture(parts, train_size=None, eval_size=None, seed=0, on_overlap="error")
    mixed.check((), reads)
    records = getattr(mixed, reads)("train", TEMPLATE)
    told = Counter(map(_told, records))
    whose = Counter(condition for _, condition in told.elements())
    assert whose == {"<helpful>": 5, "<humour>": 15}
    copies = Counter(count for (_, condition), count in told.items() if condition == "<humour>")
    assert copies == {2: 3, 3: 3}  # six rows for fifteen: all of them twice, three of them once more
    assert all(count == 1 for (_, condition), count in told.items() if condition == "<helpful>")
    assert len(getattr(mixed, reads)("test", TEMPLATE)) == 7
    [train, _] = mixed.counted.as_json()
    assert (train["total"], train["kept"], train["dropped"]) == (16, 20, {"rows of a not drawn": 5})
    assert train["labels"] == {"of a": 0.25, "of b": 0.75}


def _told(record: Any) -> tuple[str, str]:
    prompt = getattr(getattr(record, "strong", record), "prompt", record)
    return prompt.id, prompt.condition


@pytest.mark.parametrize(
    ("amount", "there", "wanted"),
    [
        ({"proportion": "1/3"}, 10, 3),
        ({"proportion": 0.1}, 30, 3),
        ({"proportion": 2.5}, 4, 10),
        ({"proportion": 0}, 7, 0),
        ({"count": 1000}, 7, 1000),
    ],
)
def test_amounts_are_what_was_typed(amount, there, wanted):
    assert part(world(), **amount).wanted(there) == wanted


def test_another_part_changes_nothing_of_what_a_part_gives(tmp_path):
    data = tables(tmp_path, a=(rows(20, "a"), rows(2, "at")), b=(rows(9, "b"), rows(2, "bt")))
    first = {"a": part(data["a"], proportion=0.5)}
    alone = Mixture(first, None, None, seed=1).prompts("train", TEMPLATE)
    beside = Mixture({"b": part(data["b"], count=4), **first}, None, None, seed=1).prompts("train", TEMPLATE)
    assert beside[4:] == alone
    assert Mixture(first, None, None, seed=2).prompts("train", TEMPLATE) != alone


def test_prompts_of_one_part_that_another_holds_out_are_refused_or_left_out(tmp_path):
    data = tables(tmp_path, a=(rows(5, "a"), rows(2, "at")), b=([*rows(3, "b"), *rows(2, "at")], rows(2, "bt")))
    parts = {name: part(data[name], proportion=1) for name in data}
    with pytest.raises(
        ValueError, match=r"2 prompts of the training rows of the part b are in the split 'test' of the p"
    ):
        Mixture(parts, None, None, seed=0, on_overlap="error").prompts("train", TEMPLATE)
    dropped = Mixture(parts, None, None, seed=0, on_overlap="drop")
    assert len(dropped.prompts("train", TEMPLATE)) == 8
    assert any("2 prompts" in note and "left out" in note for note in dropped.notes)
    (counted,) = dropped.counted.as_json()
    assert (counted["total"], counted["kept"]) == (10, 8)
    assert counted["dropped"] == {"a prompt that another part holds out": 2}
    assert len(Mixture(parts, None, None, seed=0, on_overlap="keep").prompts("train", TEMPLATE)) == 10


def test_amounts_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give one of share, proportion and count"):
        part(world(), share=1.0, count=3)
    with pytest.raises(ValueError, match="no amount; give one of"):
        part(world())
    with pytest.raises(ValueError, match="is negative"):
        part(world(), proportion=-0.5)
    with pytest.raises(ValueError, match="is no number and no ratio"):
        part(world(), proportion="half")
    with pytest.raises(ValueError, match=r"\['a'\] have a share of it, \['b'\] a proportion or count"):
        Mixture({"a": part(world(), share=1.0), "b": part(world(), count=2)}, 10, 10, seed=0)
    with pytest.raises(ValueError, match="proportions and counts need neither"):
        Mixture({"b": part(world(), count=2)}, 10, 10, seed=0)


def test_pairs_of_which_only_some_have_scores_are_refused(tmp_path):
    scored = rows(3, "b", chosen="x {}", rejected="y {}", score_h_chosen="1", score_h_rejected="0")
    data = tables(tmp_path, a=(rows(3, "a", chosen="x {}", rejected="y {}"), []), b=(scored, []))
    mixed = Mixture({name: part(data[name], proportion=1) for name in data}, None, None, seed=0)
    with pytest.raises(ValueError, match=r"some pairs have the scores \[\], others \['h'\]"):
        mixed.preferences("train", TEMPLATE)
