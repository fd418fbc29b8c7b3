"""Which prompts a model was trained on, from the frozen configurations of the runs that made it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lab.data.provenance import prompts_behind, prompts_of_table, run_of, runs_behind
from rlhf_lab.data.tiny_help import demonstrations, sample_prompts
from rlhf_lab.records import Prompt
from rlhf_lab.seeds import derive

WORLD = {
    **yaml.safe_load((Path(__file__).parents[2] / "conf/dataset/tiny_help.yaml").read_text()),
    **{"train_size": 20, "eval_splits": ["test"], "eval_size": 10, "hold_out": 0.25, "seed": 4},
}
ONLINE, OFFLINE = "rlhf_lab.stages.train_online.TrainOnline", "rlhf_lab.stages.train_offline.TrainOffline"


def ids(*texts: str) -> set[str]:
    return {Prompt.from_text(text).id for text in texts}


def write_table(file: Path, column: str, *texts: str) -> str:
    file.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(file)


def make_run(folder: Path, output: str, **stage: Any) -> str:
    """A run directory with this stage in its record; what it made."""
    (folder / output).mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "stage": stage}))
    (folder / "environment.json").write_text("{}")
    return str(folder / output)


def test_a_run_is_found_from_what_it_made_and_nothing_else_is_a_run(tmp_path: Path):
    made = make_run(tmp_path / "sft", "policy", _target_=OFFLINE)
    assert run_of(made) == tmp_path / "sft"
    for other in (str(tmp_path), "owner/name", "embedded:tiny", str(tmp_path / "sft/policy/step_1/model.safetensors")):
        assert run_of(other) is None


def test_a_run_is_found_from_a_file_in_what_it_made_and_the_nearest_one_counts(tmp_path: Path):
    made = make_run(tmp_path / "best_of_n", "data", _target_=ONLINE)
    assert run_of(f"{made}/best.parquet") == tmp_path / "best_of_n"
    inner = make_run(tmp_path / "best_of_n/inner", "policy", _target_=OFFLINE)
    assert run_of(inner) == tmp_path / "best_of_n/inner"


def test_runs_are_followed_through_what_they_read(tmp_path: Path):
    sft = make_run(tmp_path / "sft", "policy", _target_=OFFLINE)
    scorer = make_run(tmp_path / "scorer", "scorer", _target_=OFFLINE, model={"policy": sft})
    ppo = make_run(tmp_path / "ppo", "policy", _target_=ONLINE, rewards={"helpful": {"members": ["hub/x", scorer]}})
    make_run(tmp_path / "unread", "policy", _target_=ONLINE)
    assert {run.name for run in runs_behind([ppo])} == {"ppo", "scorer", "sft"}
    best = make_run(tmp_path / "best_of_n", "data", _target_=ONLINE, model={"policy": sft})
    rejection = make_run(tmp_path / "rejection", "policy", _target_=OFFLINE, dataset={"path": f"{best}/best.parquet"})
    assert {run.name for run in runs_behind([rejection])} == {"rejection", "best_of_n", "sft"}
    assert runs_behind(["owner/name"]) == {}


def test_prompts_of_the_world_are_those_that_the_run_drew():
    online = prompts_behind({"stage": {"_target_": ONLINE, "dataset": WORLD}})
    assert online == {prompt.id for prompt in sample_prompts("train", 20, derive(4, "dataset", "train"))}
    imitated = prompts_behind({"stage": {"_target_": OFFLINE, "calibration": "none", "dataset": WORLD}})
    drawn = demonstrations("train", 20, derive(4, "dataset", "train"))
    assert imitated == {record.prompt.id for record in drawn}
    both = prompts_behind({"stage": {"_target_": ONLINE, "dataset": WORLD, "demonstrations": WORLD}})
    assert both == online | imitated
    assert prompts_behind({"stage": {"_target_": ONLINE, "parts": {"data": WORLD}}}) == online


def test_prompts_of_a_table_are_those_of_its_training_split_and_of_what_calibrates(tmp_path: Path):
    texts = [f"question {i} ?" for i in range(20)]
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data/train.jsonl", "asked", *texts[:12])
    write_table(tmp_path / "data/held.jsonl", "asked", *texts[12:])
    data = {**WORLD, "path": str(tmp_path / "data"), "columns": {"prompt": "asked"}, "eval_splits": ["held"]}
    stage = {"_target_": OFFLINE, "calibration": "none", "dataset": {**data, "train_size": None}}
    assert prompts_behind({"stage": stage}) == ids(*texts[:12])
    assert prompts_behind({"stage": {**stage, "calibration": "labels"}}) == ids(*texts[:12]) | (
        held := prompts_behind({"stage": {**stage, "dataset": {**stage["dataset"], "train_split": "held"}}})
    )
    assert held == ids(*texts[12:])


def test_a_record_that_this_version_cannot_read_is_said():
    stage = {"_target_": ONLINE, "dataset": {**WORLD, "shuffled": True}}
    with pytest.raises(ValueError, match=r"another version of rlhf_lab .*'shuffled'.*stage.disjoint_from"):
        prompts_behind({"stage": stage})


def test_data_that_are_gone_are_said(tmp_path: Path):
    stage = {"_target_": ONLINE, "dataset": {**WORLD, "path": str(tmp_path / "gone.jsonl")}}
    with pytest.raises(ValueError, match="no such file or folder"):
        prompts_behind({"stage": stage})


def test_a_table_is_read_whole_by_its_column(tmp_path: Path):
    table = write_table(tmp_path / "seen.jsonl", "question", "why ?", "how ?", "why ?")
    assert prompts_of_table(table, "question") == ids("why ?", "how ?")
    with pytest.raises(ValueError, match=r"has the columns \['question'\], but stage.disjoint_from needs 'prompt'"):
        prompts_of_table(table, "prompt")


def test_prompts_of_a_csv_file_that_look_like_numbers_are_texts(tmp_path: Path):
    (tmp_path / "seen.csv").write_text("question,score\n007,1\n7,2\n")
    assert prompts_of_table(str(tmp_path / "seen.csv"), "question") == ids("007", "7")
