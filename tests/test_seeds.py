"""Seeds: a function of their arguments only, on every machine and in every process."""

import subprocess
import sys

import pytest
import torch

from rlhf_lab.seeds import derive, generator


def test_a_seed_is_pinned():
    # the first 8 bytes, less the last bit, of: printf %s 0/sampling/17 | sha256sum
    assert derive(0, "sampling", 17) == 1611679896766740167


def test_a_seed_does_not_depend_on_the_process():
    spoken = "from rlhf_lab.seeds import derive; print(derive(3, 'order', 2))"
    answer = subprocess.run([sys.executable, "-c", spoken], capture_output=True, text=True, check=True, timeout=60)
    assert int(answer.stdout) == derive(3, "order", 2)


@pytest.mark.parametrize(
    "other",
    [(1, "sampling", 17), (0, "learner", 17), (0, "sampling", 18), (0, "sampling"), (0, 17, "sampling"), (0,)],
)
def test_a_seed_depends_on_each_argument(other: tuple[int]):
    assert derive(*other) != derive(0, "sampling", 17)


def test_seeds_of_many_steps_differ_and_suit_torch():
    seeds = [derive(seed, "sampling", step) for seed in range(10) for step in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all 63 bits are used


def test_a_generator_repeats_itself_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first, second = (torch.randn(4, generator=generator(0, "order", 1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.randn(4, generator=generator(0, "order", 2)))
    assert torch.equal(before, torch.get_rng_state())
