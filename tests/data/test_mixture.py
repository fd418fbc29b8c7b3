"""Mixtures hold exactly what their shares say, chosen by a score, each row under its own condition."""

import json
from collections import Counter
from typing import Any

import pytest

from rlhf_lab.data import tiny_help
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.mixture import Ingredient, Mixture, apportion
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.models import load_tokenizer

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
    with pytest.raises(ValueError, match="is of demonstrations, but preferences are needed"):
        mixture(humour=ingredient()).check((), "preferences")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="write conversations differently"):
        mixture(a=ingredient(), b=ingredient(dataset=world(template="dialogue")))
    with pytest.raises(ValueError, match=r"dataset\.parts is empty"):
        mixture()
