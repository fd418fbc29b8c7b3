"""policy_forward, critic_values and raw_scores against the models' own full outputs on single rows without padding."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from torch.testing import assert_close

from rlhf_lab.data.tokenise import join, pad
from rlhf_lab.engine import forward
from rlhf_lab.engine.critics import Critics, load_critics, shared_critics
from rlhf_lab.engine.forward import (
    critic_values,
    policy_forward,
    policy_logprobs,
    raw_scores,
    text_scores,
    token_logprobs,
)
from rlhf_lab.engine.models import load_policy
from rlhf_lab.types import PolicyForward, Processing, Sequences

CPU = torch.device("cpu")
close = partial(assert_close, atol=1e-5, rtol=1e-5)
Folder = Callable[..., str]
Ragged = Callable[..., tuple[Sequences, list[list[int]], list[list[int]]]]


def policy_of(folder: str) -> transformers.PreTrainedModel:
    return load_policy(folder, device=CPU, dtype="float32", seed=0)


def critics_of(folder: str, names: tuple[str, ...] = ("reward", "cost")) -> Critics:
    critics = load_critics(folder, names, device=CPU, dtype="float32", seed=0)
    torch.manual_seed(1)
    torch.nn.init.normal_(critics.heads.weight)
    torch.nn.init.normal_(critics.heads.bias)
    return critics


def wider(sequences: Sequences, left: int, right: int) -> Sequences:
    """The same rows between columns of padding that nobody needs."""
    prompts, width = sequences.tokens[:, : sequences.prompt_width], sequences.prompt_width
    mask = sequences.attention_mask

    def extend(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (before, after))

    return join(
        extend(prompts, left, 0),
        extend(mask[:, :width], left, 0),
        extend(sequences.tokens[:, width:], 0, right),
        extend(sequences.response_mask, 0, right),
    )


def test_logprobs_and_entropy_are_those_of_the_full_logits_of_each_row_alone(
    architecture: str, hf_folder: Folder, ragged: Ragged
):
    model, temperature = policy_of(hf_folder(architecture)), 0.7
    sequences, prompts, responses = ragged(model.config.vocab_size, 6)
    with torch.no_grad():
        found = policy_forward(model, sequences, processing=Processing(temperature=temperature))
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
        for t in range(found.logprobs.shape[1]):
            if t >= len(response):
                assert found.logprobs[i, t] == 0
                assert found.entropy[i, t] == 0
                continue
            probabilities = logits[len(prompt) + t - 1].softmax(-1)
            close(found.logprobs[i, t].double(), probabilities[response[t]].log())
            slow = -sum(p.item() * p.log().item() for p in probabilities if p > 0)
            close(found.entropy[i, t].item(), slow)
        close(found.sequence_logprobs[i], found.logprobs[i, : len(response)].sum())


def test_padding_batch_composition_and_row_order_change_nothing(architecture: str, hf_folder: Folder, ragged: Ragged):
    folder = hf_folder(architecture)
    model, critics = policy_of(folder), critics_of(folder)
    sequences, _, _ = ragged(model.config.vocab_size, 6, seed=3)

    def everything(rows: Sequences) -> torch.Tensor:
        with torch.no_grad():
            found = policy_forward(model, rows, critics=critics)
        return torch.stack([found.logprobs, found.entropy, *found.values.values()], -1)

    whole = everything(sequences)
    padded = everything(wider(sequences, left=4, right=5))
    assert padded.shape[1] == whole.shape[1] + 5
    close(padded[:, :-5], whole)
    assert (padded[:, -5:] == 0).all()
    order = torch.tensor([4, 0, 5, 2])
    close(everything(sequences.select(order)), whole[order])
    for i in range(6):
        close(everything(sequences.select(torch.tensor([i])))[0], whole[i])


def test_gradient_does_not_depend_on_padding(architecture: str, hf_folder: Folder, ragged: Ragged):
    model = policy_of(hf_folder(architecture))
    sequences, _, _ = ragged(model.config.vocab_size, 4, seed=5)

    def gradient(batches: list[Sequences]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for rows in batches:
            policy_forward(model, rows).logprobs.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone = gradient([sequences.select(torch.tensor([i])) for i in range(4)])
    together = gradient([wider(sequences, 3, 2)])
    assert alone.keys() == together.keys()
    assert sum(g.abs().sum() for g in alone.values()) > 1
    for name, expected in alone.items():
        assert_close(together[name], expected, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_columns_that_are_padding_in_every_row_are_not_computed(
    hf_folder: Folder, ragged: Ragged, monkeypatch: pytest.MonkeyPatch
):
    model = policy_of(hf_folder("llama"))
    sequences, prompts, responses = ragged(model.config.vocab_size, 3)
    policy_forward(model, sequences)  # the first call looks at the model itself
    seen: list[int] = []
    trunk, head = model.base_model.forward, model.get_submodule("lm_head")

    def spy(**inputs: torch.Tensor):
        seen.append(inputs["input_ids"].shape[1])
        return trunk(**inputs)

    monkeypatch.setattr(model.base_model, "forward", spy)
    head.register_forward_hook(lambda _, inputs, logits: seen.append(len(logits)))
    policy_forward(model, wider(sequences, 6, 8))
    assert seen == [max(map(len, prompts)) + max(map(len, responses)), sum(map(len, responses))]


def family(name: str) -> transformers.PreTrainedModel:
    """Models whose logits are more than their output embeddings."""
    shape = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25, "head_dim": 8,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = {
        "gemma2": lambda: transformers.Gemma2Config(**shape, final_logit_softcapping=2.0, sliding_window=64),
        "cohere": lambda: transformers.CohereConfig(**shape, logit_scale=0.25),
        "granite": lambda: transformers.GraniteConfig(**shape, logits_scaling=4.0),
    }[name]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_logits_that_are_capped_or_scaled_stay_so(name: str, ragged: Ragged):
    model = family(name)
    sequences, prompts, responses = ragged(60, 4)
    head, states = model.get_submodule("lm_head"), model.base_model(input_ids=torch.tensor([prompts[0]]))
    bare = head(states.last_hidden_state)
    assert not torch.allclose(bare, model(input_ids=torch.tensor([prompts[0]])).logits)
    with torch.no_grad():
        found = policy_forward(model, sequences)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            expected = torch.distributions.Categorical(logits=logits).log_prob(torch.tensor(response))
            close(found.logprobs[i, : len(response)], expected)


def test_gradients_of_logits_made_in_pieces_are_those_of_the_whole(
    hf_folder: Folder, ragged: Ragged, monkeypatch: pytest.MonkeyPatch
):
    model = policy_of(hf_folder("llama"))
    sequences, _, _ = ragged(model.config.vocab_size, 6)
    made: list[int] = []
    model.get_submodule("lm_head").register_forward_hook(lambda _, inputs, logits: made.append(len(logits)))

    def gradient() -> list[torch.Tensor]:
        model.zero_grad()
        policy_forward(model, sequences).logprobs.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = gradient()
    made.clear()
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 5 * model.config.vocab_size)
    close(gradient(), whole)
    tokens = int(sequences.response_mask.sum())
    assert max(made) == 5
    assert sum(made) == 2 * tokens  # once forward, once more backward


@pytest.mark.parametrize("entries", [1, 40, 100, 10**6])
def test_token_logprobs_do_not_depend_on_how_they_are_cut(entries: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    logits, tokens = (torch.randn(7, 4, 10) * 3).requires_grad_(), torch.randint(0, 10, (7, 4))
    expected = torch.distributions.Categorical(logits=logits.detach().double() / 1.7)
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", entries)
    logprobs, entropy = token_logprobs(logits, tokens, 1.7)
    close(logprobs.double(), expected.log_prob(tokens))
    close(entropy.double(), expected.entropy())
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    one_hot = torch.nn.functional.one_hot(tokens, 10)
    close(gradient.double(), (one_hot - expected.probs) / 1.7)  # d log p(k) / d logits = (1_k - p) / temperature


def test_logits_are_cut_by_rows_not_kept_whole(monkeypatch: pytest.MonkeyPatch):
    shapes: list[torch.Size] = []
    plain = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, dim: (shapes.append(x.shape), plain(x, dim))[1])
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 80)
    token_logprobs(torch.randn(5, 4, 10), torch.zeros(5, 4, dtype=torch.int64), 1.0)
    assert shapes == [(2, 4, 10), (2, 4, 10), (1, 4, 10)]


def test_half_precision_logits_are_divided_by_the_temperature_in_float32():
    logits = (torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 8).bfloat16()
    tokens = logits.argmax(-1)
    expected = torch.distributions.Categorical(logits=logits.double() / 0.7).log_prob(tokens)
    close(token_logprobs(logits, tokens, 0.7)[0].double(), expected)


def test_log_probabilities_alone_are_those_of_the_whole_forward(hf_folder: Folder, ragged: Ragged):
    for architecture in ("llama", "gpt2"):
        model = policy_of(hf_folder(architecture))
        sequences = ragged(model.config.vocab_size, 5)[0]
        with torch.no_grad():
            expected = policy_forward(model, sequences, processing=Processing(temperature=0.7))
            assert expected.entropy.abs().sum() > 0
            assert torch.equal(
                policy_logprobs(model, sequences, processing=Processing(temperature=0.7)), expected.logprobs
            )


def test_entropy_carries_no_gradient_and_logprobs_do(hf_folder: Folder, ragged: Ragged):
    model = policy_of(hf_folder("gpt2"))
    found = policy_forward(model, ragged(model.config.vocab_size, 2)[0])
    assert not found.entropy.requires_grad
    assert found.logprobs.requires_grad


def test_critics_value_the_state_before_each_token(architecture: str, hf_folder: Folder, ragged: Ragged):
    critics = critics_of(hf_folder(architecture))
    vocabulary = critics.trunk.config.vocab_size
    sequences, prompts, responses = ragged(vocabulary, 5, seed=7)
    with torch.no_grad():
        values = critic_values(critics, sequences)
    assert list(values) == ["reward", "cost"]
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        for t in range(len(response)):  # only the tokens before it are there to be seen
            with torch.no_grad():
                hidden = critics.trunk(input_ids=torch.tensor([prompt + response[:t]])).last_hidden_state[0, -1]
                expected = critics.heads.weight @ hidden + critics.heads.bias
            close(torch.stack([values["reward"][i, t], values["cost"][i, t]]), expected)
        assert (values["reward"][i, len(response) :] == 0).all()
        assert (values["cost"][i, len(response) :] == 0).all()


def test_critics_start_at_zero_and_learn_in_heads_and_trunk(architecture: str, hf_folder: Folder, ragged: Ragged):
    fresh = load_critics(hf_folder(architecture), ("reward",), device=CPU, dtype="float32", seed=0)
    sequences, _, _ = ragged(fresh.trunk.config.vocab_size, 3)
    assert (critic_values(fresh, sequences)["reward"] == 0).all()

    critics = critics_of(hf_folder(architecture))
    (critic_values(critics, sequences)["cost"] ** 2).sum().backward()
    assert critics.heads.weight.grad is not None
    assert critics.heads.weight.grad[1].abs().sum() > 0
    assert (critics.heads.weight.grad[0] == 0).all()  # the other stream's head
    for name, parameter in critics.trunk.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    embedding = critics.trunk.get_input_embeddings().get_parameter("weight").grad
    assert embedding is not None
    assert embedding.abs().sum() > 0


def test_policy_forward_gives_each_critic_its_values(hf_folder: Folder, ragged: Ragged):
    folder = hf_folder("qwen2")
    model, critics = policy_of(folder), critics_of(folder)
    sequences, _, _ = ragged(model.config.vocab_size, 3)
    assert policy_forward(model, sequences).values == {}
    expected = critic_values(critics, sequences)
    close(policy_forward(model, sequences, critics=critics).values, expected)


def test_heads_on_the_policys_trunk_read_its_pass_and_teach_it(hf_folder: Folder, ragged: Ragged):
    model = policy_of(hf_folder("llama"))
    shared = shared_critics(model, ("reward", "cost"))
    assert {name for name, _ in shared.named_parameters()} == {"heads.weight", "heads.bias"}
    torch.manual_seed(1)
    torch.nn.init.normal_(shared.heads.weight)
    apart = Critics(copy.deepcopy(model.model), ("reward", "cost"))  # a trunk of its own with the same weights
    apart.heads.load_state_dict(shared.heads.state_dict())
    sequences, _, _ = ragged(model.config.vocab_size, 4)
    policy_forward(model, sequences)  # the first call looks at the model itself
    passes: list[int] = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(1))
    found = policy_forward(model, sequences, critics=shared)
    handle.remove()
    assert len(passes) == 1
    close(found.values, critic_values(apart, sequences))

    def loss(said: PolicyForward) -> torch.Tensor:
        return said.logprobs.sum() + said.values["cost"].square().sum()

    model.zero_grad()
    loss(found).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    heads = shared.heads.weight.grad
    model.zero_grad()
    loss(policy_forward(model, sequences, critics=apart)).backward()
    assert heads is not None
    close(heads, apart.heads.weight.grad)
    from_values = dict(apart.trunk.named_parameters())
    for name, own in model.named_parameters():
        other = from_values.get(name.removeprefix("model."))
        assert own.grad is not None
        expected = own.grad if other is None or other.grad is None else own.grad + other.grad
        assert_close(together[name], expected, atol=1e-4, rtol=1e-4)


def scorer_of(folder: str) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = None  # then HF reads the very last token, whatever it is
    return model.eval().requires_grad_(False)


def test_raw_scores_are_the_classifiers_own_on_single_rows(architecture: str, scorer_folder: Folder, ragged: Ragged):
    model = scorer_of(scorer_folder(architecture))
    tokenizer = transformers.AutoTokenizer.from_pretrained(scorer_folder(architecture))
    for fill in {tokenizer.pad_token_id or 0, tokenizer.eos_token_id}:  # pad == eos, and real pads at the end of rows
        sequences, prompts, responses = ragged(model.config.vocab_size, 6, seed=fill, fill=fill)
        expected = [
            model(input_ids=torch.tensor([p + r])).logits[0, 0] for p, r in zip(prompts, responses, strict=True)
        ]
        close(raw_scores(model, sequences), torch.stack(expected))
        close(raw_scores(model, wider(sequences, 3, 3)), torch.stack(expected))


def test_raw_scores_tell_a_response_with_eos_from_one_that_was_cut(scorer_folder: Folder):
    model, eos = scorer_of(scorer_folder("gpt2")), 0
    rows = [[5, 6, 7, eos], [5, 6, 7]]
    both = join(*pad([[1, 2]] * 2, eos, "left"), *pad(rows, eos, "right"))
    expected = torch.stack([model(input_ids=torch.tensor([[1, 2, *row]])).logits[0, 0] for row in rows])
    close(raw_scores(model, both), expected)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_raw_scores_of_an_empty_response_are_those_of_its_prompt(scorer_folder: Folder):
    model = scorer_of(scorer_folder("llama"))
    both = join(*pad([[5, 6], [7, 8, 9]], 0, "left"), *pad([[3, 4], []], 0, "right"))
    close(raw_scores(model, both)[1], model(input_ids=torch.tensor([[7, 8, 9]])).logits[0, 0])
    alone = both.select(torch.tensor([1]))
    close(raw_scores(model, alone)[0], model(input_ids=torch.tensor([[7, 8, 9]])).logits[0, 0])


def test_text_scores_are_the_raw_scores_of_each_side(scorer_folder: Folder, ragged: Ragged):
    model = scorer_of(scorer_folder("opt"))
    first, second = (ragged(model.config.vocab_size, 3, seed=s)[0] for s in (1, 2))
    found = text_scores(model, (first, second))
    close(found.first, raw_scores(model, first))
    close(found.second, raw_scores(model, second))
    assert not torch.allclose(found.first, found.second)


def test_token_scores_are_the_classifiers_own_on_the_response_so_far(scorer_folder: Folder, ragged: Ragged):
    for architecture in ("llama", "gpt2"):
        model = scorer_of(scorer_folder(architecture))
        first, prompts, responses = ragged(model.config.vocab_size, 3, seed=1)
        second, _, _ = ragged(model.config.vocab_size, 3, seed=2)
        found = text_scores(model, (wider(first, 2, 3), second), token_scores=True)
        assert found.token_scores[1].shape == second.response_mask.shape
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            for t in range(len(response)):
                alone = model(input_ids=torch.tensor([prompt + response[: t + 1]])).logits[0, 0]
                close(found.token_scores[0][i, t], alone)
            assert found.token_scores[0][i, len(response) :].eq(0).all()
            close(found.token_scores[0][i, len(response) - 1], found.first[i])
    assert text_scores(model, (first, second)).token_scores == ()
