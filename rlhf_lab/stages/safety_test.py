"""A policy's safety test on prompts that nothing was trained on: passed, or no solution found; each prompt serves once.

Source: the safety test of Seldonian algorithms, Thomas et al. 2019, Science 366:999, as HC-RLHF applies it to language
models (UMass-SCALAR-Lab/HC-RLHF). There it is run at each evaluation on the same prompts, and gates nothing.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lab.bounds import ClopperPearson, StudentT
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.provenance import prompts_behind, prompts_of_table, runs_behind
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine import ranks
from rlhf_lab.engine.checkpoint import publish, sha256
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.models import load_frozen
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.evaluation.metrics import half_width
from rlhf_lab.interfaces import Bound
from rlhf_lab.ledger import Entry, Ledger
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.ensemble import Ensemble
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.types import Metrics, Rollout

PASS, FAIL = "PASS", "NO_SOLUTION_FOUND"
VERDICT = "safety_test"  # the key of an exported policy's config.json


class SafetyTest:
    """One response to each prompt of a held-out split; it passes if an upper bound on its cost is in the limit.

    The verdict is in `verdict.json`, whichever it is: not to pass is a result, not a failure of the run.
    What it says is of the learned cost, of responses drawn as stated, and of prompts drawn like these.

    Args:
        split: of the data set; as many prompts as dataset.eval_size says, or as there are.
        cost: the cost model; higher is worse.
        bound: with a confidence of its own; a Student bound without inflation.
        limit: in units of the bound.
        alpha_spending: let prompts be tested on again, the k-th time with a smaller delta, see `spent_on`; off, a
            second test on any of them is refused, and so is one that would spend more than delta in all.
        ledger: the file that knows which prompts were tested on.
        disjoint_from: tables of prompts on which the policy was trained, beside those that its run and the cost
            model's recorded. For models that no run of this project made, nothing else is known.
        export: a folder that is to hold the policy if it passes.
        export_anyway: export it also if it does not; verdict and export say so.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        split: str,
        cost: Ensemble,
        bound: Bound,
        limit: float,
        evaluation_sampling: Sampling,
        hardware: Hardware,
        alpha_spending: bool,
        ledger: str,
        disjoint_from: Sequence[str],
        export: str | None,
        export_anyway: bool,
    ) -> None:
        self.model, self.dataset, self.split, self.cost = model, dataset, split, cost
        self.bound, self.limit, self.sampling, self.hardware = bound, limit, evaluation_sampling, hardware
        self.alpha_spending, self.ledger = alpha_spending, Ledger(Path(ledger))
        self.disjoint_from, self.export, self.export_anyway = list(disjoint_from), export, export_anyway
        bound.check_limit(limit)
        if "delta" not in vars(bound):
            raise ValueError("bound=mean has no confidence, so nothing can pass its test; use e.g. bound=student_t")
        if isinstance(bound, StudentT) and (bound.train_inflation, bound.test_inflation) != (1, 0):
            raise ValueError(
                f"bound.train_inflation={bound.train_inflation:g}, bound.test_inflation={bound.test_inflation:g}: for "
                "training; a test has bound.train_inflation=1 bound.test_inflation=0"
            )

    @property
    def delta(self) -> float:
        return float(vars(self.bound)["delta"])  # every bound but the mean has one

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        self.dataset.check(promised)
        self.cost.check(promised)
        if self.dataset.is_world:
            prompts = self.dataset.prompt_ids(self.split)  # refuses a split or a size that the world has not
            self._check_number(len(prompts), self.delta)
        if self.export is None:
            if self.export_anyway:
                raise ValueError("stage.export_anyway=true, but stage.export names no folder; set it, or drop both")
        elif Path(self.export).expanduser().exists():
            raise ValueError(f"stage.export={self.export} is there already; remove it, or choose another folder")
        elif self.model.policy not in promised and not Path(self.model.policy).expanduser().is_dir():
            raise ValueError(
                f"stage.export={self.export}, but model.policy={self.model.policy} is no local folder to copy"
            )

    def run(self, run: Run) -> Metrics:
        device = self.hardware.start()
        template = Template(load_tokenizer(self.model.policy), self.dataset.template_style)
        prompts = self._prompts(template)
        behind, unrecorded = self._refuse_seen(prompts)
        entry = self._enter(run, prompts)
        run.resume()  # there are no checkpoints: the same seeds draw the same responses again
        for note in self.dataset.notes:
            run.warn(0, note)
        for path in unrecorded if not self.disjoint_from else ():
            run.warn(
                0,
                f"nothing is recorded of what {path} was trained on, so that no test prompt was among it is for you to "
                "know; name the tables with stage.disjoint_from=[…]",
            )
        policy = load_frozen(
            self.model.policy,
            device=device,
            dtype=self.model.dtype(self.hardware),
            seed=derive(run.seed, "initial weights"),
            adapters=self.model.adapters,
        )
        engine = Generator(policy, template, self.sampling)
        rollout = engine.generate(prompt_batch(template, prompts), 1, derive(run.seed, "safety test"))
        costs = self.cost.load(self.hardware, template).score(rollout).value.double().cpu()
        metrics = self._report(run, rollout, costs)

        bound = type(self.bound)(**{**vars(self.bound), "delta": entry.delta})
        upper = bound.upper(costs)
        if not math.isfinite(upper):
            raise ValueError(
                f"the bound of the {len(costs)} costs is {upper}; look at the cost model {self._cost_paths}"
            )
        passed = upper <= self.limit
        exported = self.export is not None and (passed or self.export_anyway)
        verdict = {
            "verdict": PASS if passed else FAIL,
            "bound": {"name": type(bound).__name__, **vars(bound), "value": upper, "of": self._bounded},
            "assumes": bound.assumes,
            "limit": self.limit,
            "delta": entry.delta,
            "n": len(costs),
            "mean": costs.mean().item(),
            "sd": costs.std().item() if len(costs) > 1 else 0.0,
            "test": entry.test,
            "alpha_spending": self.alpha_spending,
            "alpha_spent": entry.alpha_spent,
            "cost_model": [{"path": path, "sha256": fingerprint(path)} for path in self._cost_paths],
            "policy": {"path": self.model.policy, "sha256": fingerprint(self.model.policy)},
            "decoding": {key: value for key, value in asdict(self.sampling).items() if key != "batch_size"},
            "prompts": {"data": self.dataset.path, "split": self.split, "sha256": entry.prompt_set},
            "disjoint_from": behind,
            "unrecorded": unrecorded,
            "exported_to": self.export if exported else None,
            "export_anyway": exported and not passed,
        }
        if exported and ranks.is_first():
            self._export(verdict)
        run.write_text("verdict.json", json.dumps(verdict, indent=1))
        run.console.say(self._sentence(verdict))
        metrics |= {"safety/bound": upper, "safety/limit": self.limit, "safety/passed": float(passed)}
        run.log(0, metrics)
        return metrics

    @property
    def _cost_paths(self) -> list[str]:
        return [member.path for member in self.cost.members]

    @property
    def _bounded(self) -> str:
        """What the bound is of, for a sentence."""
        if isinstance(self.bound, ClopperPearson):
            return f"the share of responses whose learned cost is over {self.bound.unsafe_above:g}"
        return "the mean learned cost"

    def _prompts(self, template: Template) -> list[Prompt]:
        """The prompts to test on, each once.

        Raises:
            ValueError: there is no such split.
        """
        dataset = self.dataset
        if not dataset.is_world and self.split not in (there := (*dataset.splits, dataset.train_split)):
            raise ValueError(f"{dataset.path} has the splits {sorted(there)}, not {self.split!r}; change stage.split")
        return dataset.prompts(self.split, template)

    def _check_number(self, n: int, delta: float) -> None:
        """Raises ValueError if not even n safe responses could pass, so that no prompt is spent in vain."""
        bound = self.bound
        if not isinstance(bound, ClopperPearson):
            return
        bound = replace(bound, delta=delta)
        best = bound.upper(torch.full((n,), bound.unsafe_above, dtype=torch.float64))
        if best > self.limit:
            raise ValueError(
                f"{n} prompts are too few for stage.limit={self.limit:g} at delta {delta:.4g}: the bound is {best:.3g} "
                f"even if no response is unsafe; test on {bound.needed(self.limit)} prompts or more "
                "(dataset.eval_size), or raise stage.limit"
            )

    def _refuse_seen(self, prompts: Sequence[Prompt]) -> tuple[list[str], list[str]]:
        """The runs and tables whose prompts the test's are disjoint from, and the models of which no run says any.

        Raises:
            ValueError: they are not.
        """
        asked = {prompt.id for prompt in prompts}
        models = list(dict.fromkeys([self.model.policy, *self._cost_paths]))
        seen = {str(run): prompts_behind(config) for run, config in runs_behind(models).items()}
        seen |= {
            path: prompts_of_table(path, self.dataset.columns.get("prompt", "prompt")) for path in self.disjoint_from
        }
        if shared := {where: len(asked & ids) for where, ids in seen.items() if not asked.isdisjoint(ids)}:
            counts = "; ".join(f"{count} by {where}" for where, count in sorted(shared.items()))
            raise ValueError(
                f"of {len(asked)} prompts of {self.dataset.path} ({self.split}) some were trained on: {counts}; "
                "test on others (stage.split, dataset.path)"
            )
        unrecorded = [path for path in models if not any(seen[str(run)] for run in runs_behind([path]))]
        return [where for where, ids in seen.items() if ids], unrecorded

    def _enter(self, run: Run, prompts: Sequence[Prompt]) -> Entry:
        """This test's place in the ledger.

        Raises:
            SpentPrompts: there is none.
            ValueError: they are too few to pass.
        """
        ids = sorted(prompt.id for prompt in prompts)
        policy, models = fingerprint(self.model.policy), [fingerprint(path) for path in self._cost_paths]
        cost_model = _digest(map(str, models)) if all(models) else None
        return self.ledger.enter(
            run=run.directory,
            identity=_digest([(run.directory / "config.yaml").read_text(), str(policy), str(cost_model), *ids]),
            prompts=ids,
            prompt_set=_digest(ids),
            cost_model=cost_model,
            policy=policy,
            limit=self.limit,
            delta=self.delta,
            spending=self.alpha_spending,
            check=partial(self._check_number, len(prompts)),
        )

    def _report(self, run: Run, rollout: Rollout, costs: Tensor) -> Metrics:
        """Every response with its costs goes to samples/; their means, with intervals, are returned."""
        gold = {name: Gold(measure).score(rollout).value for name, measure in self.dataset.gold.items()}
        rows = [
            {
                "split": self.split,
                "id": rollout.prompts[i].id,
                "prompt": rollout.prompts[i].request,
                "response": rollout.responses[i],
                "finished": bool(rollout.finished[i]),
                "scores": {"cost": costs[i].item()},
                "gold": {name: value[i].item() for name, value in gold.items()},
            }
            for i in range(len(rollout))
        ]
        run.write_rows("samples/step_000000.jsonl", rows)
        metrics: Metrics = {}
        for name, values in {"rewards/cost": costs, **{f"gold/{name}": value for name, value in gold.items()}}.items():
            metrics[f"eval/{self.split}/{name}/mean"] = values.mean().item()
            metrics[f"eval/{self.split}/{name}/ci95"] = half_width(values)
        return metrics

    def _export(self, verdict: dict[str, Any]) -> None:
        """A copy of the policy whose config.json carries the verdict; whole or not there."""
        final = Path(self.export or "").expanduser().absolute()
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(Path(self.model.policy).expanduser(), temporary)
        config = json.loads((temporary / "config.json").read_text())
        (temporary / "config.json").write_text(json.dumps({**config, VERDICT: verdict}, indent=2))
        publish(temporary, final)

    def _sentence(self, verdict: dict[str, Any]) -> str:
        """The verdict, and what it is about."""
        decoding = ", ".join(f"{key} {value}" for key, value in verdict["decoding"].items())
        passed = verdict["verdict"] == PASS
        said = (
            f"{verdict['verdict']}: {verdict['bound']['of']} of this policy's responses to prompts like the "
            f"{verdict['n']} of {self.dataset.path} ({self.split}), drawn with {decoding}, is "
            f"{'at most' if passed else 'not shown to be at most'} {self.limit:g} with confidence {1 - self.delta:g}"
        )
        if self.alpha_spending:
            said += f" over all tests on them (this is number {verdict['test']}, at {1 - verdict['delta']:.4g})"
        said += (
            f": its upper bound is {verdict['bound']['value']:.3g}, by {verdict['bound']['name']}, which assumes "
            f"{verdict['assumes']}; the cost is that of {', '.join(self._cost_paths)}, not the truth"
        )
        if verdict["export_anyway"]:
            return f"{said}; it is exported to {self.export} all the same, as stage.export_anyway asks"
        if self.export is not None:
            return f"{said}; {f'the policy is exported to {self.export}' if passed else 'nothing is exported'}"
        return said


def _digest(parts: Any) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def fingerprint(path: str) -> str | None:
    """Digest of a model's weights and config.json, which holds its calibration; None if it is no local folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    return _digest(f"{file.name} {sha256(file)}" for file in files)
