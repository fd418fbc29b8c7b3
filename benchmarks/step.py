"""Whole RLHF steps beside TRL's, in one run: generate, score, update.

    python benchmarks/step.py --trl-rloo-python PEER/bin/python --trl-ppo-python PEER/bin/python [CASE …]
    python benchmarks/step.py --scaling --picture scaling.png

Peers are Python environments with trl 1.16.0 (RLOO) and trl 1.12.0 (PPO, its last). Each trainer is a process of its
own with one thread, and they take steps in turns. Each reads the same weights and prompts and calls the same reward
function; see benchmarks/README.md for what each computes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import correlation, linear_regression, median
from typing import Any

HERE = Path(__file__).resolve()
LEARNING_RATE, KL_COEF = 1e-6, 0.05  # so small that lengths stay as they are
SPECIAL = ("<pad>", "<eos>")


@dataclass(frozen=True)
class Case:
    """One kind of work; `responses` are `samples` to each of `prompts`."""

    method: str = "rloo"
    prompts: int = 32
    samples: int = 4
    prompt_tokens: int = 32
    response_tokens: int = 64
    hazard: float = 0.0  # probability of an EOS at each token
    hidden: int = 256
    intermediate: int = 1024
    layers: int = 4
    vocabulary: int = 1024
    rewards: int = 0  # models that score, beside the reward function
    shared_critic: bool = False

    @property
    def folder(self) -> str:
        return f"{self.hidden}-{self.layers}-{self.vocabulary}-{self.hazard}"


CASES = {
    "equal": Case(),
    "spread": Case(hazard=0.031),  # 44 % of the tokens
    "long_prompt": Case(prompts=16, samples=8, prompt_tokens=256),
    "small": Case(prompts=16, prompt_tokens=16, response_tokens=48, hazard=0.031, hidden=64, intermediate=128,
                  layers=2, vocabulary=256),
    "ppo": Case(method="ppo", prompts=128, samples=1, rewards=1),
    "ppo_shared": Case(method="ppo", prompts=128, samples=1, rewards=1, shared_critic=True),
}  # fmt: skip


def reward(prompt: str, response: str) -> float:
    """The share of words with an even number: cheap, and different for every response."""
    words = response.split()
    return sum(int(word[1:]) % 2 == 0 for word in words if word.startswith("w")) / max(1, len(words))


def prompts_of(case: Case, steps: int) -> list[str]:
    """Different prompts for each step, all of one length."""
    source = random.Random(0)
    words = case.vocabulary - len(SPECIAL)
    return [
        " ".join(f"w{source.randrange(words)}" for _ in range(case.prompt_tokens)) for _ in range(case.prompts * steps)
    ]


def write_models(case: Case, folder: Path) -> None:
    """A Llama with random weights that draws EOS with the hazard of the case, a value model, and their tokenizer.

    Every embedding has one large coordinate, which survives to the head and gives EOS its constant logit there.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *(f"w{i}" for i in range(case.vocabulary - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        num_labels=1,
    )
    torch.manual_seed(0)
    policy = transformers.LlamaForCausalLM(config)
    wanted = case.hazard or 1e-12
    with torch.no_grad():
        embeddings, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
        embeddings[:, 0] = 10.0
        head[:, 0] = 0.0
        head[1] = 0.0
        odds = torch.tensor(wanted / (1 - wanted) * (case.vocabulary - 1))
        head[1, 0] = odds.log() / case.hidden**0.5  # the normalised coordinate is the root of the width
    policy.save_pretrained(folder / "policy")
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "scorer")
    for part in ("policy", "scorer"):
        tokenizer.save_pretrained(folder / part)


# what a worker says after each step: seconds by the clock, seconds of the processor, tokens of the responses
Told = dict[str, float]


