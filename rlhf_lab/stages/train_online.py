"""Learning from own samples: generate, score, prepare, update. Every on-policy method runs here."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from rlhf_lab.algorithms.sft import SFT
from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch, text_batch
from rlhf_lab.engine.forward import policy_forward
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.learner import Learner, Part, minibatch_count
from rlhf_lab.engine.models import (
    Hardware,
    ModelPaths,
    check_path,
    load_critics,
    load_frozen,
    load_policy,
    load_tokenizer,
    parameters_of,
    restore_parameters,
    save_model,
)
from rlhf_lab.engine.score import Scorer
from rlhf_lab.evaluation.evaluator import Evaluator
from rlhf_lab.evaluation.metrics import completion_metrics, group_metrics, kl_metrics, score_metrics, warnings
from rlhf_lab.interfaces import OnlineAlgorithm, RewardSource
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive, generator
from rlhf_lab.types import Count, Experience, Metrics, NonNegative, NonNegativeCount, PolicyForward, Term

SHOWN_SAMPLES = 4


class TrainOnline:
    """One policy, its reference, its critics and the reward sources, wired together for one run.

    Args:
        rewards: name -> source; null leaves one out.
        costs: names of those for which higher is worse.
        steps: iterations of the loop.
        prompts_per_step, samples_per_prompt: their product is the batch.
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
        learner: partial[Learner],
        hardware: Hardware,
        steps: Count,
        prompts_per_step: Count,
        samples_per_prompt: Count,
        demonstrations: Dataset | None,
        ptx_coef: NonNegative,
        evaluate_every: NonNegativeCount,
        checkpoint_every: Count,
    ) -> None:
        self.algorithm, self.model, self.dataset = algorithm, model, dataset
        self.rewards = {name: source for name, source in rewards.items() if source is not None}
        self.costs = [name for name in costs if name in self.rewards]
        self.sampling, self.evaluation_sampling = sampling, evaluation_sampling
        self.learner, self.hardware, self.steps = learner, hardware, steps
        self.prompts_per_step, self.samples_per_prompt = prompts_per_step, samples_per_prompt
        self.demonstrations, self.ptx_coef = demonstrations, ptx_coef
        self.evaluate_every, self.checkpoint_every = evaluate_every, checkpoint_every

    @property
    def limits(self) -> dict[str, float]:
        """cost -> above which value it counts as a violation: its constraint's limit, 0 without one."""
        constraints = getattr(self.algorithm, "constraints", {})
        return {name: constraints[name].limit if name in constraints else 0.0 for name in self.costs}

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        for role in ("policy", "reference", "critic"):
            check_path(getattr(self.model, role), f"model.{role}", promised)
        self.dataset.check(promised)
        for source in self.rewards.values():
            source.check(promised)
        if missing := [name for name in self.algorithm.streams if name not in self.rewards]:
            raise ValueError(
                f"the objective and constraints read {list(self.algorithm.streams)}, but the reward sources are "
                f"{sorted(self.rewards)}; add reward.sources.{missing[0]} or change objective.weights"
            )
        self.sampling.check_trainable()
        if self.ptx_coef and self.demonstrations is None:
            raise ValueError(f"stage.ptx_coef={self.ptx_coef} needs stage.demonstrations; name a data set")
        size = self.prompts_per_step * self.samples_per_prompt
        minibatch_count(size, self.learner.keywords["minibatch_size"])

    def run(self, run: Run) -> Metrics:
        device, dtype = self.hardware.start(), self.hardware.dtype
        options = {"device": device, "dtype": dtype, "seed": derive(run.seed, "initial weights")}
        template = Template(load_tokenizer(self.model.policy), self.dataset.template_style)
        policy = load_policy(self.model.policy, **options)
        reference = load_frozen(self.model.reference, **options)
        names = tuple(self.algorithm.critics)
        critics = load_critics(self.model.critic, names, **options) if names else None
        rewards: dict[str, RewardSource] = {
            name: source.load(self.hardware, template) for name, source in self.rewards.items()
        }
        gold: dict[str, RewardSource] = {name: Gold(measure) for name, measure in self.dataset.gold.items()}

        prompts = self.dataset.prompts(self.dataset.train_split, template)
        held_out = {split: self.dataset.prompts(split, template) for split in self.dataset.splits}
        seen = {prompt.id for prompt in prompts}
        for split, others in held_out.items():
            if shared := sum(prompt.id in seen for prompt in others):
                raise ValueError(f"{shared} prompts of {split} are also in {self.dataset.train_split}; hold them out")
        for note in self.dataset.notes:
            run.warn(0, note)
        modules = {"policy": policy} if critics is None else {"policy": policy, "critic": critics}
        batch_size = self.prompts_per_step * self.samples_per_prompt
        settings = self.learner.keywords
        updates = self.steps * settings["epochs"] * minibatch_count(batch_size, settings["minibatch_size"])
        learner = self.learner(modules=modules, total_updates=updates)
        scorer = Scorer(
            rewards=rewards,
            reference=reference,
            critics=critics,
            temperature=self.sampling.temperature,
            tokens_at_once=learner.tokens_at_once,
        )
        engine = Generator(policy, template, self.sampling)
        judge = Scorer(
            rewards=rewards,
            reference=reference,
            critics=None,
            temperature=self.evaluation_sampling.temperature or 1.0,
            tokens_at_once=learner.tokens_at_once,
        )
        evaluator = Evaluator(held_out, gold, template, run.seed)
        demonstrations = self._demonstrations(template)

        def evaluate(step: int) -> Metrics:
            metrics, rows = evaluator.evaluate(Generator(policy, template, self.evaluation_sampling), judge)
            run.write_rows(f"samples/step_{step:06d}.jsonl", rows)
            shown = [{"prompt": r["prompt"], "response": r["response"], **r["scores"], **{f"gold {k}": v for k, v in r["gold"].items()}} for r in rows[:SHOWN_SAMPLES]]
            run.console.samples(f"held-out samples at step {step}", shown)
            return metrics

        first, episode = 0, 0
        if resumed := run.resume():
            step, state = resumed
            for name, module in modules.items():
                restore_parameters(module, state["modules"][name])
            learner.load_state_dict(state["learner"])
            for name, part in self.algorithm.stateful.items():
                part.load_state_dict(state["algorithm"][name])
            first, episode = step + 1, state["episode"]
        run.console.say(
            f"{len(prompts)} prompts, {self.steps} steps of {self.prompts_per_step} x {self.samples_per_prompt}; "
            f"template {template.style}; rewards {', '.join(rewards)}"
        )
        latest: Metrics = {}
        for step in run.console.steps("step", first, self.steps, latest):
            metrics = evaluate(0) if step == 0 else {}
            clock = time.perf_counter()
            chosen = self._prompts_of_step(prompts, step, run.seed)
            rollout = engine.generate(
                prompt_batch(template, chosen), self.samples_per_prompt, derive(run.seed, "sampling", step)
            )
            sampled = time.perf_counter()
            scored = scorer.score(rollout)
            experience, prepared = self.algorithm.prepare(scored)
            measured = time.perf_counter()
            parts = [Part(experience, self._forward(policy, critics), self._loss)]
            if demonstrations:
                picked = torch.randperm(len(demonstrations), generator=generator(run.seed, "ptx", step))[:batch_size]
                rows = text_batch(template, [demonstrations[i] for i in picked.tolist()])
                ptx = Part(rows, lambda b: policy_forward(policy, b.sequences), SFT().loss, self.ptx_coef)
                parts.append(ptx)
            learnt = _named(learner.update(parts, derive(run.seed, "learner", step)))
            episode += len(rollout)
            metrics |= prepared | learnt | score_metrics(scored.scores, self.limits) | kl_metrics(scored)
            metrics |= completion_metrics(scored)
            metrics |= group_metrics(scored.scores[self.algorithm.streams[0]].value, rollout.group)
            for name, source in gold.items():
                metrics[f"gold/{name}/mean"] = source.score(rollout).value.mean().item()
            mask = scored.response_mask
            metrics["objective/entropy"] = -(scored.logprobs.sum() / mask.sum()).item()
            metrics["episode"] = float(episode)
            done = time.perf_counter()
            metrics |= {
                "time/rollout": sampled - clock,
                "time/scoring": measured - sampled,
                "time/update": done - measured,
                "time/tokens_per_second": mask.sum().item() / (done - clock),
            }
            for message in warnings(metrics):
                run.warn(step, message)
            last = step + 1 == self.steps
            if last or (self.evaluate_every and (step + 1) % self.evaluate_every == 0):
                metrics |= evaluate(step + 1)
            latest.update(metrics)
            run.log(step, metrics)
            if last or (step + 1) % self.checkpoint_every == 0:
                state = {
                    "modules": {name: parameters_of(module) for name, module in modules.items()},
                    "learner": learner.state_dict(),
                    "algorithm": {name: part.state_dict() for name, part in self.algorithm.stateful.items()},
                    "episode": episode,
                }
                run.save(step, state)

        with run.folder("policy") as folder:
            save_model(folder, policy, template.tokenizer)
        return run.last
    
    def _prompts_of_step(self, prompts: Sequence[Prompt], step: int, seed: int) -> list[Prompt]:
        """The next prompts of an endless sequence of epochs, each epoch in an order of its own."""
        first = step * self.prompts_per_step
        places = range(first, first + self.prompts_per_step)
        orders = {
            epoch: torch.randperm(len(prompts), generator=generator(seed, "order", epoch)).tolist()
            for epoch in {place // len(prompts) for place in places}
        }
        return [prompts[orders[place // len(prompts)][place % len(prompts)]] for place in places]

    def _demonstrations(self, template: Template) -> Sequence[Any]:
        if not self.ptx_coef or self.demonstrations is None:
            return []
        return self.demonstrations.demonstrations(self.demonstrations.train_split, template)

    def _forward(self, policy: Any, critics: Any) -> Callable[[Experience], PolicyForward]:
        def forward(batch: Experience) -> PolicyForward:
            sequences = batch.scored.rollout.sequences
            return policy_forward(policy, sequences, temperature=self.sampling.temperature, critics=critics)

        return forward

    def _loss(self, new: PolicyForward, batch: Experience) -> list[Term]:
        """The method's terms, and what is reported of every policy update."""
        log_ratio = (new.logprobs - batch.scored.logprobs).detach()
        return [
            *self.algorithm.loss(new, batch),
            Term("ratio", log_ratio.exp(), "token", 0.0),
            Term("approxkl", log_ratio.square() / 2, "token", 0.0),
            Term("entropy", new.entropy, "token", 0.0),
        ]


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
    named = {contract.get(name, f"loss/{name}" if name.startswith("value/") else name): v for name, v in means.items()}
    values = [value for name, value in means.items() if name.startswith("value/")]
    return named | ({"loss/value_avg": sum(values)} if values else {})
