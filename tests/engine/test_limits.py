"""What is sampled is what is scored, against a loop over tokens with the logits processors of transformers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine.flight import Drawn
from rlhf_lab.engine.forward import policy_forward, policy_logprobs
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.models import load_policy
from rlhf_lab.engine.prefixes import share_prefixes
from rlhf_lab.engine.rollouts import BuiltIn
from rlhf_lab.engine.score import Scorer
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Prompt
from rlhf_lab.types import PolicyForward, Rollout

CPU = torch.device("cpu")
Folder = Callable[..., str]
TEXTS = ["bread ?", "is it safe to mix bleach and acid ?", "x"]
STOPS = 60  # ids that end a response beside the template's, so that responses end early and apart
EACH = [
    {"repetition_penalty": 1.4},
    {"min_new_tokens": 4},
    {"temperature": 0.6, "top_k": 9},
    {"temperature": 1.5, "top_p": 0.7},
    {"repetition_penalty": 1.3, "min_new_tokens": 3, "temperature": 0.7, "top_k": 12, "top_p": 0.8},
]
ALL = EACH[-1]
settings = pytest.mark.parametrize("change", EACH, ids=str)


def sampling(**changes: Any) -> Sampling:
    plain: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    plain["batch_size"] = 6  # fewer than there are: rows take the places of others
    return Sampling(**(plain | changes))


def loaded(folder: str) -> tuple[PreTrainedModel, Template]:
    model = load_policy(folder, device=CPU, dtype="float32", seed=0)
    template = Template(load_tokenizer(folder), "auto")
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [template.eos, *range(20, 20 + STOPS)]
    return model, template


def sampled(model: PreTrainedModel, template: Template, how: Sampling, samples: int = 3) -> Rollout:
    how.check_trainable()
    prompts = prompt_batch(template, [Prompt.from_text(text) for text in TEXTS])
    return Generator(model, template, how).generate(prompts, samples, seed=4)


def astray(model: PreTrainedModel) -> PreTrainedModel:
    """The model with other weights, whose own top k and top p would be others."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.abs().mean())
    return model


def one_by_one(
    model: PreTrainedModel, sampler: PreTrainedModel, template: Template, how: Sampling, rollout: Rollout
) -> tuple[Tensor, Tensor]:
    """(B, T) log-probabilities and entropies under `model` on what the library's processors leave to `sampler`.

    Their top k keeps what ties with the k-th, as ours. Their top p drops a token if it and all that are less likely
    have at most 1 - p together, which is ours counted from the other end: alike but for rounding and the order of
    ties, of which random weights have none. Their penalty is given each token once: its gradient counts repeats.
    """
    penalty = RepetitionPenaltyLogitsProcessor(how.repetition_penalty)
    of_policy = [TemperatureLogitsWarper(how.temperature)]
    of_policy += [TopKLogitsWarper(how.top_k)] if how.top_k else []
    of_policy += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    sequences = rollout.sequences
    found, spread = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
    for row in range(len(rollout)):
        real = sequences.tokens[row, sequences.attention_mask[row]]
        length = int(sequences.response_mask[row].sum())
        begin = len(real) - length
        stops = [template.eos, *range(20, 20 + STOPS)]
        least = MinNewTokensLengthLogitsProcessor(begin, how.min_new_tokens, stops)
        after = LogitsProcessorList(of_policy)
        logits = model(input_ids=real[None]).logits[0]
        theirs = sampler(input_ids=real[None]).logits[0].detach()
        for t in range(length):
            place = begin + t
            prefix, once = cast(Any, real[None, :place]), cast(Any, real[:place].unique()[None])
            kept = after(prefix, least(prefix, penalty(once, cast(Any, theirs[None, place - 1]))))[0] > -torch.inf
            own = least(prefix, penalty(once, cast(Any, logits[None, place - 1])))[0] / how.temperature
            distribution = torch.distributions.Categorical(logits=own[kept])
            found[row, t] = distribution.log_prob((kept.nonzero()[:, 0] == real[place]).nonzero()[0, 0])
            spread[row, t] = distribution.entropy().detach()
    return found, spread


