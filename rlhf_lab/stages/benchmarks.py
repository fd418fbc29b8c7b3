"""Standard benchmarks of a policy through EleutherAI's lm-evaluation-harness: its tasks, or tasks of one's own."""

import difflib
import importlib.util
import json
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from rlhf_lab.data.tables import read_table
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import LEARNT, ModelPaths, check_path
from rlhf_lab.engine.models import load_policy
from rlhf_lab.engine.tokenizer import load_tokenizer, new_token_ids
from rlhf_lab.functional.estimates import rate
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.shards import Shard, sharded
from rlhf_lab.types import Count, Metrics, NonNegativeCount

NORMAL = 1.96  # standard errors in half a 95 % interval
KEPT = ("results", "versions", "n-shot", "n-samples", "samples")  # of what the harness returns
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


class Benchmarks:
    """The harness's figures of a policy, task by task; a killed run continues with the task that it was at.

    Leaves `benchmarks.json`, what the harness says of each task: results, versions, settings, and
    `benchmarks/<task>.jsonl`, every answer. Metrics: `benchmark/<task>/<metric>/mean` and `ci95`: of shares of
    questions half of Wilson's interval, also low and high; else 1.96 of the harness's standard errors, if it has them.

    Args:
        tasks: names of the harness's tasks or groups, or of those in task_folders.
        task_folders: folders of YAML files in the harness's form. They are code: a task may name Python functions.
        few_shot: worked examples before each question; null: as the task says.
        limit: questions of each task, the first; null: all. With a limit the figures are not the benchmark's.
        chat_template: whether questions are put in the policy's chat template.
        max_length: tokens of question and answer together; null: what the policy can read.

    Source: Gao et al., "A framework for few-shot language model evaluation", doi 10.5281/zenodo.10256836.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        hardware: Hardware,
        tasks: Sequence[str],
        task_folders: Sequence[str],
        few_shot: NonNegativeCount | None,
        limit: Count | None,
        batch_size: Count,
        chat_template: bool,
        max_length: Count | None,
    ) -> None:
        self.model, self.hardware = model, hardware
        self.tasks, self.task_folders = list(tasks), [Path(folder).expanduser() for folder in task_folders]
        self.few_shot, self.limit, self.batch_size = few_shot, limit, batch_size
        self.chat_template, self.max_length = chat_template, max_length

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(
                "stage=benchmarks needs the package lm_eval; pip install -c constraints.txt -e '.[benchmarks]'"
            )
        if not self.tasks:
            raise ValueError("stage.tasks is empty; name tasks of the harness, e.g. stage.tasks=[arc_easy,hellaswag]")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"stage.tasks={self.tasks} names a task twice")
        for folder in self.task_folders:
            if not folder.is_dir():
                raise ValueError(f"stage.task_folders: there is no folder {folder}")

    def run(self, run: Run) -> Metrics:
        device = self.hardware.start()
        tasks = self._known()
        tokenizer = load_tokenizer(self.model.policy, self.model.new_tokens)
        if self.chat_template and not tokenizer.chat_template:
            raise ValueError(f"{self.model.policy} has no chat template; set stage.chat_template=false")
        policy = load_policy(  # an adapter merged into its base, since the harness takes whole models
            self.model.policy,
            device=device,
            dtype=LEARNT,
            seed=derive(run.seed, "initial weights"),
            new_tokens=new_token_ids(tokenizer, self.model.new_tokens),
        )
        answers = _harness("models.huggingface").HFLM(
            pretrained=policy,
            tokenizer=tokenizer,
            backend="causal",
            device=str(device),
            batch_size=self.batch_size,
            max_length=self.max_length,
            trust_remote_code=False,
        )
        run.resume()  # there are no checkpoints: the shards are what it continues from
        if self.limit is not None:
            run.warn(0, f"only the first {self.limit} questions of each task: these are not the benchmarks' figures")
        made = sharded(
            run, "task", "benchmarks", [partial(self._shard, answers, tasks, t, run.seed) for t in self.tasks]
        )
        metrics: Metrics = {}
        said: dict[str, Any] = {}
        for task, file in zip(self.tasks, made, strict=True):
            [row] = read_table(file)
            said[task] = json.loads(row["result"])
            answered = said[task].pop("samples")
            for name, samples in answered.items():
                run.write_rows(f"benchmarks/{name}.jsonl", samples)
            for name, each in said[task]["results"].items():
                metrics |= _metrics(f"benchmark/{name}", each, answered.get(name, []))
        run.write_text("benchmarks.json", json.dumps(said, indent=1))
        run.log(0, metrics)
        return metrics

    def _known(self) -> Any:
        """The tasks in the folders alone if these hold all that are asked for, else the harness's too.

        Raises:
            ValueError: there is no task of that name.
        """
        manager = _harness("tasks").TaskManager
        folders = [str(folder) for folder in self.task_folders]
        if folders:
            own = manager(include_path=folders, include_defaults=False)
            if set(self.tasks) <= set(own.all_tasks):
                return own
        every = manager(include_path=folders or None)  # reads thousands of files
        for task in self.tasks:
            if task not in every.all_tasks:
                close = difflib.get_close_matches(task, every.all_tasks, n=3)
                raise ValueError(
                    f"stage.tasks: the harness has no task {task!r}"
                    + (f"; did you mean {', '.join(close)}?" if close else "")
                    + (f", nor have {folders}" if folders else "; tasks of your own: stage.task_folders=[<folder>]")
                )
        return every

    def _shard(self, answers: Any, tasks: Any, task: str, seed: int) -> Shard:
        found = _harness("evaluator").simple_evaluate(
            model=answers,
            tasks=[task],
            task_manager=tasks,
            num_fewshot=self.few_shot,
            limit=self.limit,
            apply_chat_template=self.chat_template,
            log_samples=True,
            **{name: derive(seed, task, name) % 2**32 for name in SEEDS},
        )
        kept = {name: found[name] for name in KEPT if name in found}
        asked = [text for rows in kept["samples"].values() for row in rows for text in _texts(row["arguments"])]
        tokens = sum(len(answers.tok_encode(text)) for text in asked)
        return Shard([{"result": json.dumps(kept, default=str)}], tokens)


def _harness(module: str) -> Any:
    """A module of the harness, which is imported when it is needed and whose decorators hide its signatures."""
    return import_module(f"lm_eval.{module}")


def _texts(said: Any) -> list[str]:
    """The texts in what one question asks the model, which the harness nests by request and argument."""
    if isinstance(said, str):
        return [said]
    inner = said.values() if isinstance(said, dict) else said if isinstance(said, list | tuple) else ()
    return [text for each in inner for text in _texts(each)]


def _metrics(key: str, said: Mapping[str, Any], answered: Sequence[Mapping[str, Any]]) -> Metrics:
    """Of one task, which the harness writes as `metric,filter` and `metric_stderr,filter`; "none" is no filter."""
    metrics: Metrics = {}
    for name, value in said.items():
        metric, _, rule = name.partition(",")
        if not rule or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        full = f"{key}/{metric}" if rule == "none" else f"{key}/{metric}_{rule}"
        values = [row[metric] for row in answered if row.get("filter", "none") == rule and metric in row]
        error = said.get(f"{metric}_stderr,{rule}")
        if values and all(each in (0, 1) for each in values) and abs(sum(values) / len(values) - value) < 1e-9:
            metrics |= rate(torch.tensor(values, dtype=torch.float64), torch.arange(len(values))).named(full)
        elif isinstance(error, int | float) and math.isfinite(error):
            metrics |= {f"{full}/mean": float(value), f"{full}/ci95": NORMAL * error}
        else:
            metrics[f"{full}/mean"] = float(value)
    return metrics
