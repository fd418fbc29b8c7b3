"""Every named source, from files of its own schema to records: what `dataset=<name>` reads and what it leaves out."""

import gzip
import json
import lzma
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from pyarrow import parquet

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Template

CONF = Path(__file__).resolve().parents[2] / "conf"
# what is our own: the embedded world, and a person's table
OWN = {"table", *(file.stem for file in (CONF / "dataset").glob("tiny_help*.yaml"))}
Rows = list[dict[str, Any]]


@dataclass
class Source:
    """Files of a source, what it becomes by split and kind of record, and what is said of the rows that are left out.

    A record is told as its request and its texts; a conversation by its last request.
    """

    files: dict[str, Rows]
    become: dict[tuple[str, str], list[tuple[Any, ...]]]
    said: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    at: str = ""  # what dataset.path names, of the folder of these files


def hh(*turns: str, last: str) -> str:
    roles = ("Human", "Assistant")
    said = "".join(f"\n\n{roles[place % 2]}: {turn}" for place, turn in enumerate(turns))
    return f"{said}\n\nAssistant: {last}"


def hh_row(*turns: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": hh(*turns, last=chosen), "rejected": hh(*turns, last=rejected)}


HH = [
    hh_row("hi", chosen="hello", rejected="go away"),
    hh_row("how do i bake ?", "mix first", "then ?", chosen=" bake it\n", rejected=""),
    hh_row("what ?", chosen="same", rejected="same"),
    {"chosen": hh("a", "b", "c", last="d"), "rejected": hh("a", "x", "c", last="e")},
    {"chosen": hh("a", last="b") + "\n\nHuman: c", "rejected": hh("a", last="d")},
    {"chosen": "hello", "rejected": "no"},
]
HH_TEST = [hh_row("bye", chosen="see you", rejected="ok")]
HH_BECOMES = {
    ("train", "preferences"): [("hi", "hello", "go away")],
    ("train", "demonstrations"): [("hi", "hello"), ("then ?", " bake it\n"), ("what ?", "same")],
    ("train", "prompts"): [("hi",), ("then ?",), ("what ?",)],
    ("test", "preferences"): [("bye", "see you", "ok")],
}
HH_SAID = [
    "1 with an empty response",
    "1 with equal responses",
    "1 with dialogues that part ways before the last answer",
    "1 with a dialogue that does not end with the assistant",
    "1 with a text that is no dialogue of Human and Assistant",
]


def safe(prompt: str, **changes: Any) -> dict[str, Any]:
    row = {
        "prompt": prompt, "response_0": "do it", "response_1": "better not", "is_response_0_safe": False,
        "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1,
    }  # fmt: skip
    return row | changes


# what the second release has beside the columns of the first
NEWER = {
    "prompt_source": "x", "response_0_source": "Alpaca-7B", "response_1_source": "Alpaca-7B",
    "response_0_harm_category": {"Violence": True}, "response_0_severity_level": 2, "response_1_severity_level": 0,
    "response_0_sha256": "0", "response_1_sha256": "1",
}  # fmt: skip
SAFE_BECOMES = {
    ("train", "preferences"): [("p", "do it", "better not"), ("q", "better not", "do it")],
    ("train", "safety_pairs"): [("p", "better not", "do it"), ("q", "better not", "do it")],
    ("train", "prompts"): [("p",), ("q",)],
}


def talk(request: str, answer: str) -> Rows:
    return [{"content": request, "role": "user"}, {"content": answer, "role": "assistant"}]


def binarized(request: str, chosen: str, rejected: str, *scores: float) -> dict[str, Any]:
    sides = {"chosen": talk(request, chosen), "rejected": talk(request, rejected)}
    named = dict(zip(("score_chosen", "score_rejected"), scores, strict=True))
    return {"prompt": request, "prompt_id": request, "messages": talk(request, chosen), **sides, **named}


UF = [
    binarized("a", "good", "bad", 8.5, 4.0),
    binarized("b", "fine", "poor", 5.0, 5.0),
    binarized("c", "", "bad", 7.0, 2.0),
    binarized("d", "same", "same", 6.0, 5.5),
    binarized("e", "one", "two", 3.0, 2.0),
]
UF_FILES = {
    "data/train_prefs-00000-of-00001.parquet": UF,
    "data/test_prefs-00000-of-00001.parquet": UF[:2],
    "data/train_sft-00000-of-00001.parquet": UF[2:],
    "data/test_sft-00000-of-00001.parquet": UF[:1],
}


def asked(instruction: str, given: str = "", **others: Any) -> dict[str, Any]:
    return {"instruction": instruction, "input": given, **others}


HEADING = "\n\n### Input:\n"
ALPACA = [asked("Add.", "1, 2", output="3"), asked("Greet.", output="hi"), asked("Nothing.", output="")]
ALPACA_BECOMES = {
    ("train", "demonstrations"): [(f"Add.{HEADING}1, 2", "3"), ("Greet.", "hi")],
    ("train", "prompts"): [(f"Add.{HEADING}1, 2",), ("Greet.",), ("Nothing.",)],
}
FARM = [*ALPACA, asked("Feel.", output="As an AI language model, I do not.")]
FARM_FILES = {
    "alpaca_instructions/sft.json": FARM,
    "alpaca_instructions/unlabeled.json": FARM[1:],
    "alpaca_instructions/val.json": FARM[:1],
    "alpaca_human_preference.json": [
        asked("Add.", "1, 2", output_1="3", output_2="4", preference=1, raw_preference=1),
        asked("Greet.", output_1="no", output_2="hi", preference=2, raw_preference=2),
    ],
}
GOLD = [
    asked("Add.", "1, 2", answers=["3", "4"], preference=0),
    asked("Greet.", answers=["no", "hi"], preference=1),
]


def post(title: str, words: int = 3, subreddit: str = "tifu") -> dict[str, str]:
    return {"id": title, "subreddit": subreddit, "title": title, "post": " ".join(["she"] * words)}


def written(title: str, words: int = 3, subreddit: str = "tifu") -> str:
    return f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {' '.join(['she'] * words)}\nTL;DR:"


TLDR = [
    post("a") | {"summary": "left"},
    post("b", 245, "relationships") | {"summary": "stayed"},
    post("c", 246) | {"summary": "cried"},
    post("d\nPOST: e") | {"summary": "x"},
    post("f") | {"post": " ", "summary": "y"},
]
TLDR_FILES = {"train.jsonl": TLDR, "valid.jsonl": TLDR[:3], "test.jsonl": TLDR[1:3]}
TLDR_SAID = ["1 with a heading of a post inside another", "1 with no post"]
DEMONSTRATIONS = [(written("a"), "left"), (written("b", 245, "relationships"), "stayed"), (written("c", 246), "cried")]


def compared(info: dict[str, Any], first: str, second: str, choice: int, batch: str = "batch3") -> dict[str, Any]:
    whole = {"id": "", "post": None, "title": None, "subreddit": None, "site": None, "article": None} | info
    summaries = [{"text": first, "policy": "sup2", "note": None}, {"text": second, "policy": "ref", "note": "x"}]
    extra = {"confidence": 7}
    return {
        "info": whole,
        "summaries": summaries,
        "choice": choice,
        "worker": "w",
        "batch": batch,
        "split": "train",
        "extra": extra,
    }


COMPARED = [
    compared(post("a"), " left", " right", 0),
    compared(post("b", 245, "relationships"), " left", " right", 1),
    compared(post("c", 246), " left", " right", 1),
]
CNN = compared({"article": "a fire"}, " burnt", " wet", 1, "cnndm4")
TLDR_PREFERENCES_FILES = {
    "data/train-00000-of-00001.json": COMPARED,
    "data/validation-00000-of-00001.json": COMPARED[:1],
    "data/test-00000-of-00001.json": COMPARED[1:],
}
COMPARISON_FILES = {
    "comparisons/train/0000.parquet": COMPARED,
    "comparisons/validation/0000.parquet": [*COMPARED[:1], CNN],
}
PAIRS = [
    (written("a"), " left", " right"),
    (written("b", 245, "relationships"), " right", " left"),
    (written("c", 246), " right", " left"),
]
ARTICLE = "ARTICLE: a fire\nTL;DR:"
MARKED = {
    "info": post("a") | {"article": None, "site": None},
    "summary": {
        "text": " left", "policy": "ref", "note": "",
        "axes": {"overall": 6, "accuracy": 7, "coverage": 5, "coherence": 7, "compatible": None},
    },
    "worker": "w", "batch": "axis1", "split": "valid1",
}  # fmt: skip

HELD = ["dataset.hold_out=0.0", "dataset.eval_splits=[]"]  # a single split, of which nothing is held out here

SOURCES: dict[str, Source] = {
    "hh_rlhf": Source(
        {
            "harmless-base/train.jsonl.gz": HH[:3], "helpful-base/train.jsonl.gz": HH[3:4],
            "helpful-online/train.jsonl.gz": HH[4:5], "helpful-rejection-sampled/train.jsonl.gz": HH[5:],
            "harmless-base/test.jsonl.gz": HH_TEST, "helpful-base/test.jsonl.gz": HH_TEST,
            "helpful-online/test.jsonl.gz": HH_TEST, "helpful-rejection-sampled/test.jsonl.gz": HH_TEST,
        },
        HH_BECOMES,
        [*HH_SAID, "3 with a duplicate of an earlier row"],
    ),
    "hh_rlhf_harmless": Source(
        {"harmless-base/train.jsonl.gz": HH, "harmless-base/test.jsonl.gz": HH_TEST}, HH_BECOMES, HH_SAID
    ),
    "hh_rlhf_helpful": Source(
        {
            "helpful-base/train.jsonl.gz": HH[:1], "helpful-online/train.jsonl.gz": HH[1:2],
            "helpful-rejection-sampled/train.jsonl.gz": HH[2:], "helpful-base/test.jsonl.gz": HH_TEST,
            "helpful-online/test.jsonl.gz": HH_TEST, "helpful-rejection-sampled/test.jsonl.gz": HH_TEST,
        },
        HH_BECOMES,
        HH_SAID,
    ),
    "hh_rlhf_processed": Source(
        {
            f"{part}/{split}.jsonl.xz": [
                {
                    "context": [
                        {"role": "human", "text": f"{part} ?"}, {"role": "assistant", "text": "first"},
                        {"role": "human", "text": f"then , {part} ?"},
                    ],
                    "chosen": {"role": "assistant", "text": "yes"},
                    "rejected": {"role": "assistant", "text": "no"},
                }
            ]             for split in ("train", "test")
            for part in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
        },
        {
            ("train", "preferences"): [
                (f"then , {part} ?", "yes", "no")
                for part in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
            ],
            ("test", "demonstrations"): [
                (f"then , {part} ?", "yes")
                for part in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
            ],
        },
    ),
    "pku_saferlhf": Source(
        {
            "data/Alpaca-7B/train.jsonl": [safe("p") | NEWER],
            "data/Alpaca3-8B/train.jsonl": [safe("q", better_response_id=1) | NEWER],
            "data/Alpaca3-8B/test.jsonl": [safe("r") | NEWER],
        },
        SAFE_BECOMES | {("test", "safety_pairs"): [("r", "better not", "do it")]},
    ),
    "pku_saferlhf_30k": Source(
        {"train.jsonl.xz": [safe("p"), safe("q", better_response_id=1)], "test.jsonl.xz": [safe("r")]},
        SAFE_BECOMES | {("test", "safety_pairs"): [("r", "better not", "do it")]},
    ),
    "pku_saferlhf_10k": Source(
        {"train.jsonl.xz": [safe("p"), safe("q", better_response_id=1)]},
        SAFE_BECOMES,
        settings=HELD,
    ),
    "ultrafeedback": Source(
        UF_FILES,
        {
            ("train", "preferences"): [("a", "good", "bad", 4.5), ("b", "fine", "poor", 0.0), ("e", "one", "two", 1.0)],
            ("test", "preferences"): [("a", "good", "bad", 4.5), ("b", "fine", "poor", 0.0)],
        },
        ["1 with an empty response", "1 with equal responses"],
    ),
    "ultrafeedback_filtered": Source(
        UF_FILES,
        {
            ("train", "preferences"): [("a", "good", "bad", 4.5), ("e", "one", "two", 1.0)],
            ("test", "preferences"): [("a", "good", "bad", 4.5)],
        },
        ["1 with the least margin, 0", "1 with an empty response", "1 with equal responses"],
    ),
    "ultrafeedback_sft": Source(
        UF_FILES,
        {
            ("train", "demonstrations"): [("d", "same"), ("e", "one")],
            ("test", "demonstrations"): [("a", "good")],
        },
        ["1 with an empty response"],
    ),
    "alpaca": Source(
        {"data/train-00000-of-00001.parquet": ALPACA},
        ALPACA_BECOMES,
        ["1 with an empty response"],
        ["dataset.hold_out=0.0"],
    ),
    "alpaca_gpt4": Source(
        {"data/train-00000-of-00001.parquet": ALPACA},
        ALPACA_BECOMES,
        ["1 with an empty response"],
        ["dataset.hold_out=0.0"],
    ),
    "personalized_soups": Source(
        {
            "annotations.json": [
                asked("Greet.", preference_prompt="be short", output_1="hi", output_2="hello there", preference=1),
                asked("Greet.", preference_prompt="be kind", output_1="hi", output_2="hello there", preference=2),
                asked("Greet.", preference_prompt="be odd", output_1="hi", output_2="hello there", preference=0),
            ]
        },
        {("train", "preferences"): [("Greet.", "hi", "hello there"), ("Greet.", "hello there", "hi")]},
        ["1 with no preference"],
        ["dataset.hold_out=0.0"],
        "annotations.json",
    ),
    "alpaca_farm": Source(
        FARM_FILES,
        {
            ("train", "demonstrations"): ALPACA_BECOMES["train", "demonstrations"],
            ("val", "demonstrations"): ALPACA_BECOMES["train", "demonstrations"][:1],
        },
        ["1 with the words 'as an AI'", "1 with an empty response"],
    ),
    "alpaca_farm_unlabeled": Source(
        FARM_FILES,
        {("train", "prompts"): [("Greet.",), ("Nothing.",)], ("val", "prompts"): [(f"Add.{HEADING}1, 2",)]},
        ["1 with the words 'as an AI'"],
    ),
    "alpaca_farm_preferences": Source(
        FARM_FILES,
        {("train", "preferences"): [(f"Add.{HEADING}1, 2", "3", "4"), ("Greet.", "hi", "no")]},
        settings=HELD,
    ),
    "alpaca_farm_gold_preferences": Source(
        {"train/sft.json": GOLD[:1], "train/unlabelled.json": GOLD[1:], "val.json": GOLD},
        {
            ("train", "preferences"): [(f"Add.{HEADING}1, 2", "3", "4"), ("Greet.", "hi", "no")],
            ("validation", "demonstrations"): [(f"Add.{HEADING}1, 2", "3"), ("Greet.", "hi")],
        },
    ),
    "alpaca_farm_gold_generations": Source(
        {
            "validation/split_1.json": [
                asked("Greet.", answers=[f"a{k}" for k in range(20)], gold_scores=[0.5 * k for k in range(20)])
            ]
        },
        {("validation", "demonstrations"): [("Greet.", f"a{k}") for k in range(16)]},
    ),
    "alpaca_farm_id_test": Source(
        {"default/train/0000.parquet": [{"instruction": "Greet.", "dataset": "si-alpaca-id", "output": "hi"}]},
        {("test", "demonstrations"): [("Greet.", "hi")], ("test", "prompts"): [("Greet.",)]},
    ),
    "sequential_instructions": Source(
        {"data/train-00000-of-00001-2.parquet": [{"instruction": "Do a, then b.", "dataset": "si", "output": "ab"}]},
        {("test", "demonstrations"): [("Do a, then b.", "ab")]},
    ),
    "koala": Source({"test.jsonl": [{"id": "k1", "prompt": "why ?"}]}, {("test", "prompts"): [("why ?",)]}),
    "tldr": Source(
        TLDR_FILES,
        {
            ("train", "demonstrations"): DEMONSTRATIONS,
            ("validation", "prompts"): [(text,) for text, _ in DEMONSTRATIONS],
            ("test", "demonstrations"): DEMONSTRATIONS[1:],
        },
        TLDR_SAID,
    ),
    "tldr_queries": Source(TLDR_FILES, {("train", "prompts"): [(text,) for text, _ in DEMONSTRATIONS]}, TLDR_SAID),
    "tldr_length": Source(
        TLDR_FILES,
        {
            ("train", "demonstrations"): DEMONSTRATIONS[:2],
            ("validation", "demonstrations"): DEMONSTRATIONS[:2],
            ("validation_ood", "demonstrations"): DEMONSTRATIONS[2:],
            ("test", "demonstrations"): DEMONSTRATIONS[1:2],
            ("test_ood", "demonstrations"): DEMONSTRATIONS[2:],
        },
        TLDR_SAID,
    ),
    "tldr_subreddit": Source(
        TLDR_FILES,
        {
            ("train", "demonstrations"): DEMONSTRATIONS[1:2],
            ("validation_ood", "demonstrations"): [DEMONSTRATIONS[0], DEMONSTRATIONS[2]],
            ("test", "demonstrations"): DEMONSTRATIONS[1:2],
        },
        TLDR_SAID,
    ),
    "tldr_sentiment": Source(
        {
            f"{split}.parquet": [
                {"prompt": written("a"), "response": "left", "score_sentiment": 0.0},
                {"prompt": written("c"), "response": "cried", "score_sentiment": -0.1},
            ]
            for split in ("train", "validation", "test")
        },
        {
            ("train", "demonstrations"): [(written("a"), "left")],
            ("test_ood", "demonstrations"): [(written("c"), "cried")],
        },
    ),
    "tldr_preferences": Source(
        TLDR_PREFERENCES_FILES,
        {
            ("train", "preferences"): PAIRS,
            ("test", "preferences"): PAIRS[1:],
            ("validation", "prompts"): [(written("a"),)],
        },
    ),
    "tldr_preferences_length": Source(
        TLDR_PREFERENCES_FILES,
        {("train", "preferences"): PAIRS[:2], ("test_ood", "preferences"): PAIRS[2:]},
    ),
    "tldr_preferences_subreddit": Source(
        TLDR_PREFERENCES_FILES | {"data/validation-00000-of-00001.json": COMPARED},
        {
            ("train", "preferences"): PAIRS[1:2],
            ("validation_ood", "preferences"): [PAIRS[0], PAIRS[2]],
            ("test", "preferences"): PAIRS[1:2],
        },
    ),
    "cnn_dailymail": Source(
        {
            f"3.0.0/{split}-00000-of-00001.parquet": [
                {"article": "a fire", "highlights": "it burnt .\nall of it .", "id": "1"},
                {"article": "", "highlights": "x", "id": "2"},
            ]
            for split in ("train", "validation", "test")
        },
        {("train", "demonstrations"): [(ARTICLE, "it burnt .\nall of it .")]},
        ["1 with no article"],
    ),
    "cnn_dailymail_preferences": Source(
        COMPARISON_FILES, {("validation", "preferences"): [(ARTICLE, " wet", " burnt")]}, ["1 with no article"]
    ),
    "summarize_from_feedback": Source(
        COMPARISON_FILES,
        {("train", "preferences"): PAIRS, ("validation", "preferences"): PAIRS[:1]},
        ["1 with no post"],
    ),
    "summarize_from_feedback_axis": Source(
        {"axis/validation/0000.parquet": [MARKED], "axis/test/0000.parquet": [MARKED]},
        {("validation", "demonstrations"): [(written("a"), " left")]},
    ),
}  # fmt: skip


def save(file: Path, rows: Rows) -> None:
    """Rows as the source keeps them: a list or lines of JSON, packed or not, or parquet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(file.suffix, bytes)
        file.write_bytes(pack("".join(json.dumps(row) + "\n" for row in rows).encode()))


def dataset(name: str, *settings: str) -> Dataset:
    """The data set of that name, by the group alone: the rest of a run has no part in it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+dataset={name}", "+seed=0", *settings])
    return instantiate(config.dataset)


def told(record: Any, kind: str) -> tuple[Any, ...]:
    if kind == "prompts":
        return (record.request,)
    if kind == "demonstrations":
        return record.prompt.request, record.response
    return record.prompt.request, *record.responses


@pytest.fixture(scope="module")
def tokenizer(write_tokenizer):
    return write_tokenizer("gpt2", 40)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_source_becomes_records_and_says_what_it_leaves_out(name, tmp_path, tokenizer):
    source = SOURCES[name]
    for path, rows in source.files.items():
        save(tmp_path / path, rows)
    long = ["dataset.max_prompt_tokens=2048"] if name.startswith(("tldr", "summarize")) else []
    data = dataset(name, f"dataset.path={tmp_path / source.at}", "dataset.on_overlap=keep", *source.settings, *long)
    template = Template(tokenizer, data.template_style)
    notes: list[str] = []
    for (split, kind), expected in source.become.items():
        assert split in (data.train_split, *data.splits)
        records = getattr(data, kind)(split, template)
        if kind == "preferences" and name.startswith("ultrafeedback"):
            assert [(*told(record, kind), record.margin) for record in records] == expected
        else:
            assert [told(record, kind) for record in records] == expected
        notes += data.notes
    for said in source.said:
        assert any(said in note for note in notes), (said, notes)
    first = next(iter(source.become))
    data.check(reads=first[1])


def test_training_rows_whose_prompt_is_held_out_are_left_out_and_counted(tmp_path, tokenizer):
    for path, rows in SOURCES["ultrafeedback"].files.items():
        save(tmp_path / path, rows)
    data = dataset("ultrafeedback", f"dataset.path={tmp_path}")
    pairs = data.preferences("train", Template(tokenizer, data.template_style))
    assert [pair.prompt.request for pair in pairs] == ["e"]
    assert any("of the training split 'train' are in 'test' too (2 rows" in note for note in data.notes)


def test_every_data_set_of_the_configuration_is_tested():
    assert {file.stem for file in (CONF / "dataset").glob("*.yaml")} - OWN == set(SOURCES)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"tldr_sentiment", "personalized_soups"}))
