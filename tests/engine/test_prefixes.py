"""Responses behind one copy of their prompt, against every row alone through the model's own full logits."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from rlhf_lab.data.tokenise import join, pad
from rlhf_lab.engine.critics import Critics
from rlhf_lab.engine.forward import critic_values, policy_forward, raw_scores, text_scores
from rlhf_lab.engine.models import load_policy
from rlhf_lab.engine.prefixes import plant, share_prefixes, shares_prefixes
from rlhf_lab.engine.score import by_length, families, family_microbatches
from rlhf_lab.types import Sequences

CPU = torch.device("cpu")
Folder = Callable[..., str]
exactly = partial(assert_close, atol=1e-9, rtol=1e-9)


def policy_of(folder: str) -> transformers.PreTrainedModel:
    return load_policy(folder, device=CPU, dtype="float32", seed=0)


def answered(
    vocabulary: int, samples: int, prompts: int = 3, seed: int = 0, longest: int = 40
) -> tuple[Sequences, list[list[int]], list[list[int]]]:
    """`samples` responses to each prompt, of lengths from nothing to `longest`, in an order that mixes the prompts."""
    source = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=source).tolist()

    asked = [draw(n) for n in torch.randint(1, 20, (prompts,), generator=source).tolist()]
    rows = torch.randperm(prompts * samples, generator=source).tolist()
    lengths = torch.randint(1, longest + 1, (len(rows),), generator=source).tolist()
    lengths[0], lengths[-1] = longest, 1
    before, after = [asked[row % prompts] for row in rows], [draw(n) for n in lengths]
    return join(*pad(before, 0, "left"), *pad(after, 0, "right")), before, after


def gradients(model: torch.nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weighted(logprobs: Tensor, row: int) -> Tensor:
    """A loss in which every token of every row counts differently."""
    weights = torch.sin(torch.arange(logprobs.shape[-1], dtype=logprobs.dtype) + 3.0 * row)
    return (weights * logprobs).sum()


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_logprobs_and_gradients_are_those_of_rows_that_stand_alone(architecture: str, samples: int, hf_folder: Folder):
    model = policy_of(hf_folder(architecture)).double()
    sequences, prompts, responses = answered(model.config.vocab_size, samples)
    alone = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        alone.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    expected = gradients(model, [weighted(logprobs, row) for row, logprobs in enumerate(alone)])
    assert sum(g.abs().sum() for g in expected.values()) > 1

    share_prefixes(model)
    for budget in (60, 200, 10_000):
        losses = []
        for rows in family_microbatches(sequences, families(sequences), budget):
            found = policy_forward(model, sequences.select(rows))
            for i, row in enumerate(rows.tolist()):
                exactly(found.logprobs[i, : len(responses[row])].double(), alone[row].detach(), atol=1e-5, rtol=1e-5)
                losses.append(weighted(found.logprobs[i], row))
        together = gradients(model, [torch.stack(losses).sum()])
        assert together.keys() == expected.keys()
        largest = max(g.abs().max() for g in expected.values())
        for name, gradient in expected.items():  # log-probabilities are float32, so the gradients' scale is theirs
            assert_close(together[name] / largest, gradient / largest, atol=1e-6, rtol=0, msg=f"{name} at {budget}")


def test_values_and_scores_are_those_of_rows_that_stand_alone(
    architecture: str, hf_folder: Folder, scorer_folder: Folder
):
    trunk = transformers.AutoModel.from_pretrained(hf_folder(architecture)).eval()
    critics = Critics(trunk, ("reward", "cost"))
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(scorer_folder(architecture)).eval()
    torch.nn.init.normal_(critics.heads.weight)
    sequences, _, _ = answered(trunk.config.vocab_size, 3)
    one_by_one = [sequences.select(torch.tensor([row])) for row in range(len(sequences))]

    def everything(rows: Sequences) -> Tensor:
        with torch.no_grad():
            values = critic_values(critics, rows)
            said = text_scores(scorer, (rows,), token_scores=True)
            at_end = raw_scores(scorer, rows)
        whole = [score[:, None].expand_as(values["cost"]) for score in (said.first, at_end)]
        return torch.stack([*values.values(), said.token_scores[0], *whole], -1)

    expected = torch.cat([everything(row) for row in one_by_one])
    assert not shares_prefixes(trunk)
    share_prefixes(trunk)
    share_prefixes(scorer)
    assert shares_prefixes(trunk)
    assert_close(everything(sequences), expected, atol=2e-4, rtol=1e-5)
    found = by_length(sequences, 80, CPU, everything, together=True)
    assert_close(found, expected, atol=2e-4, rtol=1e-5)


def test_each_token_is_there_once(hf_folder: Folder):
    sequences, prompts, responses = answered(50, 4)
    tree = plant(sequences, torch.float32)
    distinct = {tuple(prompt) for prompt in prompts}
    assert tree.tokens.shape[1] == sum(map(len, distinct)) + sum(map(len, responses))
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        where = tree.responses[row, : len(response)]
        assert tree.tokens[0, where].tolist() == response
        assert tree.position_ids[0, where].tolist() == [len(prompt) + t for t in range(len(response))]
        assert tree.tokens[0, tree.before[row, 0]] == prompt[-1]
        assert tree.ends[row] == where[-1]


def test_an_empty_response_ends_with_its_prompt():
    both = join(*pad([[5, 6], [5, 6], [7, 8, 9]], 0, "left"), *pad([[3, 4], [], []], 0, "right"))
    tree = plant(both, torch.float32)
    assert tree.tokens[0, tree.ends].tolist() == [4, 6, 9]
    assert tree.tokens.shape == (1, 7)


@pytest.mark.parametrize("budget", [1, 45, 100, 10_000])
def test_families_stay_together_within_the_budget(budget: int):
    sequences, prompts, responses = answered(50, 4, prompts=5)
    parts = [part.tolist() for part in family_microbatches(sequences, families(sequences), budget)]
    assert sorted(row for part in parts for row in part) == list(range(20))
    for part in parts:
        need = sum(map(len, {tuple(prompts[row]) for row in part})) + sum(len(responses[row]) for row in part)
        assert need <= budget or len(part) == 1
    for family in families(sequences):
        assert len({tuple(prompts[row]) for row in family.tolist()}) == 1
    if budget == 10_000:
        assert len(parts) == 1
    if budget == 1:
        assert len(parts) == 20


def mistral(sliding: bool) -> transformers.PreTrainedModel:
    config = transformers.MistralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8 if sliding else None,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_a_model_of_another_attention_is_refused_and_left_as_it_was():
    for model in (mistral(True), transformers.BloomForCausalLM(transformers.BloomConfig(
        vocab_size=60, hidden_size=32, n_layer=2, n_head=4))):  # fmt: skip
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=type(model).__name__):
            share_prefixes(model.eval())
        assert model.config._attn_implementation == before
    plain = mistral(False)
    share_prefixes(plain)
    assert shares_prefixes(plain)