class Clock:
    """Says how long a step took, and waits until it is told to take the next."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._start = (time.perf_counter(), time.process_time())

    def lap(self) -> None:
        seconds, processor = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        mean = sum(self.tokens) / max(1, len(self.tokens))
        print("STEP " + json.dumps({"seconds": seconds, "processor": processor, "length": mean}), flush=True)
        self.tokens.clear()
        if not sys.stdin.readline():
            os._exit(0)  # the one who asked is gone
        self._start = (time.perf_counter(), time.process_time())


def work_here(case: Case, folder: Path, steps: int) -> None:
    """Steps of this project: an iteration of its stage, metrics included."""
    from functools import partial

    import torch

    from rlhf_lab.algorithms.ppo import PPO
    from rlhf_lab.algorithms.rloo import RLOO
    from rlhf_lab.data.templates import Template
    from rlhf_lab.engine.accounting import Account
    from rlhf_lab.engine.critics import load_critics, shared_critics
    from rlhf_lab.engine.distribution import Distribution
    from rlhf_lab.engine.generate import Sampling
    from rlhf_lab.engine.hardware import Hardware
    from rlhf_lab.engine.learner import Learner
    from rlhf_lab.engine.model_paths import ModelPaths
    from rlhf_lab.engine.models import load_frozen, load_policy
    from rlhf_lab.engine.prefixes import share_prefixes
    from rlhf_lab.engine.rollouts import BuiltIn
    from rlhf_lab.engine.score import Scorer
    from rlhf_lab.engine.tokenizer import load_tokenizer
    from rlhf_lab.objectives import FixedKL, KLPenalty, WeightedSum
    from rlhf_lab.records import Prompt
    from rlhf_lab.rewards.gold import Gold
    from rlhf_lab.rewards.scalar_model import ScalarModel
    from rlhf_lab.stages.train_online import Parts, TrainOnline

    hardware, path = Hardware(device="cpu", dtype="float32", threads=1), str(folder / "policy")
    options: Any = {"device": hardware.start(), "dtype": "float32", "seed": 0}
    template = Template(load_tokenizer(path), "tldr")
    sampling = Sampling(
        max_new_tokens=case.response_tokens, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=1024
    )
    models = {f"model_{i}": ScalarModel(str(folder / "scorer"), "tldr", 8192) for i in range(case.rewards)}
    sources: dict[str, Any] = {"helpful": Gold(reward), **models}
    penalty = KLPenalty(estimator="k1", placement="reward", controller=FixedKL())
    shared: Any = {"objective": WeightedSum(dict.fromkeys(sources, 1.0)), "kl": penalty, "kl_coef": KL_COEF}
    algorithm: Any = (
        RLOO(**shared, constraints={}, clip=0.2, reward_clip=50.0, divide_by_prices=True)
        if case.method == "rloo"
        else PPO(**shared, gamma=1.0, lam=0.95, clip=0.2, value_clip=5.0, value_coef=1.0, reward_clip=50.0,
                 whiten_advantages=True)
    )  # fmt: skip
    learner = partial(
        Learner, lr={"policy": LEARNING_RATE, "critic": LEARNING_RATE}, epochs=1, minibatch_size=0, tokens_at_once=8192,
        schedule="constant", warmup=0, weight_decay=0.0, betas=(0.9, 0.95), max_grad_norm=1.0,
    )  # fmt: skip
    unread: Any = None
    stage = TrainOnline(
        algorithm=algorithm,
        model=ModelPaths(base=path, policy=path, reference=path, critic=path, learning_rates={}),
        dataset=unread, rewards=sources, costs=[], sampling=sampling, evaluation_sampling=sampling,
        rollout=BuiltIn(), learner=learner,
        hardware=hardware, steps=steps, prompts_per_step=case.prompts, samples_per_prompt=case.samples,
        shared_prefixes="auto", conditions=Unconditioned(), demonstrations=None, ptx_coef=0.0, evaluate_every=0,
        checkpoint_every=1,
    )  # fmt: skip
    policy, reference = load_policy(path, **options), load_frozen(path, **options)
    critics = None
    if case.method == "ppo":
        critics = (
            shared_critics(policy, ("reward",)) if case.shared_critic else load_critics(path, ("reward",), **options)
        )
    modules: dict[str, torch.nn.Module] = {"policy": policy} | ({"critic": critics} if critics is not None else {})
    for source in sources.values():
        source.load(hardware, template)
    if case.samples > 1:
        trunks = [model for source in models.values() for model in source.models]
        for model in (policy, reference, *trunks):
            share_prefixes(model)
    distribution = Distribution.of(hardware)
    parts = Parts(
        template=template, policy=policy, critics=critics,
        prompts=[Prompt.from_text(text) for text in prompts_of(case, steps)], demonstrations=[],
        distribution=distribution,
        engine=BuiltIn().engine(policy, template, sampling, critics if case.shared_critic else None),
        scorer=Scorer(rewards=sources, reference=reference, critics=critics, tokens_at_once=8192),
        learner=learner(modules=modules, total_updates=steps, distribution=distribution), gold={}, evaluator=unread,
    )  # fmt: skip
    clock = Clock()
    for iteration in range(steps):
        account = Account()
        metrics, tokens = stage._iterate(parts, iteration, 0, account)
        clock.tokens.append(tokens["rollout"] // (case.prompts * case.samples))
        for name, seconds in account.metrics(tokens).items() if "PHASES" in os.environ else ():
            print(name, seconds, file=sys.stderr)
        assert metrics
        clock.lap()


class Unconditioned:
    """Prompts as they are."""

    streams = ()
    new_tokens = ()

    def drawn(self, prompts: list[Any], seed: int) -> list[Any]:
        return prompts


def work_trl(case: Case, folder: Path, steps: int) -> None:
    """Steps of TRL's trainer, from the end of one to the end of the next."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    clock = Clock()

    class Turns(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.lap()

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    texts, rows = prompts_of(case, steps), case.prompts * case.samples
    common: dict[str, Any] = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "seed": 0,
        "lr_scheduler_type": "constant", "temperature": 1.0,
    }  # fmt: skip
    trainer: Any
    if case.method == "rloo":
        import trl

        def score(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            clock.tokens.extend(map(len, completion_ids))
            return [reward(prompt, response) for prompt, response in zip(prompts, completions, strict=True)]

        settings = trl.RLOOConfig(
            **common, num_generations=case.samples, max_completion_length=case.response_tokens, beta=KL_COEF,
            max_steps=steps,
        )  # fmt: skip
        trainer = trl.RLOOTrainer(
            model=policy, reward_funcs=score, args=settings, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}), callbacks=[Turns()],
        )  # fmt: skip
    else:
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        def classifier() -> Any:
            return transformers.AutoModelForSequenceClassification.from_pretrained(
                folder / "scorer", dtype=torch.float32
            )

        settings = PPOConfig(
            **common, num_ppo_epochs=1, num_mini_batches=1, total_episodes=rows * steps, num_sample_generations=0,
            local_rollout_forward_batch_size=64, response_length=case.response_tokens, stop_token="eos",
            kl_coef=KL_COEF,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=settings, processing_class=tokenizer, model=policy,
            ref_model=transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
            reward_model=classifier(), value_model=classifier(), callbacks=[Turns()],
            train_dataset=datasets.Dataset.from_dict({"input_ids": tokenizer(texts).input_ids}),
        )  # fmt: skip
    trainer.train()


