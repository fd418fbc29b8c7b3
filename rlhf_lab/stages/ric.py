"""Rewards-in-Context: learn to obtain the rewards that the prompt asks for, then from own responses to harder requests.

Source: Yang et al. 2024, arXiv:2402.10207.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from rlhf_lab.data.cleaning import Cleaning
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.reward_conditions import RewardContext, RewardNotation, moments
from rlhf_lab.data.tables import Rows
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import text_batch
from rlhf_lab.engine import ranks
from rlhf_lab.engine.accounting import EVALUATION, Account
from rlhf_lab.engine.distribution import Distribution
from rlhf_lab.engine.forward import policy_forward
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.learner import Learner, Part
from rlhf_lab.engine.model_paths import ModelPaths
from rlhf_lab.engine.models import load_frozen, load_policy, save_model
from rlhf_lab.engine.score import Scorer
from rlhf_lab.engine.tokenizer import load_tokenizer, new_token_ids
from rlhf_lab.evaluation.evaluator import Evaluator
from rlhf_lab.functional.simplex import Grid
from rlhf_lab.functional.targets import KeepRule, TargetMap, empirical_scale, gaussian_scale, keep
from rlhf_lab.interfaces import OfflineAlgorithm
from rlhf_lab.records import Demonstration
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive, generator
from rlhf_lab.stages.ric_responses import Author, Judge, Scored
from rlhf_lab.stages.ric_trade_offs import TradeOffs
from rlhf_lab.stages.shards import write_splits
from rlhf_lab.types import Count, Fraction, Metrics, NonNegativeCount, Positive

SCALE_POINTS = 101  # levels of a reward's scale: its percentiles, if it is the data's


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one run shares: made when it starts, gone when it ends."""

    template: Template
    policy: PreTrainedModel
    distribution: Distribution
    offline: Scored
    context: RewardContext
    author: Author
    trade_offs: TradeOffs