@pytest.mark.parametrize("shares", [False, True], ids=["rows", "shared_prefixes"])
@settings
def test_log_probabilities_are_those_of_the_sampled_distribution_for_the_sampler_the_learner_and_the_reference(
    change: dict[str, Any], shares: bool, hf_folder: Folder
):
    model, template = loaded(hf_folder("llama"))
    other = astray(loaded(hf_folder("llama"))[0])
    how = sampling(**change)
    rollout = sampled(model, template, how)
    mask = rollout.sequences.response_mask
    assert len(set(mask.sum(1).tolist())) > 2
    with torch.no_grad():
        expected = {one: one_by_one(one, model, template, how, rollout) for one in (model, other)}
        for one in (model, other) if shares else ():
            share_prefixes(one)
        found: dict[PreTrainedModel, PolicyForward] = {
            one: policy_forward(one, rollout.sequences, processing=rollout.processing) for one in (model, other)
        }
        full = policy_logprobs(model, rollout.sequences)
    assert_close(rollout.logprobs, found[model].logprobs, atol=1e-4, rtol=0)
    for one in (model, other):
        assert_close(found[one].logprobs, expected[one][0], atol=1e-4, rtol=0)
        assert_close(found[one].entropy, expected[one][1], atol=1e-4, rtol=0)
    assert (found[other].logprobs - found[model].logprobs).abs().max() > 0.1
    assert (rollout.logprobs - full).abs().max() > 0.1  # the full softmax is something else


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_models_of_other_kinds_score_what_they_sample(architecture: str, hf_folder: Folder):
    model, template = loaded(hf_folder(architecture))
    rollout = sampled(model, template, sampling(**ALL))
    _, figures = BuiltIn().measured(rollout, model, 4096)
    assert figures["rollout/mismatch_logprob_max"] < 1e-4


@pytest.mark.parametrize("plain_head", [True, False])
def test_logits_that_are_made_piece_by_piece_say_the_same_and_learn_the_same(
    plain_head: bool, hf_folder: Folder, monkeypatch: pytest.MonkeyPatch
):
    model, template = loaded(hf_folder("llama"))
    how = sampling(**ALL)
    rollout = sampled(model, template, how, samples=2)
    weights = torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(0))
    mine = astray(model)  # some steps after the rollout
    sampler, _ = loaded(hf_folder("llama"))
    expected, _ = one_by_one(mine, sampler, template, how, rollout)
    (weights * expected).sum().backward()
    parameters = dict(mine.named_parameters())
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    monkeypatch.setattr("rlhf_lab.engine.forward.has_plain_head", lambda model: plain_head)
    # five tokens at a time
    monkeypatch.setattr("rlhf_lab.engine.forward.LOGITS_AT_ONCE", 5 * model.config.vocab_size + 1)
    mine.zero_grad(set_to_none=True)
    found = policy_forward(mine, rollout.sequences, processing=rollout.processing)
    (weights * found.logprobs).sum().backward()
    assert_close(found.logprobs, expected, atol=1e-4, rtol=0)
    for name, parameter in parameters.items():
        assert_close(parameter.grad, gradients[name], atol=1e-3, rtol=1e-3)


def test_what_was_left_goes_with_its_rows_into_microbatches(hf_folder: Folder):
    model, template = loaded(hf_folder("llama"))
    rollout = sampled(model, template, sampling(**ALL))
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(0))
    for tokens_at_once in (1, 60, 4096):
        scorer = Scorer(rewards={}, reference=model, critics=None, tokens_at_once=tokens_at_once)
        scored = scorer.score(rollout.select(order))
        assert_close(scored.ref_logprobs, rollout.logprobs[order], atol=1e-4, rtol=0)  # one model: their KL is 0


def test_the_record_holds_as_many_tokens_as_were_left_and_the_one_that_was_drawn(hf_folder: Folder):
    model, template = loaded(hf_folder("llama"))
    rollout = sampled(model, template, sampling(top_k=7, top_p=0.9))
    assert sampled(model, template, sampling(min_new_tokens=2)).sequences.kept == ()
    (kept,), mask = rollout.sequences.kept, rollout.sequences.response_mask
    assert (kept.sizes[~mask] == 0).all()
    found = kept.sizes[mask]
    assert found.min() >= 1
    assert found.max() <= 7
    assert len(found.unique()) > 2
    responses = rollout.sequences.tokens[:, rollout.sequences.prompt_width :]
    for row, ids in enumerate(kept.ids):
        assert ids.dtype == torch.int32
        parts = ids.split(kept.sizes[row, mask[row]].tolist())
        for token, left in zip(responses[row, mask[row]].tolist(), parts, strict=True):
            assert token in left.tolist()


