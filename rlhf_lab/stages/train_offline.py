"""Learning from a data set: SFT, reward models, cost models; the same learner as everywhere."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import pair_batch, safety_pair_batch, sequences, text_batch
from rlhf_lab.engine.forward import pair_scores, policy_forward, raw_scores
from rlhf_lab.engine.learner import Learner, Part, Trainable
from rlhf_lab.engine.models import (
    LEARNT,
    Calibration,
    Hardware,
    ModelPaths,
    check_path,
    load_policy,
    load_tokenizer,
    new_scorer,
    parameters_of,
    restore_parameters,
    save_model,
)
from rlhf_lab.engine.score import by_length
from rlhf_lab.functional.calibration import least_squares, logistic, standardise
from rlhf_lab.interfaces import OfflineAlgorithm
from rlhf_lab.records import Prompt
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive, generator
from rlhf_lab.types import Count, Metrics, NonNegativeCount, Term, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CalibrationMethod = Literal["none", "standardised", "gold", "labels"]


class TrainOffline:
    """One pass of the story: read, train, evaluate on held-out rows, calibrate a value model, save.

    Args:
        epochs: passes over the data.
        batch_size: rows of an optimiser step; the last of an epoch may be smaller, none is dropped.
        calibration: of a value model, on the first held-out split. "standardised": mean 0, standard deviation 1 over
            its responses; "gold": least squares on a gold column, so that the score has its units; "labels": log-odds
            of the unsafe label, so that 0 is even odds; "none": raw.
        calibration_column: the gold column, without its `_0`, `_1`.
        checkpoint_every, evaluate_every: optimiser steps; evaluation 0: at the end only.
    """

    def __init__(
        self,
        *,
        algorithm: OfflineAlgorithm,
        model: ModelPaths,
        dataset: Dataset,
        learner: partial[Learner],
        hardware: Hardware,
        epochs: Count,
        batch_size: Count,
        calibration: CalibrationMethod,
        calibration_column: str,
        checkpoint_every: Count,
        evaluate_every: NonNegativeCount,
    ) -> None:
        self.algorithm, self.model, self.dataset, self.learner = algorithm, model, dataset, learner
        self.hardware, self.epochs, self.batch_size = hardware, epochs, batch_size
        self.calibration, self.calibration_column = calibration, calibration_column
        self.checkpoint_every, self.evaluate_every = checkpoint_every, evaluate_every
        self.trains_policy = algorithm.reads == "demonstrations"
        settings = learner.keywords
        if settings["epochs"] != 1 or settings["minibatch_size"]:
            raise ValueError(
                f"learner.epochs={settings['epochs']}, learner.minibatch_size={settings['minibatch_size']}: a run on a "
                "data set is cut by stage.epochs and stage.batch_size; leave these two at 1 and 0"
            )

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        self.dataset.check(promised, self.algorithm.reads)
        if self.trains_policy and self.calibration != "none":
            raise ValueError(
                f"stage.calibration={self.calibration}, but a policy has no score; use stage.calibration=none"
            )

    def run(self, run: Run) -> Metrics:
        device = self.hardware.start()
        template = Template(load_tokenizer(self.model.policy), self.dataset.template_style)
        records = self._records(self.dataset.train_split, template)
        held_out = {split: self._records(split, template) for split in self.dataset.splits}
        reference_set = self._reference_set(template)
        if getattr(self.algorithm, "use_margin", False) and not any(record.margin for record in records):
            raise ValueError(
                f"algorithm.use_margin=true, but {self.dataset.path} has no margins; "
                "say which column holds them with dataset.columns.margin=<column>"
            )
        for note in self.dataset.notes:
            run.warn(0, note)
        load = load_policy if self.trains_policy else new_scorer
        model = load(self.model.policy, device=device, dtype=LEARNT, seed=derive(run.seed, "initial weights"))
        steps_per_epoch = -(-len(records) // self.batch_size)
        total = steps_per_epoch * self.epochs
        name = "policy" if self.trains_policy else "scorer"
        learner = self.learner(modules={name: model}, total_updates=total)
        run.console.say(f"{len(records)} rows, {total} steps of {self.batch_size}; template {template.style}")

        first = 0
        if resumed := run.resume():
            first, state = resumed
            restore_parameters(model, state["model"])
            learner.load_state_dict(state["learner"])
        latest: Metrics = {}
        for done in run.console.steps(self.algorithm.reads, first, total, latest):
            step = done + 1  # step k is the state after k optimiser steps
            epoch, place = divmod(done, steps_per_epoch)
            order = torch.randperm(len(records), generator=generator(run.seed, "order", epoch)).tolist()
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            torch.manual_seed(derive(run.seed, "dropout", done))
            model.train()
            batch = self._batch(template, [records[i] for i in chosen])
            metrics = _named(learner.update([self._part(model, batch)], derive(run.seed, "learner", done)))
            metrics["episode"] = float(epoch * len(records) + place * self.batch_size + len(chosen))
            last = step == total
            if last or (self.evaluate_every and step % self.evaluate_every == 0):
                for split, rows in held_out.items():
                    metrics |= {f"eval/{split}/{k}": v for k, v in self._evaluate(model, template, rows).items()}
            latest.update(metrics)
            run.log(step, metrics)
            if last or step % self.checkpoint_every == 0:
                run.save(step, {"model": parameters_of(model), "learner": learner.state_dict()})

        with run.folder(name) as folder:
            if self.trains_policy:
                save_model(folder, model, template.tokenizer)
            else:
                calibration = self._calibrate(run, model.eval(), template, *reference_set)
                save_model(folder, model, template.tokenizer, calibration)
        return run.last

    def _records(self, split: str, template: Template) -> Sequence[Any]:
        return getattr(self.dataset, self.algorithm.reads)(split, template)

    def _batch(self, template: Template, records: Sequence[Any]) -> Trainable:
        make = {"demonstrations": text_batch, "preferences": pair_batch, "safety_pairs": safety_pair_batch}
        return make[self.algorithm.reads](template, records)

    def _part(self, model: "PreTrainedModel", batch: Trainable) -> Part:
        if self.trains_policy:
            return Part(batch, lambda rows: policy_forward(model, rows.sequences), self.algorithm.loss)
        return Part(batch, lambda rows: pair_scores(model, rows.pair), self.algorithm.loss)

    @torch.no_grad()
    def _evaluate(self, model: "PreTrainedModel", template: Template, records: Sequence[Any]) -> Metrics:
        """Means over held-out rows (a per-token term: over their tokens)."""
        model.eval()
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for part in batches(len(records), self.batch_size):
            batch = self._batch(template, records[part]).to(model.device)
            piece = self._part(model, batch)
            for term in piece.loss(piece.forward(batch), batch):
                values, count = _total(term, batch)
                sums[term.name] = sums.get(term.name, 0.0) + values
                counts[term.name] = counts.get(term.name, 0.0) + count
        return _named({name: sums[name] / counts[name] for name in sums})

    def _reference_set(self, template: Template) -> tuple[list[Prompt], list[str], Tensor]:
        """What a value model is calibrated on: prompts, responses and their targets (none to be standardised).

        Raises:
            ValueError: no held-out split is there, or it lacks the column.
        """
        if self.calibration == "none":
            return [], [], torch.zeros(0)
        if not self.dataset.splits:
            raise ValueError(
                f"stage.calibration={self.calibration} needs held-out rows, and {self.dataset.path} has none; "
                "set dataset.hold_out or dataset.eval_splits, or stage.calibration=none"
            )
        split = self.dataset.splits[0]
        if self.calibration == "standardised":
            pairs = self._records(split, template)
            prompts = [pair.prompt for pair in pairs for _ in range(2)]
            return prompts, [text for pair in pairs for text in pair.responses], torch.zeros(0)
        rows = self.dataset.labelled(
            split, "safe" if self.calibration == "labels" else self.calibration_column, template
        )
        return [row[0] for row in rows], [row[1] for row in rows], torch.tensor([row[2] for row in rows])

    @torch.no_grad()
    def _calibrate(
        self,
        run: Run,
        model: "PreTrainedModel",
        template: Template,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        target: Tensor,
    ) -> Calibration:
        if self.calibration == "none":
            return Calibration()
        split = self.dataset.splits[0]
        read = sequences(template, prompts, texts)
        raw = by_length(read, 16384, model.device, lambda part: raw_scores(model, part))
        if self.calibration == "standardised":
            scale, shift = standardise(raw)
        elif self.calibration == "gold":
            scale, shift = least_squares(raw, target)
        else:
            scale, shift = logistic(raw, 1 - target)
        calibration = Calibration(scale, shift, self.calibration, f"{self.dataset.path}:{split}")
        agreement = f", correlation {torch.corrcoef(torch.stack([raw, target]))[0, 1]:.3f}" if len(target) else ""
        run.console.say(
            f"calibrated ({self.calibration}) on {len(raw)} responses of {split}: "
            f"score = {scale:.3f} raw {shift:+.3f}{agreement}"
        )
        return calibration


def _total(term: Term, batch: Any) -> tuple[float, float]:
    if term.per == "row":
        return term.values.sum().item(), float(len(batch))
    return term.values.where(batch.token_mask, 0).sum().item(), float(batch.token_mask.sum())


def _named(means: Metrics) -> Metrics:
    """Terms under their contract names: what is minimised is a loss, the rest stands by itself."""
    plain = ("accuracy", "grad_norm", "lr")
    return {name if name.startswith(plain) else f"loss/{name}": value for name, value in means.items()}