def test_a_source_says_where_it_is_from_and_on_what_terms(name):
    whole, parent, revision = "", name, None
    while parent != "table":  # a source that builds on another shares what it says
        text = (CONF / f"dataset/{parent}.yaml").read_text()
        whole, own = whole + text, yaml.safe_load(text)
        revision = revision or own.get("revision")
        if "revision" in own and own["revision"] is None:
            assert "not pinned" in text
            revision = revision or "unpinned"
        [parent] = own["defaults"]
    assert revision == "unpinned" or re.fullmatch(r"[0-9a-f]{40}", str(revision))
    assert "icence" in whole
    assert "arXiv:" in whole or "github.com/" in whole


def test_what_several_columns_say_reaches_the_records(tmp_path, tokenizer):
    template = Template(tokenizer, "tldr")
    for path, rows in SOURCES["summarize_from_feedback_axis"].files.items():
        save(tmp_path / "axis" / path, rows)
    data = dataset("summarize_from_feedback_axis", f"dataset.path={tmp_path}/axis", "dataset.on_overlap=keep")
    [row], *_ = data.table("validation", "demonstrations", template)
    assert [row[f"mark_{axis}"] for axis in ("overall", "accuracy", "coverage", "coherence")] == [6, 7, 5, 7]
    for path, rows in SOURCES["personalized_soups"].files.items():
        save(tmp_path / "soups" / path, rows)
    data = dataset("personalized_soups", f"dataset.path={tmp_path}/soups/annotations.json", "dataset.hold_out=0.0")
    assert [pair.prompt.condition for pair in data.preferences("train", template)] == ["be short", "be kind"]
    for path, rows in SOURCES["alpaca_farm_gold_generations"].files.items():
        save(tmp_path / "gold" / path, rows)
    data = dataset("alpaca_farm_gold_generations", f"dataset.path={tmp_path}/gold", "dataset.shape.most=null")
    rows, *_ = data.table("validation", "demonstrations", template)
    assert [(row["sample"], row["gold_reward"]) for row in rows] == [(k, 0.5 * k) for k in range(20)]


