"""Microbatches, the order of rows, and the Scorer as a whole."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine.critics import load_critics, shared_critics
from rlhf_lab.engine.forward import critic_values, policy_forward
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.models import load_frozen, load_policy
from rlhf_lab.engine.score import Scorer, by_length, microbatches
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.gold import Gold
from rlhf_lab.types import Processing, Sequences

CPU = torch.device("cpu")


@pytest.mark.parametrize("budget", [1, 30, 64, 100, 10_000])
def test_microbatches_hold_every_row_once_within_the_budget(budget: int):
    lengths = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(0))
    parts = microbatches(lengths, budget)
    assert sorted(torch.cat(parts).tolist()) == list(range(40))
    for part in parts:
        assert len(part) == 1 or lengths[part].max() * len(part) <= budget
    ends = [(lengths[part].min(), lengths[part].max()) for part in parts]
    assert all(before[1] <= after[0] for before, after in pairwise(ends))  # of similar length


def test_microbatches_by_hand():
    parts = [part.tolist() for part in microbatches(torch.tensor([3, 9, 2, 3, 20]), 9)]
    assert parts == [[2, 0, 3], [1], [4]]
    assert [part.tolist() for part in microbatches(torch.tensor([5, 5, 5]), 15)] == [[0, 1, 2]]
    assert [part.tolist() for part in microbatches(torch.tensor([5, 5, 5]), 14)] == [[0, 1], [2]]


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_by_length_gives_results_in_the_order_of_the_rows(
    budget: int, ragged: Callable[..., tuple[Sequences, list, list]]
):
    sequences, prompts, responses = ragged(50, 9)
    sizes: list[int] = []

    def total(part: Sequences) -> torch.Tensor:
        sizes.append(len(part))
        return torch.stack([(part.tokens * part.attention_mask).sum(1), part.lengths], 1)

    found = by_length(sequences, budget, CPU, total)
    expected = [[sum(p) + sum(r), len(p) + len(r)] for p, r in zip(prompts, responses, strict=True)]
    assert found.tolist() == expected
    assert sum(sizes) == 9
    assert (len(sizes) == 9) == (budget == 1)
    assert (len(sizes) == 1) == (budget == 10_000)


def test_scorer_measures_everything_at_the_sampling_temperature(hf_folder: Callable[..., str]):
    folder, temperature = hf_folder("gpt2"), 0.6
    template = Template(load_tokenizer(folder), "auto")
    sampling = Sampling(max_new_tokens=8, min_new_tokens=0, temperature=temperature, top_k=0, top_p=1.0, batch_size=8)
    policy = load_policy(folder, device=CPU, dtype="float32", seed=0)
    prompts = prompt_batch(template, [Prompt.from_text(text) for text in ("a joke", "is it safe ?", "bread")])
    rollout = Generator(policy, template, sampling).generate(prompts, 2, seed=0)
    critics = load_critics(folder, ("reward", "cost"), device=CPU, dtype="float32", seed=0)
    torch.nn.init.normal_(critics.heads.weight)
    reference = load_frozen(folder, device=CPU, dtype="float32", seed=0)
    assert not any(parameter.requires_grad for parameter in reference.parameters())

    def scorer(budget: int, with_critics: bool) -> Scorer:
        return Scorer(
            rewards={"length": Gold(lambda request, response: float(len(response)))},
            reference=reference,
            critics=critics if with_critics else None,
            tokens_at_once=budget,
        )

    scored = scorer(40, with_critics=True).score(rollout)
    assert scored.scores["length"].value.tolist() == [len(response) for response in rollout.responses]
    with torch.no_grad():
        expected = policy_forward(reference, rollout.sequences, processing=Processing(temperature=temperature))
        values = critic_values(critics, rollout.sequences)
    assert_close(scored.ref_logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    assert_close(scored.values, values, atol=1e-5, rtol=1e-5)
    assert not scored.ref_logprobs.requires_grad
    assert_close(scored.ref_logprobs, rollout.logprobs, atol=1e-4, rtol=0)  # one model, so their KL is 0
    assert scorer(40, with_critics=False).score(rollout).values == {}


def test_values_that_a_rollout_brought_along_are_taken_and_critics_not_asked(
    hf_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    folder = hf_folder("llama")
    template = Template(load_tokenizer(folder), "auto")
    policy = load_policy(folder, device=CPU, dtype="float32", seed=0)
    critics = shared_critics(policy, ("reward",))
    torch.nn.init.normal_(critics.heads.weight)
    prompts = prompt_batch(template, [Prompt.from_text(text) for text in ("a joke", "is it safe ?", "bread")])
    sampling = Sampling(max_new_tokens=8, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, batch_size=8)
    rollout = Generator(policy, template, sampling, critics).generate(prompts, 2, seed=0)
    scorer = Scorer(
        rewards={}, reference=load_frozen(folder, device=CPU, dtype="float32", seed=0), critics=critics,
        tokens_at_once=1000,
    )  # fmt: skip
    asked = scorer.score(replace(rollout, values={}))
    assert scorer.num_models(replace(rollout, values={})) == 2
    monkeypatch.setattr("rlhf_lab.engine.score.critic_values", None)
    taken = scorer.score(rollout)
    assert scorer.num_models(rollout) == 1
    assert asked.values["reward"].abs().max() > 0.1
    assert_close(taken.values, asked.values, atol=1e-4, rtol=1e-4)
