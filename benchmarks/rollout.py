"""How fast responses are sampled: the built-in engine, transformers' generate, its continuous batching, and vLLM.

python benchmarks/rollout.py
python benchmarks/rollout.py --vllm-python ~/vllm/bin/python

A Llama of 4.5M parameters with random weights (hidden 256, 4 layers, a vocabulary of 1,024) answers 32 prompts of 32
tokens, 4 times each, with at most 64 tokens. Equal lengths: nothing ends a response before. Spread lengths: a few
tokens end one. The engines take turns in one process, and the median of the rounds counts, in seconds of the processor,
so that other work on the machine weighs less. Continuous batching takes part in the first round alone: on a CPU it is
the slowest by far. vLLM's seconds are those of its process and of this one; its first call, which takes longer, is not
counted. Nothing is asserted.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rlhf_lab.data.templates import Template
from rlhf_lab.engine.generate import Sampling, stop_tokens
from rlhf_lab.engine.rollouts import VLLM, BuiltIn, ContinuousBatching
from rlhf_lab.engine.vllm import VLLMEngine
from rlhf_lab.records import Prompt
from rlhf_lab.types import PromptBatch

PROMPTS, SAMPLES, READ, SAID = 32, 4, 32, 64
VOCABULARY = 1024
PAGED = "continuous batching"
ENDS = 16  # tokens that end a response where lengths are spread


@contextmanager
def made() -> Iterator[tuple[transformers.PreTrainedModel, Template]]:
    """The model and a tokenizer of as many words."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w2")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=READ + SAID, tie_word_embeddings=True, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.float32).eval()
        yield model, Template(transformers.AutoTokenizer.from_pretrained(folder), "auto")


def until_ended(tokens: torch.Tensor, stops: list[int]) -> int:
    """How many tokens were said, the stops included; what pads a row behind its end is not counted."""
    is_stop = torch.isin(tokens, torch.tensor(stops))
    return int((is_stop.cumsum(1) - is_stop.long() == 0).sum())


def with_child(process: int) -> float:
    """Seconds of the processor that this process and another one have used."""
    after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


def engines(
    model: Any, template: Template, prompts: PromptBatch, least: int, vllm_python: str | None
) -> tuple[dict[str, Callable[[int], int]], Callable[[], float]]:
    """name -> what samples with a seed, and returns how many tokens were said; and the clock for it.

    Args:
        least: tokens before a response may end, which vLLM has to be told: the others read altered logits.
    """
    sampling = Sampling(
        max_new_tokens=SAID, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=PROMPTS * SAMPLES
    )
    paged = ContinuousBatching(importance_cap=None, page_size=32, max_batch_tokens=4096, memory=16384)
    ours = {
        "built-in": BuiltIn().engine(model, template, sampling),
        PAGED: paged.engine(model, template, sampling),
    }
    clock: Callable[[], float] = time.process_time
    if vllm_python is not None:
        settings = VLLM(
            importance_cap=None, python=vllm_python, dtype="float32", gpu_memory_utilization=0.3, kv_cache_gib=1.0,
            max_model_len=None, enforce_eager=True, start_timeout=900.0,
        )  # fmt: skip
        theirs = settings.engine(model, template, replace(sampling, min_new_tokens=least))
        begin = time.monotonic()
        theirs.sync()
        started = time.monotonic()
        theirs.generate(prompts, SAMPLES, 0)
        print(f"vLLM: start {started - begin:.1f} s, first call {time.monotonic() - started:.1f} s")
        ours["vLLM"] = theirs
        assert isinstance(theirs, VLLMEngine)
        assert theirs.worker.process is not None
        clock = partial(with_child, theirs.worker.process.pid)

    def generate(seed: int) -> int:
        torch.manual_seed(seed)
        stops = stop_tokens(model, template)
        tokens = model.generate(
            prompts.tokens, attention_mask=prompts.attention_mask.long(), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, max_new_tokens=SAID, num_return_sequences=SAMPLES, eos_token_id=stops, pad_token_id=template.pad,
        )[:, READ:]  # fmt: skip
        return until_ended(tokens, stops)

    def by(engine: Any) -> Callable[[int], int]:
        return lambda seed: int(engine.generate(prompts, SAMPLES, seed).sequences.response_mask.sum())

    return {"transformers' generate": generate, **{name: by(engine) for name, engine in ours.items()}}, clock


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--vllm-python", help="the Python of an environment that has vLLM, which then takes part")
    typed = asked.parse_args()
    rounds = typed.rounds
    torch.set_num_threads(1)
    with made() as (model, template):
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {PROMPTS} prompts x {SAMPLES}")
        tokens = torch.randint(3 + ENDS, VOCABULARY, (PROMPTS, READ), generator=torch.Generator().manual_seed(0))
        prompts = PromptBatch(
            prompts=[Prompt.from_text("")] * PROMPTS, tokens=tokens, attention_mask=torch.ones_like(tokens).bool()
        )
        for lengths in ("equal", "spread"):
            bias = torch.zeros(VOCABULARY)
            if lengths == "equal":
                bias[1] = -torch.inf  # the end, which would be drawn now and then
            model.generation_config.eos_token_id = [1] if lengths == "equal" else list(range(1, 1 + ENDS))
            head: Any = model.get_output_embeddings()
            hook = head.register_forward_hook(lambda _module, _inputs, logits, bias=bias: logits + bias)
            least = SAID if lengths == "equal" else 0
            callers, clock = engines(model, template, prompts, least, typed.vllm_python)
            seconds: dict[str, list[float]] = {name: [] for name in callers}
            said: dict[str, list[int]] = {name: [] for name in callers}
            for turn in range(rounds):
                for name, call in callers.items():
                    if turn and name == PAGED:
                        continue
                    begin = clock()
                    said[name].append(call(turn))
                    seconds[name].append(clock() - begin)
            hook.remove()
            for name in callers:
                rates = [n / s for n, s in zip(said[name], seconds[name], strict=True)]
                print(
                    f"{lengths:>6} lengths, {name:<24} {statistics.median(seconds[name]):6.2f} s "
                    f"({min(seconds[name]):.2f} to {max(seconds[name]):.2f}), "
                    f"{statistics.median(said[name]):6.0f} tokens, {statistics.median(rates):6.0f} tokens/s"
                )


if __name__ == "__main__":
    main()
