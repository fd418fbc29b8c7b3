"""How fast responses are sampled: the built-in engine, transformers' generate and its continuous batching.

python benchmarks/rollout.py

A Llama of 4.5M parameters with random weights (hidden 256, 4 layers, a vocabulary of 1,024) answers 32 prompts of 32
tokens, 4 times each, with at most 64 tokens. Equal lengths: nothing ends a response before. Spread lengths: a few
tokens end one. The engines take turns in one process, and the median of the rounds counts, in seconds of the processor,
so that other work on the machine weighs less. Continuous batching takes part in the first round alone: on a CPU it is
the slowest by far. Nothing is asserted.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rlhf_lab.data.templates import Template
from rlhf_lab.engine.generate import Sampling, stop_tokens
from rlhf_lab.engine.rollouts import BuiltIn, ContinuousBatching
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


def engines(model: Any, template: Template, prompts: PromptBatch) -> dict[str, Callable[[int], int]]:
    """name -> what samples with a seed, and returns how many tokens were said."""
    sampling = Sampling(
        max_new_tokens=SAID, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=PROMPTS * SAMPLES
    )
    paged = ContinuousBatching(importance_cap=None, page_size=32, max_batch_tokens=4096, memory=16384)
    ours = {
        "built-in": BuiltIn().engine(model, template, sampling),
        PAGED: paged.engine(model, template, sampling),
    }

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

    return {"transformers' generate": generate, **{name: by(engine) for name, engine in ours.items()}}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=3)
    rounds = asked.parse_args().rounds
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
            callers = engines(model, template, prompts)
            seconds: dict[str, list[float]] = {name: [] for name in callers}
            said: dict[str, list[int]] = {name: [] for name in callers}
            for turn in range(rounds):
                for name, call in callers.items():
                    if turn and name == PAGED:
                        continue
                    begin = time.process_time()
                    said[name].append(call(turn))
                    seconds[name].append(time.process_time() - begin)
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
