"""Learning from own samples: generate, score, prepare, update. Every on-policy method runs here."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lab.algorithms.sft import SFT
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch, text_batch
from rlhf_lab.engine.accounting import EVALUATION, Account
from rlhf_lab.engine.backbone import AdapterView
from rlhf_lab.engine.critics import Critics, load_critics, shared_critics
from rlhf_lab.engine.distribution import Distribution, through
from rlhf_lab.engine.forward import policy_forward
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.learner import Learner, Part, minibatch_count
from rlhf_lab.engine.model_paths import SHARED, ModelPaths
from rlhf_lab.engine.models import load_frozen, load_policy, save_model
from rlhf_lab.engine.parameters import freeze
from rlhf_lab.engine.prefixes import share_prefixes, shares_prefixes
from rlhf_lab.engine.score import Scorer, own_family_microbatches, own_microbatches
from rlhf_lab.engine.tokenizer import load_tokenizer, new_token_ids
from rlhf_lab.engine.trunk import alias_frozen
from rlhf_lab.evaluation.evaluator import Evaluator, leave_table, under_conditions
from rlhf_lab.evaluation.metrics import rollout_metrics, warnings
from rlhf_lab.interfaces import Conditions, Engines, OnlineAlgorithm, RewardSource, RolloutEngine
from rlhf_lab.records import Demonstration, Prompt
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive, generator
from rlhf_lab.types import Count, Experience, Metrics, NonNegative, NonNegativeCount, PolicyForward, Term

SHOWN_SAMPLES = 4
LEAST_SAID = 2**20  # bytes that are worth a line


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one run shares: made when it starts, gone when it ends."""

    template: Template
    policy: PreTrainedModel
    critics: Critics | None
    prompts: Sequence[Prompt]
    demonstrations: Sequence[Demonstration]
    distribution: Distribution
    engine: RolloutEngine
    scorer: Scorer
    learner: Learner
    gold: Mapping[str, RewardSource]
    evaluator: Evaluator

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What learns."""
        return {"policy": self.policy} if self.critics is None else {"policy": self.policy, "critic": self.critics}


class TrainOnline:
    """One policy, its reference, its critics and the reward sources, wired together for one run.

    Args:
        rewards: name -> source; null leaves one out.
        costs: names of those for which higher is worse.
        steps: iterations of the loop.
        prompts_per_step, samples_per_prompt: their product is the batch.
        shared_prefixes: "auto": models compute a prompt once for all responses to it, forward and backward, where they
            can and there are several. Changes memory and speed only.
        rollout: which engine samples, in training and held-out evaluation.
        conditions: what the policy is told beside each request, in training and held-out evaluation.
        demonstrations: data of the ptx term, or null.
        ptx_coef: weight of the likelihood of demonstrations beside the RL loss (Ouyang et al. 2022, eq. 2); 0: none.
        evaluate_every: iterations between held-out evaluations; there is one before the first and after the last.
        checkpoint_every: iterations.
    """

    def __init__(
        self,
        *,
        algorithm: OnlineAlgorithm,
        model: ModelPaths,
        dataset: Dataset,
        rewards: Mapping[str, Any],
        costs: Sequence[str],
        sampling: Sampling,
        evaluation_sampling: Sampling,
        rollout: Engines,
        learner: partial[Learner],
        hardware: Hardware,
        steps: Count,
        prompts_per_step: Count,
        samples_per_prompt: Count,
        shared_prefixes: Literal["auto", "off"],
        conditions: Conditions,
        demonstrations: Dataset | None,
        ptx_coef: NonNegative,
        evaluate_every: NonNegativeCount,
        checkpoint_every: Count,
    ) -> None:
        self.algorithm, self.model, self.dataset = algorithm, model, dataset
        self.rewards = {name: source for name, source in rewards.items() if source is not None}
        self.costs = [name for name in costs if name in self.rewards]
        self.unknown_costs = [name for name in costs if name not in rewards]
        self.sampling, self.evaluation_sampling, self.rollout = sampling, evaluation_sampling, rollout
        self.learner, self.hardware, self.steps = learner, hardware, steps
        self.prompts_per_step, self.samples_per_prompt = prompts_per_step, samples_per_prompt
        self.shared_prefixes, self.conditions = shared_prefixes, conditions
        self.demonstrations, self.ptx_coef = demonstrations, ptx_coef
        self.evaluate_every, self.checkpoint_every = evaluate_every, checkpoint_every

    @property
    def batch_size(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def limits(self) -> dict[str, float]:
        """cost -> above which value it counts as a violation: its constraint's limit, 0 without one."""
        constraints = getattr(self.algorithm, "constraints", {})
        return {name: constraints[name].violated_above if name in constraints else 0.0 for name in self.costs}

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        own_critic = ["critic"] if self.model.critic != SHARED else []
        self.model.check(["policy", "reference", *own_critic], promised)
        self.model.check_words(self.conditions.new_tokens, promised)
        self.dataset.check(promised)
        if self.demonstrations is not None:
            self.demonstrations.check(promised, "demonstrations")
            if not self.ptx_coef:
                raise ValueError(
                    "stage.demonstrations are named, but stage.ptx_coef=0 reads none; set it, or drop them"
                )
        for source in self.rewards.values():
            source.check(promised)
        if self.unknown_costs:
            raise ValueError(
                f"reward.costs names {self.unknown_costs}, but the reward sources are {sorted(self.rewards)}; name "
                "those for which higher is worse"
            )
        if missing := [name for name in self.algorithm.streams if name not in self.rewards]:
            raise ValueError(
                f"the objective and constraints read {list(self.algorithm.streams)}, but the reward sources are "
                f"{sorted(self.rewards)}; add reward.sources.{missing[0]} or change objective.weights"
            )
        if missing := [name for name in self.conditions.streams if name not in self.rewards]:
            raise ValueError(
                f"conditions weigh {list(self.conditions.streams)}, but the reward sources are {sorted(self.rewards)}; "
                f"add reward.sources.{missing[0]} or change conditions"
            )
        # an objective that weighs by the prompt refuses here a prompt that weighs nothing, or something else
        probes = self.conditions.evaluated([Prompt.from_text("a probe")]).values()
        scores = {name: torch.tensor([float(k)]) for k, name in enumerate(self.rewards)}
        worth = {self.algorithm.objective(scores, prompts).item() for prompts in probes}
        if self.conditions.streams and len(probes) > 1 and len(worth) == 1:
            raise ValueError(
                f"conditions weigh {list(self.conditions.streams)} by the prompt, but the objective is the same under "
                "every condition, so these weights would do nothing; use objective=preferred, or conditions=none"
            )
        self.sampling.check_trainable()
        self.rollout.check_trainable(self.sampling)
        for sampling in (self.sampling, self.evaluation_sampling):
            self.rollout.check(sampling, self.model, self.hardware)
        if self.samples_per_prompt < self.algorithm.least_samples:
            raise ValueError(
                f"stage.samples_per_prompt={self.samples_per_prompt}, but {type(self.algorithm).__name__} compares "
                f"responses to one prompt; set stage.samples_per_prompt to {self.algorithm.least_samples} or more"
            )
        minibatch_count(self.batch_size, self.learner.keywords["minibatch_size"])
        if self.ptx_coef and self.demonstrations is None:
            raise ValueError(
                f"stage.ptx_coef={self.ptx_coef} needs demonstrations; name a data set with "
                "+dataset@stage.demonstrations=<option>"
            )

    def run(self, run: Run) -> Metrics:
        parts = self._load(run)
        first, episode = self._resume(run, parts)
        run.console.say(
            f"{len(parts.prompts)} prompts, {self.steps} steps of {self.prompts_per_step} x {self.samples_per_prompt}; "
            f"template {parts.template.style}; rewards {', '.join(self.rewards)}"
        )
        latest: Metrics = {}
        if first == 0:  # step k is the state after k iterations
            account = Account()
            run.log(0, self._evaluate(run, parts, 0, account) | account.metrics({}) | {"episode": 0.0})
        for iteration in run.steps("step", first, self.steps, latest):
            step = iteration + 1
            account = Account()
            metrics, tokens = self._iterate(parts, iteration, run.seed, account)
            episode += self.batch_size
            metrics["episode"] = float(episode)
            for message in warnings(metrics):
                run.warn(step, message)
            last = step == self.steps
            if last or (self.evaluate_every and step % self.evaluate_every == 0):
                metrics |= self._evaluate(run, parts, step, account)
            metrics |= account.metrics(tokens)
            latest.update(metrics)
            run.log(step, metrics)
            due = last or step % self.checkpoint_every == 0
            run.checkpoint(step, partial(self._state, parts, episode), due=due)
        with parts.distribution.whole(parts.policy) as policy:
            tokenizer, merge = parts.template.tokenizer, self.model.merge
            run.make("policy", lambda folder: save_model(folder, policy, tokenizer, merge=merge))
        return run.last

    def _iterate(self, parts: Parts, iteration: int, seed: int, account: Account) -> tuple[Metrics, Mapping[str, int]]:
        """One turn of the loop: generate, score, prepare, update.

        Returns:
            Metrics, and the tokens of each phase: of the responses that were generated; of prompts and responses that
            were scored, for each model that read them; of what was learnt from, for each time.
        """
        with account.phase("rollout"):
            prompts = prompt_batch(parts.template, self._next_prompts(parts.prompts, iteration, seed))
            parts.engine.sync()
            rollout = parts.engine.generate(prompts, self.samples_per_prompt, derive(seed, "sampling", iteration))
        with account.phase("scoring"):
            rollout, mismatch = self.rollout.measured(rollout, parts.policy, parts.learner.tokens_at_once)
            scored = parts.scorer.score(rollout)
            experience, metrics = self.algorithm.prepare(scored)
        with account.phase("update"):
            losses = self._losses(parts, experience, iteration, seed)
            learnt = parts.learner.update(losses, derive(seed, "learner", iteration))

        gold = {name: source.score(rollout) for name, source in parts.gold.items()}
        metrics |= mismatch | _named(learnt) | rollout_metrics(scored, gold, self.limits, self.algorithm.streams[0])
        return metrics, {
            "rollout": int(scored.response_mask.sum()),
            "scoring": int(rollout.sequences.lengths.sum()) * parts.scorer.num_models(rollout),
            "update": sum(int(part.batch.lengths.sum()) for part in losses) * parts.learner.epochs,
        }

    def _losses(self, parts: Parts, experience: Experience, iteration: int, seed: int) -> list[Part]:
        """The RL loss, and the likelihood of a batch of demonstrations where ptx asks for it."""

        def forward(batch: Experience) -> PolicyForward:
            drawn = batch.scored.rollout
            return policy_forward(parts.policy, drawn.sequences, processing=drawn.processing, critics=parts.critics)

        def families(batch: Experience, tokens_at_once: int) -> list[Tensor]:
            return own_family_microbatches(batch.scored.rollout.sequences, tokens_at_once)

        cut = families if shares_prefixes(parts.policy) else own_microbatches
        losses = [Part(experience, forward, self._loss, microbatches=cut)]
        if parts.demonstrations:
            order = torch.randperm(len(parts.demonstrations), generator=generator(seed, "ptx", iteration))
            batch = text_batch(parts.template, [parts.demonstrations[i] for i in order[: self.batch_size].tolist()])
            likelihood = partial(policy_forward, parts.policy)
            losses.append(Part(batch, lambda rows: likelihood(rows.sequences), SFT().loss, self.ptx_coef))
        return losses

    def _loss(self, new: PolicyForward, batch: Experience) -> list[Term]:
        """The method's terms, and what is reported of every policy update."""
        log_ratio = (new.logprobs - batch.scored.logprobs).detach()
        return [
            *self.rollout.corrected(self.algorithm.loss(new, batch), batch.scored.rollout),
            Term("ratio", log_ratio.exp(), "token", 0.0),
            Term("approxkl", log_ratio.square() / 2, "token", 0.0),
            Term("entropy", new.entropy, "token", 0.0),
        ]

    def _next_prompts(self, prompts: Sequence[Prompt], iteration: int, seed: int) -> list[Prompt]:
        """The next prompts of an endless sequence of epochs, each epoch in an order and under conditions of its own."""
        first = iteration * self.prompts_per_step
        places = range(first, first + self.prompts_per_step)
        orders = {
            epoch: torch.randperm(len(prompts), generator=generator(seed, "order", epoch)).tolist()
            for epoch in {place // len(prompts) for place in places}
        }
        following = [prompts[orders[place // len(prompts)][place % len(prompts)]] for place in places]
        return self.conditions.drawn(following, derive(seed, "conditions", iteration))

    def _evaluate(self, run: Run, parts: Parts, step: int, account: Account) -> Metrics:
        """Held-out metrics; every row goes to samples/, a few to the console."""
        make = partial(self.rollout.engine, template=parts.template, sampling=self.evaluation_sampling)
        engine = parts.distribution.engine(parts.policy, make)
        with account.phase(EVALUATION):
            engine.sync()
            metrics, rows = parts.evaluator.evaluate(engine, parts.scorer.without_critics())
        run.write_rows(f"samples/step_{step:06d}.jsonl", rows)
        leave_table(run, step, rows, parts.scorer, self.evaluation_sampling)
        shown = [
            {
                "prompt": row["prompt"],
                "response": row["response"],
                "scores": ", ".join(f"{name} {value:.2f}" for name, value in row["scores"].items()),
                "gold": ", ".join(f"{name} {value:.2f}" for name, value in row["gold"].items()),
            }
            for row in rows[:SHOWN_SAMPLES]
        ]
        run.console.samples(f"held-out samples at step {step}", shown)
        return metrics

    def _load(self, run: Run) -> Parts:
        """Read weights and data; everything that is shared is made here."""
        new_tokens = [*self.model.new_tokens, *self.conditions.new_tokens]
        template = Template(load_tokenizer(self.model.policy, new_tokens), self.dataset.template_style)
        self.hardware.start()
        distribution = Distribution.of(self.hardware)
        options = {
            "device": distribution.loads_on,
            "dtype": self.model.dtype(self.hardware),
            "seed": derive(run.seed, "initial weights"),
            "new_tokens": new_token_ids(template.tokenizer, new_tokens),
            "adapters": self.model.adapters,
        }
        data = self.demonstrations if self.ptx_coef else None
        demonstrations = data.demonstrations(data.train_split, template) if data else []
        prompts, held_out = self._prompts(run, template, demonstrations)
        policy = load_policy(self.model.policy, **options)
        names = tuple(self.algorithm.critics)
        critics = None
        if names and self.model.critic == SHARED:
            critics = shared_critics(policy, names)
        elif names:
            critics = load_critics(self.model.critic, names, **options)
        for trunk in (policy, *([] if critics is None else [critics.trunk])):
            freeze(trunk, self.model.frozen_layers)
        modules = {"policy": policy} if critics is None else {"policy": policy, "critic": critics}
        settings = self.learner.keywords
        updates = self.steps * settings["epochs"] * minibatch_count(self.batch_size, settings["minibatch_size"])
        learner = self.learner(modules=modules, total_updates=updates, distribution=distribution)
        scorer = Scorer(
            rewards={name: source.load(self.hardware, template) for name, source in self.rewards.items()},
            reference=distribution.frozen(load_frozen(self.model.reference, **options)),
            critics=critics,
            tokens_at_once=learner.tokens_at_once,
        )
        self._warn_of_units(run)
        if self.shared_prefixes == "auto" and self.samples_per_prompt > 1:
            self._share_prefixes(run, policy, scorer)
        self._share_weights(run, policy, critics, scorer)
        gold = {name: Gold(measure) for name, measure in self.dataset.gold.items()}
        # in shards their weights are not here while the policy's are; nor is the base of adapters when engines are made
        on_trunk = critics is not None and critics.shares_trunk and self.hardware.distribution == "ddp"
        read_on_the_way = critics if on_trunk else None
        return Parts(
            template=template,
            policy=policy,
            critics=critics,
            prompts=prompts,
            demonstrations=demonstrations,
            distribution=distribution,
            engine=distribution.engine(
                policy, partial(self.rollout.engine, template=template, sampling=self.sampling, critics=read_on_the_way)
            ),
            scorer=scorer,
            learner=learner,
            gold=gold,
            evaluator=Evaluator(held_out, gold, template, run.seed),
        )

    def _share_prefixes(self, run: Run, policy: PreTrainedModel, scorer: Scorer) -> None:
        """Have every model of the run compute a prompt once for all responses to it, and say which one does not."""
        trunks: dict[str, PreTrainedModel] = {"model.policy": policy, "model.reference": scorer.reference}
        within: dict[str, nn.Module] = {}
        if scorer.critics is not None:
            trunks["model.critic"], within["model.critic"] = scorer.critics.trunk, scorer.critics
        for name, source in self.rewards.items():
            for i, model in enumerate(getattr(source, "models", ())):
                trunks[f"model {i} of reward.sources.{name}"] = model
        for name, model in trunks.items():
            exactly = torch.autocast(model.device.type, enabled=False)(partial(share_prefixes, model))
            try:
                through(within.get(name, model), exactly)()
            except ValueError as reason:
                run.console.say(f"{name} reads each prompt once per response: {reason}")

    def _share_weights(self, run: Run, policy: PreTrainedModel, critics: Critics | None, scorer: Scorer) -> None:
        """Keep once what several models have in common, and say which of them stand alone beside a shared base."""
        scorers = {
            f"{name} {i}": model
            for name, source in self.rewards.items()
            for i, model in enumerate(getattr(source, "models", ()))
        }
        learning = [policy, *([] if critics is None else [critics])]
        saved = alias_frozen([*learning, scorer.reference, *scorers.values()])
        if saved >= LEAST_SAID:
            run.console.say(f"{saved / 2**20:.0f} MiB of frozen layers are in memory once instead of several times")
        if isinstance(policy, AdapterView):
            alone = [name for name, model in scorers.items() if not policy.stands_beside(model)]
            sharing = 2 + len(scorers) - len(alone) + (critics is not None)
            run.console.say(
                f"{sharing} models are adapters and heads on one base, {policy.backbone.path}"
                + (f", stored as {policy.backbone.quantise}" if policy.backbone.quantise else "")
                + (f"; not on it, and so beside it in memory: {', '.join(alone)}" if alone else "")
            )

    def _warn_of_units(self, run: Run) -> None:
        """Say of loaded sources if their scores are put to a use that they have no units for.

        A cost is held below a limit, but its 0 is not known to be the border of safety; members are compared, but each
        is known up to a shift only.
        """
        for name, source in self.rewards.items():
            if len(getattr(source, "members", ())) > 1 and getattr(source, "units", "") == "none":
                run.warn(
                    0,
                    f"the members of {name!r} are raw: each may be shifted by any number, which an ensemble takes for "
                    "disagreement; train them with stage.calibration=standardised on one data set",
                )
        caveats = {
            "none": "raw: pairs say nothing of where 0 is, so unless its model was trained with signs too",
            "standardised": "standardised: its 0 is the mean of its reference set, so",
        }
        for name in getattr(self.algorithm, "constraints", {}):
            if caveat := caveats.get(getattr(self.rewards[name], "units", "")):
                run.warn(
                    0, f"the cost {name!r} is {caveat} a limit has no meaning; use stage.calibration=labels or gold"
                )

    def _prompts(
        self, run: Run, template: Template, demonstrations: Sequence[Demonstration]
    ) -> tuple[Sequence[Prompt], Mapping[str, Sequence[Prompt]]]:
        """Training prompts, and those of each held-out split.

        Raises:
            ValueError: a held-out prompt is also trained on, by itself or in a demonstration, or the tokenizer cannot
                read a condition.
        """
        split = self.dataset.train_split
        prompts = self.dataset.prompts(split, template)
        held_out = {name: self.dataset.prompts(name, template) for name in self.dataset.splits}
        learnt = {split: prompts, "stage.demonstrations": [record.prompt for record in demonstrations]}
        for name, others in held_out.items():
            for place, known in learnt.items():
                seen = {prompt.id for prompt in known}
                if shared := sum(prompt.id in seen for prompt in others):
                    raise ValueError(f"{shared} prompts of {name} are also in {place}; hold them out")
        for note in self.dataset.notes:
            run.warn(0, note)
        self.conditions.check(template)
        return prompts, under_conditions(held_out, self.conditions)

    def _state(self, parts: Parts, episode: int) -> dict[str, Any]:
        """Everything that changes during a run; random numbers are derived from the step and need no saving."""
        return {
            "modules": {name: parts.distribution.parameters(module) for name, module in parts.modules.items()},
            "learner": parts.learner.state_dict(),
            "algorithm": {name: part.state_dict() for name, part in self.algorithm.stateful.items()},
            "episode": episode,
        }

    def _resume(self, run: Run, parts: Parts) -> tuple[int, int]:
        """(iterations done, episodes so far), with every part as it was after the last checkpoint."""
        resumed = run.resume()
        if resumed is None:
            return 0, 0
        step, state = resumed
        for name, module in parts.modules.items():
            parts.distribution.restore(module, state["modules"][name])
        parts.learner.load_state_dict(state["learner"])
        for name, part in self.algorithm.stateful.items():
            part.load_state_dict(state["algorithm"][name])
        return step, state["episode"]


def _named(means: Metrics) -> Metrics:
    """The learner's means under their contract names."""
    contract = {
        "policy": "loss/policy_avg",
        "kl": "loss/kl_avg",
        "nll": "loss/ptx_avg",
        "ratio": "val/ratio",
        "approxkl": "policy/approxkl_avg",
        "clipfrac": "policy/clipfrac_avg",
        "entropy": "policy/entropy_avg",
    }
    values = {name: value for name, value in means.items() if name.startswith("value/")}
    named = {contract.get(name, name): value for name, value in means.items() if name not in values}
    named |= {f"loss/{name}": value for name, value in values.items()}
    return named | ({"loss/value_avg": sum(values.values())} if values else {})
