"""Running out of memory: known by every way in which it shows, named with what would fit, and really met."""

import errno
import os
import re
import subprocess
import sys

import pytest
import torch

from rlhf_lab.engine import out_of_memory
from rlhf_lab.engine.out_of_memory import OutOfMemory, asked, is_out_of_memory
from rlhf_lab.launch.compose import ROOT

CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free."
)


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (RuntimeError(CPU), 8 * 2**30),
        (torch.OutOfMemoryError(CUDA), round(2.5 * 2**30)),
        (MemoryError("Unable to allocate 512. MiB for an array with shape (16,) and data type float32"), 2**29),
        (MemoryError("std::bad_alloc"), 0),
        (SystemError("error return without exception set"), 0),
        (RuntimeError("CUDA error: out of memory"), 0),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 0),
        (RuntimeError("cudaErrorMemoryAllocation: out of memory at line 90 in file /src/csrc/ops.cu"), 0),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 0),
    ],
)
def test_every_way_in_which_it_shows_is_known_with_what_was_asked_for(error, amount):
    assert is_out_of_memory(error)
    assert asked(error) == amount


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(errno.ENOSPC, "No space left")]
)
def test_nothing_else_is_taken_for_it(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised, out_of_memory.phase("update"):
        raise error
    assert raised.value is error


def test_a_microbatch_names_the_budget_that_halves_it_and_the_phase_around_names_the_place():
    lengths = torch.tensor([30, 41, 40])
    with (
        pytest.raises(
            OutOfMemory, match=r"^out of memory in the update: 8\.0 GiB more were asked for, .* in use; "
        ) as e,
        out_of_memory.phase("run"),
        out_of_memory.phase("update"),
        out_of_memory.reading(lengths, 5000),
    ):
        raise RuntimeError(CPU)
    assert "3 sequences of up to 41 tokens at once (learner.tokens_at_once=5000)" in str(e.value)
    assert "the same command with learner.tokens_at_once=61 continues" in str(e.value)
    assert len(str(e.value)) < 400  # what a status keeps of it
    assert str(e.value.__cause__) == CPU


def test_a_budget_that_is_named_is_smaller_than_the_one_that_failed_where_rows_share_their_prompt_too():
    lengths, said = torch.full((10,), 300), r"learner\.tokens_at_once=500 continues"
    with pytest.raises(OutOfMemory, match=said), out_of_memory.reading(lengths, 1000):
        raise MemoryError


def test_what_cannot_be_cut_is_not_told_to_be():
    with (
        pytest.raises(OutOfMemory, match="one sequence of 900 tokens") as e,
        out_of_memory.reading(torch.tensor([900]), 64),
    ):
        raise MemoryError
    assert "continues" not in str(e.value)
    with (
        pytest.raises(OutOfMemory, match="the 8 responses to one prompt do not fit") as e,
        out_of_memory.sampling(1, 8, 4),
    ):
        raise MemoryError
    assert "continues" not in str(e.value)
    with pytest.raises(OutOfMemory, match=r"in the update: .*no microbatch was at work"), out_of_memory.phase("update"):
        raise MemoryError


@pytest.mark.slow
def test_a_rollout_that_really_runs_out_names_what_then_fits():
    """The kernel refuses memory to a process whose logits of 1,000 responses are 128 MB a copy."""
    script = """
import re, resource
from pathlib import Path
from types import SimpleNamespace
import torch, transformers
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.out_of_memory import OutOfMemory
from rlhf_lab.records import Prompt
from rlhf_lab.types import PromptBatch

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=32000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    max_position_embeddings=16, pad_token_id=0, eos_token_id=1)
model = transformers.LlamaForCausalLM(config).eval()
tokens = torch.randint(2, 32000, (250, 4))
prompts = PromptBatch(prompts=[Prompt.from_text(str(i)) for i in range(250)], tokens=tokens,
                      attention_mask=torch.ones_like(tokens, dtype=torch.bool))
template = SimpleNamespace(eos=1, pad=0, texts=lambda rows: [""] * len(rows))

def sampled(batch_size):
    sampling = Sampling(max_new_tokens=3, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=batch_size)
    return Generator(model, template, sampling).generate(prompts, 4, seed=0).sequences.tokens

expected = sampled(40)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200 * 2**20, -1))
size = 1000
while True:
    try:
        found = sampled(size)
        break
    except OutOfMemory as error:
        print(error)
        size = int(re.search(r"with sampling.batch_size=(\\d+) continues", str(error))[1])
print(size, torch.equal(found, expected))
"""
    answer = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr
    *errors, last = answer.stdout.splitlines()
    assert len(errors) >= 1
    assert re.match(r"out of memory: [\d.]+ MiB more were asked for, .* 1000 responses at once", errors[0])
    size, equal = last.split()
    assert int(size) < 1000
    assert equal == "True"