class Worker:
    """A process that takes steps when it is told to."""

    def __init__(self, python: str, kind: str, case: Case, folder: Path, steps: int) -> None:
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = str(HERE.parents[1]) if kind == "here" else ""
        work = json.dumps([kind, asdict(case), str(folder), steps])
        self.log = (folder / f"{kind}.log").open("w+")
        self.process = subprocess.Popen(
            [python, str(HERE), "--work", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, env=environment,
        )  # fmt: skip

    def step(self) -> Told:
        """Wait for the step that is under way; none begins before `go`."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("STEP "):
                return json.loads(line[5:])
        self.log.seek(0)
        raise RuntimeError(f"a worker ended:\n{self.log.read()[-3000:]}")

    def go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def in_turns(pythons: dict[str, str], cases: dict[str, Case], folder: Path, steps: int) -> dict[str, list[Told]]:
    """Steps of each worker, one worker at a time; the first two steps of each warm up and are dropped."""
    workers: dict[str, Worker] = {}
    told: dict[str, list[Told]] = {name: [] for name in cases}
    try:
        for name, case in cases.items():  # started one after another, each up to the end of its first step
            kind = "trl" if name == "trl" else "here"
            place = folder / case.folder
            if not place.exists():
                write_models(case, place)
            workers[name] = Worker(pythons[kind], kind, case, place, steps + 3)
            workers[name].step()
        for turn in range(steps + 1):
            for name, worker in workers.items():
                worker.go()
                said = worker.step()
                if turn:
                    told[name].append(said)
    finally:
        for worker in workers.values():
            worker.end()
    return told


def middle(told: list[Told], what: str) -> float:
    return median(each[what] for each in told)


def compare(name: str, python: str, folder: Path, steps: int) -> None:
    """Print how many times longer TRL's step takes."""
    case = CASES[name]
    told = in_turns({"here": sys.executable, "trl": python}, {"here": case, "trl": case}, folder, steps)
    ours, theirs = told["here"], told["trl"]
    print(
        f"{name:12} here {middle(ours, 'seconds'):6.2f} s  TRL {middle(theirs, 'seconds'):6.2f} s  "
        f"ratio {middle(theirs, 'seconds') / middle(ours, 'seconds'):5.2f}; of the processor "
        f"{middle(ours, 'processor'):6.2f} and {middle(theirs, 'processor'):6.2f}, "
        f"ratio {middle(theirs, 'processor') / middle(ours, 'processor'):5.2f}; "
        f"mean length {middle(ours, 'length'):.1f} and {middle(theirs, 'length'):.1f}",
        flush=True,
    )


def scale(folder: Path, steps: int, picture: Path | None) -> None:
    """Print the processor's time of a step against what there is of each thing, as ratios to the first, and draw it."""
    measured: dict[str, tuple[Sequence[int], Sequence[float]]] = {}
    base = CASES["equal"]
    base = replace(base, prompts=16)
    for what, values in {
        "prompts": (4, 8, 16, 32),
        "response_tokens": (16, 32, 64, 128),
        "samples": (2, 4, 8, 16),
        "prompt_tokens": (16, 64, 128, 256),
        "rewards": (0, 1, 2, 5),
    }.items():
        cases = {str(value): replace(base, **{what: value}) for value in values}
        told = in_turns({"here": sys.executable}, cases, folder, steps)
        times = [middle(told[name], "processor") for name in cases]
        measured[what] = values, times
        straight = correlation(values, times) ** 2
        slope, constant = linear_regression(values, times)
        print(
            f"{what:16} {'  '.join(f'{value}: {t / times[0]:.2f}' for value, t in zip(values, times, strict=True))}   "
            f"R^2 {straight:.4f}; {slope / times[0]:.4f} each and {constant / times[0]:.2f}, of {times[0]:.2f} s",
            flush=True,
        )
    if picture is not None:
        draw(measured, picture)


def draw(measured: Mapping[str, tuple[Sequence[int], Sequence[float]]], picture: Path) -> None:
    """What was measured and the straight line through it, a panel for each thing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * len(measured), 2.7), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(measured), squeeze=False)[0]
    for axes, (what, (values, times)) in zip(panels, measured.items(), strict=True):
        slope, constant = linear_regression(values, times)
        ends = (0, max(values))
        axes.plot(ends, [constant + slope * x for x in ends], color="0.6", label="straight line")
        axes.plot(values, times, "o", color="#2563ab", label="measured", clip_on=False)
        axes.set(xlabel=what.replace("_", " "), ylim=(0, None), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds of the processor a step")
    panels[0].legend(frameon=False)
    figure.savefig(picture)


WORK: dict[str, Callable[[Case, Path, int], None]] = {"here": work_here, "trl": work_trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all unless some are named")
    parser.add_argument("--trl-rloo-python", help="a Python that has trl 1.16.0")
    parser.add_argument("--trl-ppo-python", help="a Python that has trl 1.12.0")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--scaling", action="store_true", help="this project alone, against the size of the work")
    parser.add_argument("--picture", type=Path, help="where --scaling draws what it measured")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        kind, case, folder, steps = json.loads(asked.work)
        WORK[kind](Case(**case), Path(folder), steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        if asked.scaling:
            scale(Path(folder), asked.steps, asked.picture)
            return
        for name in asked.cases or CASES:
            python = asked.trl_rloo_python if CASES[name].method == "rloo" else asked.trl_ppo_python
            if python is None:
                parser.error(f"{name} needs --trl-{CASES[name].method}-python")
            compare(name, python, Path(folder), asked.steps)


if __name__ == "__main__":
    main()
