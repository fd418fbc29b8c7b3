"""Packed rows give the loss and the gradient of rows that stay apart, whatever they are packed with."""

import pytest
import torch
import transformers
from torch.testing import assert_close

from rlhf_lab.algorithms.sft import SFT
from rlhf_lab.engine.forward import policy_forward
from rlhf_lab.engine.learner import Learner, Part
from rlhf_lab.engine.packing import check_packing, pack, packed_forward
from rlhf_lab.types import TextBatch


@pytest.fixture
def model(hf_folder, architecture):
    return transformers.AutoModelForCausalLM.from_pretrained(hf_folder(architecture)).eval()


@pytest.mark.parametrize("longest", [1, 20, 33, 1000])
def test_every_token_is_packed_once_in_its_order_with_its_position(ragged, longest):
    sequences, prompts, responses = ragged(50, 12)
    batch = pack(sequences, longest)
    assert batch.lengths.max() <= max(longest, int(sequences.lengths.max()))
    for k, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        where = batch.row == k
        assert batch.tokens[where].tolist() == [*prompt, *response]
        assert batch.position_ids[where].tolist() == list(range(len(prompt) + len(response)))
        assert batch.token_mask[where].tolist() == [False] * len(prompt) + [True] * len(response)
        places = where.nonzero()
        assert len(set(places[:, 0].tolist())) == 1  # in one sequence,
        assert (places[1:, 1] - places[:-1, 1] == 1).all()  # without a gap
    assert (batch.row >= 0).sum() == sequences.lengths.sum()
    assert not batch.token_mask[batch.row < 0].any()


def test_packing_saves_sequences(ragged):
    sequences, _, _ = ragged(50, 40)
    batch = pack(sequences, 32)
    assert len(batch) <= 1.2 * -(-int(sequences.lengths.sum()) // 32)
    assert [len(pack(sequences, n)) for n in (1, 10_000)] == [40, 1]


def test_a_row_is_said_the_same_of_in_any_company(model, ragged):
    sequences, _, responses = ragged(model.config.vocab_size, 7)
    apart = policy_forward(model, sequences)
    for longest in (20, 40, 200):
        batch = pack(sequences, longest)
        packed = packed_forward(model, batch)
        for k, response in enumerate(responses):
            learnt = (batch.row == k) & batch.token_mask
            assert_close(packed.logprobs[learnt], apart.logprobs[k, : len(response)], atol=1e-5, rtol=1e-5)
            assert_close(packed.entropy[learnt], apart.entropy[k, : len(response)], atol=1e-5, rtol=1e-5)
        assert packed.logprobs[~batch.token_mask].abs().sum() == 0


@pytest.mark.parametrize("tokens_at_once", [1, 10_000])
def test_loss_and_gradient_are_those_of_rows_that_stay_apart(model, ragged, tokens_at_once):
    sequences, _, _ = ragged(model.config.vocab_size, 9)

    def learnt(part: Part) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        learner = Learner(
            modules={"policy": model},
            total_updates=1,
            lr={"policy": 1e-3},
            epochs=1,
            minibatch_size=0,
            tokens_at_once=tokens_at_once,
            schedule="constant",
            warmup=0,
            weight_decay=0.0,
            betas=(0.9, 0.95),
            max_grad_norm=1.0,
        )
        loss = learner.accumulate(part)["nll"]
        return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, gradient = learnt(
        Part(TextBatch(sequences=sequences), lambda b: policy_forward(model, b.sequences), SFT().loss)
    )
    packed, same = learnt(Part(pack(sequences, 40), lambda b: packed_forward(model, b), SFT().loss))
    assert packed == pytest.approx(loss, abs=1e-5)
    assert len(same) == len(gradient) > 0
    for one, other in zip(same, gradient, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_model_is_checked_on_its_own_rows(model, ragged):
    sequences, _, _ = ragged(model.config.vocab_size, 4)
    check_packing(model, sequences)


def test_a_model_that_lets_rows_see_each_other_is_refused(hf_folder, ragged, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_folder("llama")).eval()
    sequences, _, _ = ragged(model.config.vocab_size, 4)
    forward = model.forward

    def deaf(attention_mask, **inputs):
        return forward(
            attention_mask=None if attention_mask.dim() == 4 else attention_mask, **inputs | {"position_ids": None}
        )

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", deaf)
        with pytest.raises(ValueError, match=r"LlamaForCausalLM does not keep packed rows apart: .*pack_tokens=0"):
            check_packing(model, sequences)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match=r"needs eager or sdpa attention, the model uses flash_attention_2"):
        check_packing(model, sequences)