class RiC:
    """Supervised learning of responses under their own rewards: offline on a data set, then online on own responses.

    Args:
        algorithm: the loss of a response; it reads demonstrations.
        dataset: its held-out splits are told every trade-off, and evaluated.
        demonstrations, preferences: what is learnt from offline, either or both; of a pair both responses.
        rewards: name -> source; null leaves one out.
        costs: names of those for which higher is worse.
        told: the rewards that the policy is told, in this order; a cost is told with its sign turned.
        notation: how they are written into the prompt.
        target_range: from where to where rewards are asked for: "data", quantiles of the rewards of the offline
            responses at the levels `range_quantiles`; "gaussian", the extremes of normal draws, as released.
        target_map: which rewards a preference asks for, see `functional/targets.py`.
        offline_steps, online_steps: optimiser steps, online in each iteration.
        batch_size: rows of each.
        online_iterations: 0: offline only.
        online_lr: the policy's rate online, constant.
        num_generation_samples: prompts answered in each iteration, of those that were learnt from offline.
        with_replacement: whether a prompt may be drawn twice in one iteration.
        cleaning: which of these responses are fit to be learnt from.
        quantile_threshold, keep_rule: of them, those whose rewards reach this quantile of the iteration in any
            reward, or in all.
        num_origin_samples: offline responses learnt from again in each iteration, of those that pass the same rule.
        trade_off_steps: of the grid of preferences in evaluation, from one reward to another; or "released".
        prompts_per_shard: responses generated or scored between two saves; a killed run continues after the last.
        checkpoint_every: optimiser steps.
    """

    def __init__(
        self,
        *,
        algorithm: OfflineAlgorithm,
        model: ModelPaths,
        dataset: Dataset,
        demonstrations: Dataset | None,
        preferences: Dataset | None,
        rewards: Mapping[str, Any],
        costs: Sequence[str],
        told: Sequence[str],
        notation: RewardNotation,
        target_range: Literal["data", "gaussian"],
        range_quantiles: tuple[Fraction, Fraction],
        target_map: TargetMap,
        learner: partial[Learner],
        hardware: Hardware,
        offline_steps: Count,
        batch_size: Count,
        online_iterations: NonNegativeCount,
        online_steps: Count,
        online_lr: Positive,
        generation_sampling: Sampling,
        num_generation_samples: Count,
        with_replacement: bool,
        cleaning: Cleaning,
        quantile_threshold: Fraction,
        keep_rule: KeepRule,
        num_origin_samples: Count,
        evaluation_sampling: Sampling,
        trade_off_steps: Grid,
        prompts_per_shard: Count,
        checkpoint_every: Count,
    ) -> None:
        self.algorithm, self.model, self.dataset, self.hardware = algorithm, model, dataset, hardware
        self.data = {
            reads: data
            for reads, data in (("demonstrations", demonstrations), ("preferences", preferences))
            if data is not None
        }
        self.rewards = {name: source for name, source in rewards.items() if source is not None}
        self.unknown_costs = [name for name in costs if name not in rewards]
        self.costs, self.told, self.notation = tuple(costs), tuple(told), notation
        self.target_range: Literal["data", "gaussian"] = target_range
        self.low, self.high = range_quantiles
        self.target_map: TargetMap = target_map
        self.learner, self.offline_steps, self.batch_size = learner, offline_steps, batch_size
        self.online_iterations, self.online_steps, self.online_lr = online_iterations, online_steps, online_lr
        self.generation_sampling, self.num_generation_samples = generation_sampling, num_generation_samples
        self.with_replacement, self.cleaning = with_replacement, cleaning
        self.quantile_threshold, self.num_origin_samples = quantile_threshold, num_origin_samples
        self.keep_rule: KeepRule = keep_rule
        self.evaluation_sampling = evaluation_sampling
        self.trade_off_steps: Grid = trade_off_steps
        self.prompts_per_shard, self.checkpoint_every = prompts_per_shard, checkpoint_every
        settings = learner.keywords
        if settings["epochs"] != 1 or settings["minibatch_size"]:
            raise ValueError(
                f"learner.epochs={settings['epochs']}, learner.minibatch_size={settings['minibatch_size']}: the length "
                "of this run is said by stage.offline_steps, stage.online_steps and stage.batch_size; "
                "leave these two at 1 and 0"
            )
        if self.low >= self.high:
            raise ValueError(f"stage.range_quantiles=[{self.low}, {self.high}]: the first must be below the second")

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        self.model.check(("policy", "reference"), promised)
        self.model.check_words(self.new_tokens, promised)
        if self.algorithm.reads != "demonstrations" or self.algorithm.trains != "policy":
            raise ValueError(
                f"stage=ric trains a policy on responses, but {type(self.algorithm).__name__} trains a "
                f"{self.algorithm.trains} on {self.algorithm.reads}; use the loss of algorithm=sft"
            )
        self.dataset.check(promised)
        if not self.data:
            raise ValueError(
                "stage=ric has nothing to learn from; name data with dataset@stage.demonstrations=<option> "
                "or dataset@stage.preferences=<option>"
            )
        for reads, data in self.data.items():
            data.check(promised, reads)
            if data.is_world and reads == "preferences":
                raise ValueError(
                    f"stage.preferences.path={data.path}: the world draws no pairs; name a table of them "
                    "(dataset@stage.preferences=tiny_help_preferences)"
                )
        if missing := [name for name in self.told if name not in self.rewards]:
            raise ValueError(
                f"stage.told={list(self.told)}, but the reward sources are {sorted(self.rewards)}; "
                f"add reward.sources.{missing[0]} or change stage.told"
            )
        if self.unknown_costs:
            raise ValueError(
                f"stage.costs names {self.unknown_costs}, but the reward sources are {sorted(self.rewards)}; name "
                "those for which higher is worse"
            )
        if not self.told or len(set(self.told)) < len(self.told):
            raise ValueError(f"stage.told={list(self.told)}: name each reward once, and at least one")
        for source in self.rewards.values():
            source.check(promised)

    @property
    def new_tokens(self) -> list[str]:
        """Words that the policy gets: those of the model's settings, and the levels of the rewards."""
        return [*self.model.new_tokens, *self.notation.new_tokens(self.told)]

    def run(self, run: Run) -> Metrics:
        parts = self._load(run)
        done, learner_state, grid = self._resume(run, parts)
        run.console.say(
            f"{len(parts.offline)} responses under {', '.join(self.told)}; {self.offline_steps} steps, then "
            f"{self.online_iterations} iterations of {self.online_steps}; template {parts.template.style}"
        )
        for phase in range(self.online_iterations + 1):
            begin = self.offline_steps + (phase - 1) * self.online_steps if phase else 0
            end = self.offline_steps + phase * self.online_steps
            if done < end:
                # at the beginning of a phase the optimiser is fresh, as in the release
                self._learn(run, parts, phase, begin, end, learner_state if done > begin else None, grid)
                learner_state, done = None, end
        iterations = range(1, self.online_iterations + 1)
        tables = {"offline": parts.offline.rows(parts.context)}
        tables |= {f"iteration_{i:02d}": parts.author.rows(run, i) for i in iterations}
        run.make("data", partial(write_splits, tables | {"preference_grid": grid}))
        with parts.distribution.whole(parts.policy) as policy:
            run.make("policy", partial(_save, parts, policy, self.model.merge))
        return run.last

    def _learn(
        self,
        run: Run,
        parts: Parts,
        phase: int,
        begin: int,
        end: int,
        learner_state: dict[str, Any] | None,
        grid: Rows,
    ) -> None:
        """The optimiser steps `begin` to `end` of one phase, 0 being offline; its evaluation is added to the grid."""
        lessons, facts = self._lessons(run, parts, phase)
        online = {"lr": {"policy": self.online_lr}, "schedule": "constant", "warmup": 0} if phase else {}
        settings = {"total_updates": end - begin, "distribution": parts.distribution, **online}
        learner = self.learner(modules={"policy": parts.policy}, **settings)
        first = begin
        if learner_state is not None:
            learner.load_state_dict(learner_state)
            first = begin + learner.updates
        latest: Metrics = {}
        for place in run.steps(f"iteration {phase}" if phase else "offline", first, end, latest):
            step = place + 1  # step k is the state after k optimiser steps
            torch.manual_seed(derive(run.seed, "dropout", place) + ranks.rank())  # other rows, other masks
            account = Account()
            with account.phase("update"):
                parts.policy.train()
                batch = text_batch(parts.template, self._rows(lessons, phase, place - begin, run.seed))
                forward = partial(policy_forward, parts.policy)
                part = Part(batch, lambda rows, forward=forward: forward(rows.sequences), self.algorithm.loss)
                means = learner.update([part], derive(run.seed, "learner", place))
            metrics = {name if name.startswith(("grad_norm", "lr")) else f"loss/{name}": v for name, v in means.items()}
            metrics["episode"] = float(step * self.batch_size)
            if step == begin + 1:
                metrics |= facts
            if step == end:
                make = partial(Generator, template=parts.template, sampling=self.evaluation_sampling)
                engine = parts.distribution.engine(parts.policy.eval(), make)
                with account.phase(EVALUATION):
                    measured, rows = parts.trade_offs.measure(run, engine, self.evaluation_sampling, phase, step)
                metrics |= measured
                grid += rows
            metrics |= account.metrics({"update": int(batch.lengths.sum())})
            latest.update(metrics)
            run.log(step, metrics)
            due = step == end or step % self.checkpoint_every == 0
            run.checkpoint(step, partial(_state, parts, learner, grid), due=due)

    def _rows(self, lessons: Sequence[Demonstration], phase: int, step: int, seed: int) -> list[Demonstration]:
        """The next rows of an endless sequence of epochs, each epoch in an order of its own."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {
            epoch: torch.randperm(len(lessons), generator=generator(seed, "order", phase, epoch)).tolist()
            for epoch in {place // len(lessons) for place in places}
        }
        return [lessons[orders[place // len(lessons)][place % len(lessons)]] for place in places]

    def _lessons(self, run: Run, parts: Parts, phase: int) -> tuple[list[Demonstration], Metrics]:
        """What a phase learns from, and facts about it: all offline rows; or the best of them, and of every iteration.

        Raises:
            ValueError: no generated response was fit to be learnt from.
        """
        if not phase:
            return parts.offline.lessons(parts.context), {"ric/rows": float(len(parts.offline))}
        kept: list[Demonstration] = []
        facts: Metrics = {}
        for iteration in range(1, phase + 1):
            rows = parts.author.rows(run, iteration)
            fit = parts.author.fit(rows)
            if not len(fit):
                raise ValueError(
                    f"none of the {len(rows)} responses of iteration {iteration} is fit to be learnt from "
                    f"({dict(Counter(row['dropped'] for row in rows))}); look at them in {run.directory}/shards, train "
                    "longer offline, or relax stage.cleaning"
                )
            chosen = self._keep(fit, parts.context)
            kept += chosen.lessons(parts.context)
            facts = {"ric/generated": float(len(rows)), "ric/kept": float(len(chosen))}
            facts |= {f"ric/dropped/{why}": float(n) for why, n in Counter(r["dropped"] for r in rows).items() if why}
            obtained = parts.context.standardised(fit.raw).mean(0).tolist()
            facts |= {f"ric/{name}/obtained": value for name, value in zip(self.told, obtained, strict=True)}
        origin = self._keep(parts.offline, parts.context)
        order = torch.randperm(len(origin), generator=generator(run.seed, "origin", phase))[: self.num_origin_samples]
        again = origin.select(order)
        lessons = [*again.lessons(parts.context), *kept]
        return lessons, facts | {"ric/origin": float(len(again)), "ric/rows": float(len(lessons))}

    def _keep(self, scored: Scored, context: RewardContext) -> Scored:
        """Those of the responses that reach the quantile of their own rewards."""
        chosen = keep(context.standardised(scored.raw), self.quantile_threshold, self.keep_rule)
        return scored.select(chosen.nonzero()[:, 0])

    def _load(self, run: Run) -> Parts:
        """Read weights and data, and score the data once; everything that is shared is made here."""
        template = Template(load_tokenizer(self.model.policy, self.new_tokens), self.dataset.template_style)
        self.hardware.start()
        distribution = Distribution.of(self.hardware)
        options = {
            "device": distribution.loads_on,
            "dtype": self.model.dtype(self.hardware),
            "adapters": self.model.adapters,
            "seed": derive(run.seed, "initial weights"),
            "new_tokens": new_token_ids(template.tokenizer, self.new_tokens),
        }
        rewards = {name: source.load(self.hardware, template) for name, source in self.rewards.items()}
        judge = Judge(
            sources={name: rewards[name] for name in self.told},
            costs=self.costs,
            template=template,
            per_shard=self.prompts_per_shard,
        )
        offline = judge.offline(run, self.data)
        mean, sd = moments(offline.raw, self.told)
        units = (offline.raw - mean) / sd
        context = RewardContext(
            names=self.told,
            notation=self.notation,
            mean=mean,
            sd=sd,
            scale=empirical_scale(units, self.low, self.high, SCALE_POINTS)
            if self.target_range == "data"
            else gaussian_scale(len(self.told), SCALE_POINTS),
            method=self.target_map,
        )
        held_out = {split: self.dataset.prompts(split, template) for split in self.dataset.splits}
        seen = {prompt.id for prompt in offline.prompts}
        for split, prompts in held_out.items():
            if shared := sum(prompt.id in seen for prompt in prompts):
                raise ValueError(f"{shared} prompts of {split} are also learnt from; hold them out")
        for data in (self.dataset, *self.data.values()):
            for note in data.notes:
                run.warn(0, note)
        scorer = Scorer(
            rewards=rewards,
            reference=distribution.frozen(load_frozen(self.model.reference, **options)),
            critics=None,
            tokens_at_once=self.learner.keywords["tokens_at_once"],
        )
        prompts = {
            f"{split}:{name}": told
            for split, each in held_out.items()
            for name, told in context.under_trade_offs(each, self.trade_off_steps).items()
        }
        policy = load_policy(self.model.policy, **options)
        gold = {name: Gold(measure) for name, measure in self.dataset.gold.items()}
        return Parts(
            template=template,
            policy=policy,
            distribution=distribution,
            offline=offline,
            context=context,
            author=Author(
                policy=policy,
                distribution=distribution,
                judge=judge,
                context=context,
                prompts=list({prompt.id: prompt for prompt in offline.prompts}.values()),
                sampling=self.generation_sampling,
                num_prompts=self.num_generation_samples,
                with_replacement=self.with_replacement,
                cleaning=self.cleaning,
            ),
            trade_offs=TradeOffs(
                context=context,
                evaluator=Evaluator(prompts, gold, template, run.seed),
                scorer=scorer,
                splits=tuple(self.dataset.splits),
                costs=self.costs,
                steps=self.trade_off_steps,
            ),
        )

    def _resume(self, run: Run, parts: Parts) -> tuple[int, dict[str, Any] | None, Rows]:
        """(optimiser steps done, state of the optimiser, trade-offs measured), and the policy as it was then."""
        resumed = run.resume()
        if resumed is None:
            return 0, None, []
        step, state = resumed
        parts.distribution.restore(parts.policy, state["model"])
        return step, state["learner"], state["grid"]


def _state(parts: Parts, learner: Learner, grid: Rows) -> dict[str, Any]:
    """Everything that changes during a run; random numbers are derived from the step and need no saving."""
    model = parts.distribution.parameters(parts.policy)
    return {"model": model, "learner": learner.state_dict(), "grid": grid}


def _save(parts: Parts, policy: PreTrainedModel, merge: bool, folder: Path) -> None:
    save_model(folder, policy, parts.template.tokenizer, merge=merge)
    parts.context.save(folder)
