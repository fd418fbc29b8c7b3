"""Learning from a data set: SFT, reward models, cost models; the same learner as everywhere."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import pair_batch, quadruple_batch, ranking_batch, safety_pair_batch, text_batch
from rlhf_lab.engine import out_of_memory, ranks
from rlhf_lab.engine.accounting import EVALUATION, Account
from rlhf_lab.engine.average import MovingAverage
from rlhf_lab.engine.checkpoint import seal
from rlhf_lab.engine.distribution import Distribution, through
from rlhf_lab.engine.forward import policy_logprobs, text_logprobs, text_scores
from rlhf_lab.engine.generate import Generator
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.learner import Learner, Part, Trainable
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.models import SCORE, load_frozen, load_policy, new_scorer, save_model
from rlhf_lab.engine.packing import check_packing, pack, packed_forward
from rlhf_lab.engine.parameters import freeze
from rlhf_lab.engine.score import by_length, microbatches
from rlhf_lab.engine.tokenizer import load_tokenizer, new_token_ids
from rlhf_lab.evaluation.evaluator import leave_table
from rlhf_lab.interfaces import Guided, Observant, OfflineAlgorithm, Stateful
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive, generator
from rlhf_lab.stages.calibrate import CalibrationMethod, ReferenceSet
from rlhf_lab.stages.evaluate import Bench, Evaluate
from rlhf_lab.stages.shards import is_sound
from rlhf_lab.types import Count, Metrics, NonNegativeCount, Term, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# kind of record -> how records are put into a batch
BATCHES = {
    "demonstrations": text_batch,
    "preferences": pair_batch,
    "quadruples": quadruple_batch,
    "rankings": ranking_batch,
    "safety_pairs": safety_pair_batch,
}

REFERENCE = "logprobs.safetensors"
PACKED_TO_CHECK = 8  # rows on which a model is seen to keep packed rows apart


@dataclass(frozen=True)
class Lesson:
    """The records of one split, and (N,) columns of what the reference says of each of their responses."""

    records: Sequence[Any]
    reference: tuple[Tensor, ...]

    def batch(self, reads: str, template: Template, index: Tensor) -> Any:
        """The rows `index` as a batch."""
        batch = BATCHES[reads](template, [self.records[i] for i in index.tolist()])
        return batch.beside(tuple(column[index] for column in self.reference)) if self.reference else batch


class TrainOffline:
    """One pass of the story: read, train, evaluate on held-out rows, calibrate a value model, save.

    Args:
        epochs: passes over the data.
        batch_size: rows of an optimiser step; the last of an epoch may be smaller, none is dropped.
        calibration: of a value model, on the first held-out split. "standardised": mean 0, standard deviation 1 over
            its responses; "scaled": this deviation without a shift, which keeps the sign of a cost; "gold": least
            squares on a gold column, so that the score has its units; "labels": log-odds of the unsafe label, so that 0
            is even odds; "none": raw.
        calibration_column: the gold column, without its `_0`, `_1`.
        checkpoint_every, evaluate_every: optimiser steps; evaluation 0: at the end only.
        turns: of a conversation to imitate, the "last" response, or "all" that the assistant says.
        pack_tokens: rows to imitate are laid end to end in sequences of this many tokens, none seeing another; 0: every
            row has a sequence of its own. Changes memory and speed only.
        measure: how a policy is sampled and scored before training and at each evaluation; null for not at all.
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
        turns: Literal["last", "all"],
        pack_tokens: NonNegativeCount,
        measure: Evaluate | None,
    ) -> None:
        self.algorithm, self.model, self.dataset, self.learner = algorithm, model, dataset, learner
        self.hardware, self.epochs, self.batch_size = hardware, epochs, batch_size
        self.calibration: CalibrationMethod = calibration
        self.calibration_column = calibration_column
        self.checkpoint_every, self.evaluate_every = checkpoint_every, evaluate_every
        self.every_turn, self.pack_tokens = turns == "all", pack_tokens
        self.measure = measure
        self.trains_policy = algorithm.trains == "policy"
        settings = learner.keywords
        if settings["epochs"] != 1 or settings["minibatch_size"]:
            raise ValueError(
                f"learner.epochs={settings['epochs']}, learner.minibatch_size={settings['minibatch_size']}: a run on a "
                "data set is cut by stage.epochs and stage.batch_size; leave these two at 1 and 0"
            )

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        roles = ("policy", "reference") if getattr(self.algorithm, "uses_reference", False) else ("policy",)
        self.model.check(roles, promised)
        self.dataset.check(promised, self.algorithm.reads)
        if (self.every_turn or self.pack_tokens) and self.algorithm.reads != "demonstrations":
            key = "turns=all" if self.every_turn else f"pack_tokens={self.pack_tokens}"
            raise ValueError(
                f"stage.{key} is for responses to imitate, but this method reads {self.algorithm.reads}; "
                "use stage.turns=last and stage.pack_tokens=0"
            )
        if self.trains_policy and self.calibration != "none":
            raise ValueError(
                f"stage.calibration={self.calibration}, but a policy has no score; use stage.calibration=none"
            )
        if self.measure is not None:
            if not self.trains_policy:
                raise ValueError("stage.measure samples from a policy, but this method trains a scorer; set it to null")
            self.measure.check(promised)

    @property
    def stateful(self) -> Mapping[str, Stateful]:
        """The parts of the method that change during a run; most have none."""
        return self.algorithm.stateful if isinstance(self.algorithm, Observant) else {}

    def run(self, run: Run) -> Metrics:
        self.hardware.start()
        distribution = Distribution.of(self.hardware)
        template = Template(load_tokenizer(self.model.policy, self.model.new_tokens), self.dataset.template_style)
        records = self._records(self.dataset.train_split, template)
        held_out = {split: self._records(split, template) for split in self.dataset.splits}
        reference_set = ReferenceSet.read(
            self.dataset, self.algorithm.reads, template, self.calibration, self.calibration_column
        )
        if getattr(self.algorithm, "use_margin", False) and not any(record.margin for record in records):
            raise ValueError(
                f"the algorithm reads the margins of the data, but {self.dataset.path} has none; "
                "say which column holds them with dataset.columns.margin=<column>"
            )
        if missing := [name for name in getattr(self.algorithm, "scores", ()) if name not in records[0].gaps]:
            raise ValueError(
                f"the algorithm reads the score {missing[0]!r}, but the pairs of {self.dataset.path} have "
                f"{sorted(records[0].gaps)}; add it to the table with stage=score_table"
            )
        for note in self.dataset.notes:
            run.warn(0, note)
        lesson = self._with_reference(run, self.dataset.train_split, template, records)
        exams = {split: self._with_reference(run, split, template, rows) for split, rows in held_out.items()}
        outputs = getattr(self.algorithm, "outputs", SCORE)
        load = load_policy if self.trains_policy else partial(new_scorer, outputs=outputs)
        model = load(
            self.model.policy,
            device=distribution.loads_on,
            dtype=self.model.dtype(self.hardware),
            seed=derive(run.seed, "initial weights"),
            new_tokens=new_token_ids(template.tokenizer, self.model.new_tokens),
            adapters=self.model.adapters,
        )
        freeze(model, self.model.frozen_layers)
        steps_per_epoch = -(-len(records) // self.batch_size)
        total = steps_per_epoch * self.epochs
        name = "policy" if self.trains_policy else "scorer"
        guide = MovingAverage(model, self.algorithm.ema_decay if isinstance(self.algorithm, Guided) else 0.0)
        learner = self.learner(modules={name: model}, total_updates=total, distribution=distribution)
        if self.pack_tokens:
            probe = text_batch(template, records[:PACKED_TO_CHECK]).to(learner.training.device).sequences
            exactly = torch.autocast(learner.training.device.type, enabled=False)(partial(check_packing, model))
            through(model, exactly)(probe)
        run.console.say(f"{len(records)} rows, {total} steps of {self.batch_size}; template {template.style}")

        bench = self.measure.bench(self.model.policy, run.seed) if self.measure else None
        first = self._resume(run, distribution, model, learner, guide)
        latest: Metrics = {}
        if bench and first == 0:
            account = Account()
            with account.phase(EVALUATION):
                measured = self._sample(run, bench, distribution, model, 0)
            run.log(0, measured | account.metrics({}) | {"episode": 0.0})
        for done in run.steps(self.algorithm.reads, first, total, latest):
            step = done + 1  # step k is the state after k optimiser steps
            epoch, place = divmod(done, steps_per_epoch)
            order = torch.randperm(len(records), generator=generator(run.seed, "order", epoch))
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            account = Account()
            with account.phase("update"):
                batch = lesson.batch(self.algorithm.reads, template, chosen)
                if isinstance(self.algorithm, Guided):
                    with distribution.whole(model) as whole:
                        batch = self._guided(guide.model if guide.decay else whole, batch)
                torch.manual_seed(derive(run.seed, "dropout", done) + ranks.rank())  # other rows, other masks
                model.train()
                part = self._lesson(model, batch)
                means = learner.update([part], derive(run.seed, "learner", done))
                if guide.decay:
                    with distribution.whole(model) as whole:
                        guide.update(whole)
            metrics = _named(means)
            if isinstance(self.algorithm, Observant):
                metrics |= self.algorithm.observe(means)
            metrics["episode"] = float(epoch * len(records) + place * self.batch_size + len(chosen))
            last = step == total
            if last or (self.evaluate_every and step % self.evaluate_every == 0):
                with account.phase(EVALUATION):
                    with distribution.whole(model.eval()) as whole:
                        teacher = guide.model if guide.decay else whole
                        for split, exam in exams.items():
                            found = self._evaluate(whole, teacher, template, exam)
                            metrics |= {f"eval/{split}/{name}": value for name, value in found.items()}
                    if bench:
                        metrics |= self._sample(run, bench, distribution, model, step)
            metrics |= account.metrics({"update": int(part.batch.lengths.sum())})
            latest.update(metrics)
            run.log(step, metrics)
            due = last or step % self.checkpoint_every == 0
            run.checkpoint(step, partial(self._state, distribution, model, learner, guide), due=due)

        with distribution.whole(model.eval()) as whole:
            units = None
            if not self.trains_policy:
                units = reference_set.calibrate(whole, template, self.calibration, run.console)
            merge = self.model.merge
            run.make(name, lambda folder: save_model(folder, whole, template.tokenizer, units, merge=merge))
        return run.last

    def _state(
        self, distribution: Distribution, model: "PreTrainedModel", learner: Learner, guide: MovingAverage
    ) -> dict[str, Any]:
        """Everything that changes during a run; random numbers are derived from the step and need no saving."""
        return {
            "model": distribution.parameters(model),
            "learner": learner.state_dict(),
            "guide": guide.state_dict(),
            "algorithm": {name: part.state_dict() for name, part in self.stateful.items()},
        }

    def _resume(
        self, run: Run, distribution: Distribution, model: "PreTrainedModel", learner: Learner, guide: MovingAverage
    ) -> int:
        """Optimiser steps done, with every part as it was after the last checkpoint."""
        resumed = run.resume()
        if resumed is None:
            return 0
        step, state = resumed
        distribution.restore(model, state["model"])
        learner.load_state_dict(state["learner"])
        guide.load_state_dict(state["guide"])
        for name, part in self.stateful.items():
            part.load_state_dict(state["algorithm"][name])
        return step

    def _records(self, split: str, template: Template) -> Sequence[Any]:
        records = getattr(self.dataset, self.algorithm.reads)(split, template)
        return [replace(record, every_turn=True) for record in records] if self.every_turn else records

    def _lesson(self, model: "PreTrainedModel", batch: Any) -> Part:
        """What is learnt from in one step."""
        if not self.pack_tokens:
            return self._part(model, batch)
        return Part(pack(batch.sequences, self.pack_tokens), partial(packed_forward, model), self.algorithm.loss)

    def _part(self, model: "PreTrainedModel", batch: Trainable) -> Part:
        token_scores = getattr(self.algorithm, "token_scores", False)
        forward = text_logprobs if self.trains_policy else partial(text_scores, token_scores=token_scores)
        return Part(batch, lambda rows: forward(model, rows.texts), self.algorithm.loss)

    @torch.no_grad()
    def _guided(self, teacher: "PreTrainedModel", batch: Any) -> Any:
        """The stronger pairs of quadruples with the margin of the weaker ones, where the method takes it from there."""
        algorithm = self.algorithm
        if not isinstance(algorithm, Guided):
            return batch
        cast(Any, teacher).to(teacher.device).eval()  # an adapter's average was read before its base went there
        margins = torch.empty(len(batch))
        for index in microbatches(batch.weak.lengths, self.learner.keywords["tokens_at_once"]):
            with out_of_memory.reading(batch.weak.lengths[index], self.learner.keywords["tokens_at_once"]):
                weak = batch.weak.select(index).to(teacher.device)
                margins[index] = algorithm.weak_margin(text_logprobs(teacher, weak.texts), weak).cpu()
        return replace(batch.strong, margin=margins)

    def _sample(
        self, run: Run, bench: Bench, distribution: Distribution, model: "PreTrainedModel", step: int
    ) -> Metrics:
        """What the policy says to held-out prompts, measured; every row goes to samples/."""
        make = partial(Generator, template=bench.evaluator.template, sampling=bench.sampling)
        engine = distribution.engine(model.eval(), make)
        metrics, rows = bench.evaluator.evaluate(engine, bench.scorer)
        run.write_rows(f"samples/step_{step:06d}.jsonl", rows)
        leave_table(run, step, rows, bench.scorer, bench.sampling)
        return metrics

    def _with_reference(self, run: Run, split: str, template: Template, records: Sequence[Any]) -> Lesson:
        """The records, and what the reference says of their responses, which is computed once and kept on disk."""
        if not getattr(self.algorithm, "uses_reference", False):
            return Lesson(records, ())
        place = f"reference/{split}"
        if not is_sound(run, place):
            distribution = Distribution.of(self.hardware)
            device = distribution.loads_on
            options = {
                "device": device,
                "dtype": self.model.dtype(self.hardware),
                "seed": derive(run.seed, "initial weights"),
                "adapters": self.model.adapters,
            }
            new_tokens = new_token_ids(template.tokenizer, self.model.new_tokens)
            reference = distribution.frozen(load_frozen(self.model.reference, new_tokens=new_tokens, **options))
            said = through(reference, lambda part: policy_logprobs(reference, part).sum(1))
            batch = BATCHES[self.algorithm.reads](template, records)
            budget = self.learner.keywords["tokens_at_once"]
            columns = [by_length(text, budget, reference.device, said) for text in batch.texts]

            def fill(folder: Path) -> None:
                save_file({str(i): column for i, column in enumerate(columns)}, folder / REFERENCE)
                seal(folder)

            run.make(place, fill)
        run.pause()
        saved = load_file(run.directory / place / REFERENCE)
        return Lesson(records, tuple(saved[str(i)] for i in range(len(saved))))

    @torch.no_grad()
    def _evaluate(
        self, model: "PreTrainedModel", teacher: "PreTrainedModel", template: Template, lesson: Lesson
    ) -> Metrics:
        """Means over held-out rows (a per-token term: over their tokens)."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for part in ranks.share(list(batches(len(lesson.records), self.batch_size))):
            index = torch.arange(part.start, part.stop)
            whole = self._guided(teacher, lesson.batch(self.algorithm.reads, template, index))
            for batch in _within(whole, self.learner.keywords["tokens_at_once"]):
                with out_of_memory.reading(batch.lengths, self.learner.keywords["tokens_at_once"]):
                    batch = batch.to(model.device)
                    piece = self._part(model, batch)
                    for term in piece.loss(piece.forward(batch), batch):
                        values, count = _total(term, batch)
                        sums[term.name] = sums.get(term.name, 0.0) + values
                        counts[term.name] = counts.get(term.name, 0.0) + count
        sums, counts = ranks.sum_by_name(sums), ranks.sum_by_name(counts)
        return _named({name: sums[name] / counts[name] for name in sums})


def _within(batch: Any, tokens_at_once: int) -> list[Any]:
    """The batch as it is, or cut into microbatches where it exceeds the budget."""
    cuts = microbatches(batch.lengths, tokens_at_once)
    return [batch] if len(cuts) == 1 else [batch.select(index) for index in cuts]


def _total(term: Term, batch: Any) -> tuple[float, float]:
    if term.per == "row":
        return term.values.sum().item(), float(len(batch))
    return term.values.where(batch.token_mask, 0).sum().item(), float(batch.token_mask.sum())


def _named(means: Metrics) -> Metrics:
    """Terms under their contract names: what is minimised is a loss, the rest stands by itself."""
    plain = ("accuracy", "log_variance", "grad_norm", "lr", "margin", "implicit_reward/")
    return {name if name.startswith(plain) else f"loss/{name}": value for name, value in means.items()}