def test_a_mapping_of_a_persons_own_columns_may_lead_into_them(tmp_path, tokenizer):
    template = Template(tokenizer, "dialogue")
    rows = [
        {
            "info": {"question": f"why {k} ?"},
            "chosen": talk("why ?", "so"),
            "rejected": talk("why ?", "no"),
            "marks": [3.0 + k, 1.0],
        }
        for k in range(2)
    ]
    columns = [
        "dataset.columns.prompt=info.question",
        "dataset.columns.chosen='chosen[-1].content'",
        "dataset.columns.rejected='rejected[-1].content'",
        "dataset.columns.score_chosen='marks[0]'",
        "dataset.columns.score_rejected='marks[1]'",
    ]
    for suffix in (".jsonl", ".json", ".parquet", ".jsonl.gz"):
        save(tmp_path / f"own{suffix}", rows)
        data = dataset("table", f"dataset.path={tmp_path}/own{suffix}", "dataset.hold_out=0.0", *columns)
        pairs = data.preferences("train", template)
        assert [(p.prompt.request, *p.responses, p.margin) for p in pairs] == [
            ("why 0 ?", "so", "no", 2.0),
            ("why 1 ?", "so", "no", 3.0),
        ]
    data = dataset("table", f"dataset.path={tmp_path}/own.jsonl", "dataset.columns.prompt=info.qestion")
    with pytest.raises(ValueError, match=r"own\.jsonl \(train\) has the columns .*'info\.qestion'"):
        data.check()