def test_what_rows_draw_beyond_their_end_until_somebody_looks_is_not_in_the_record():
    """As on a GPU, where rows that ended go on for a few steps; rows take turns in any order."""
    stop = 9
    parts = {"model": SimpleNamespace(device=CPU), "template": SimpleNamespace(pad=0), "critics": None}
    engine = SimpleNamespace(**parts, sampling=sampling(), stops=torch.tensor([stop]))
    drawn = Drawn(cast(Generator, engine), torch.zeros(2, 5))
    record = {(0, 0): [1, 4], (1, 0): [2], (1, 1): [stop, 3], (0, 1): [5, 6, 7], (1, 2): [8], (0, 2): [stop]}
    record |= {(0, 3): [1], (1, 3): [2]}
    for (row, column), left in record.items():
        drawn.tokens[row, column] = stop if stop in left else left[0]
        kept = torch.zeros(1, 10, dtype=torch.bool).index_fill(1, torch.tensor(left), True)
        drawn.keep(torch.tensor([row]), torch.tensor([column]), kept)
    sizes, ids = drawn.kept_of_responses()
    assert sizes.tolist() == [[2, 3, 1, 0, 0], [1, 2, 0, 0, 0]]
    assert ids.tolist() == [1, 4, 5, 6, 7, stop, 2, 3, stop]


def test_the_first_ratio_is_one_and_the_policy_gradient_that_of_the_expected_reward(hf_folder: Folder):
    """One step, so that every action can be enumerated; the reward of a token is a number of its own."""
    model, template = loaded(hf_folder("llama"))
    # a penalty below 1 favours what was said, so that tokens of the prompt are among those that are left
    how = sampling(max_new_tokens=1, min_new_tokens=1, repetition_penalty=0.5, temperature=1.6, top_k=8, top_p=0.9)
    prompts = prompt_batch(template, [Prompt.from_text("is it safe ?")])
    drawn = Generator(model, template, how).generate(prompts, 400, seed=0)
    actions = drawn.sequences.tokens[:, -1]
    reward = torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(0))

    # the exact gradient of the expected reward, over the set that was left
    (left,) = {tuple(ids.tolist()) for ids in drawn.sequences.kept[0].ids}
    assert sorted(set(actions.tolist())) == list(left)  # all of them were drawn
    assert 3 < len(left) < 9
    logits = model(input_ids=prompts.tokens).logits[0, -1]
    seen = prompts.tokens[0].unique()
    assert torch.isin(torch.tensor(left), seen).any()
    factor = torch.ones_like(logits).index_fill(0, seen, 1 / 0.5)
    penalised = torch.where(logits > 0, logits * factor, logits / factor)[list(left)]
    probabilities = (penalised / 1.6).exp() / (penalised / 1.6).exp().sum()
    exact = torch.autograd.grad((probabilities * reward[list(left)]).sum(), [*model.parameters()])

    # REINFORCE: each action once, as often as the policy draws it
    once = torch.tensor([int((actions == action).nonzero()[0, 0]) for action in left])
    rows = drawn.select(once)
    new = policy_forward(model, rows.sequences, processing=rows.processing).logprobs[:, 0]
    ratio = (new - rows.logprobs[:, 0]).exp()
    assert_close(ratio, torch.ones(len(left)), atol=1e-4, rtol=0)
    weight = probabilities.detach() * reward[list(left)]
    found = torch.autograd.grad((weight * ratio).sum(), [*model.parameters()])
    for theirs, ours in zip(exact, found, strict=True):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-3)

    # log-probabilities of the full softmax would climb something else
    full = policy_logprobs(model, rows.sequences)[:, 0]
    wrong = torch.autograd.grad((weight * full).sum(), [*model.parameters()])
    assert max((one - other).norm() / other.norm() for one, other in zip(wrong, exact, strict=True)) > 0.2


def test_a_restriction_that_nobody_recorded_is_refused(hf_folder: Folder):
    model, template = loaded(hf_folder("llama"))
    rollout = sampled(model, template, sampling(top_k=5))
    bare = sampled(model, template, sampling())
    with pytest.raises(ValueError, match=r"which tokens were left is not recorded; sample with rollout=built_in"):
        policy_forward(model, bare.sequences, processing=rollout.processing)
