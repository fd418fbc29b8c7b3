"""The decoder by weights against the library's own forward, and where it must not be used."""

from typing import Any

import pytest
import torch
import transformers

from rlhf_lab.engine.cache import InPlaceCache
from rlhf_lab.engine.decoder import Decoder, decoder

LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
WIDTH, STEPS = 6, 5


def llama(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**(LLAMA | changes))


def model_of(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # biases and norms begin as nothing
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


ROPE: Any = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip
UNDERSTOOD = {
    "llama": llama(),
    "one head each": llama(num_key_value_heads=4),
    "tied, biases": llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "positions of llama 3": llama(rope_parameters=ROPE),
    "heads wider than the states": llama(head_dim=16),
    "qwen2": transformers.Qwen2Config(**LLAMA),
    "mistral": transformers.MistralConfig(**LLAMA, sliding_window=None),
    "another activation": llama(hidden_act="gelu"),
}


@torch.no_grad()
def steps(model: Any, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of some steps by the decoder, by the model itself, and by one pass over whole rows."""
    source = torch.Generator().manual_seed(1)
    tokens = torch.randint(97, (3, WIDTH + STEPS), generator=source)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :padding] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    prompt = {"attention_mask": mask[:, :WIDTH], "position_ids": positions[:, :WIDTH], "use_cache": True}
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=tokens[:, :WIDTH], past_key_values=cache, **prompt)
    store = InPlaceCache(cache, 3, WIDTH + STEPS)
    store.add(cache, 1)
    decode = decoder(model, WIDTH + STEPS)
    assert decode is not None
    said = []
    for column in range(WIDTH, WIDTH + STEPS):
        seen = mask[:, : column + 1] if padding else None
        said.append(decode(tokens[:, column], positions[:, column], seen, store)[1])
    whole = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return torch.stack(said, 1), whole[:, WIDTH:]


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_steps_by_weights_are_one_pass_over_whole_rows(kind, padding):
    said, whole = steps(model_of(UNDERSTOOD[kind]), padding)
    assert whole.abs().max() > 1
    torch.testing.assert_close(said, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-5), (torch.bfloat16, 5e-2)])
def test_in_other_precisions_up_to_their_rounding(dtype, share):
    said, whole = steps(model_of(UNDERSTOOD["llama"], dtype), 2)
    assert said.dtype == whole.dtype == dtype
    assert (said - whole).abs().max() <= share * whole.abs().max()


def test_weights_that_learn_are_followed():
    model = model_of(UNDERSTOOD["llama"])
    before, _ = steps(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after, whole = steps(model, 0)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHER = {
    "norms of queries": transformers.Qwen3Config(**LLAMA, head_dim=8),
    "scaled residuals": transformers.GraniteConfig(**LLAMA, residual_multiplier=0.5, logits_scaling=2.0),
    "norms before and after": transformers.Gemma2Config(**LLAMA, head_dim=8),
    "positions that depend on the length": llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("kind", OTHER)
def test_a_model_that_computes_otherwise_decodes_by_its_own_forward(kind):
    assert decoder(model_of(OTHER[kind]), 16) is None


def test_nothing_that_would_be_passed_over_is():
    config = UNDERSTOOD["llama"]
    hooked = model_of(config)
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert decoder(hooked, 16) is None
    replaced = model_of(config)
    replaced.model.layers[1].mlp.up_proj = torch.nn.Sequential(replaced.model.layers[1].mlp.up_proj)
    assert decoder(replaced, 16) is None
    dropping = model_of(llama(attention_dropout=0.5))
    assert isinstance(decoder(dropping, 16), Decoder)
    assert decoder(dropping.train(), 16) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(model_of(config), 16) is None
