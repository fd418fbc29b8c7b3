"""Sampling against Hugging Face's generate, slow loops and the distributions that tokens are drawn from."""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import scipy
import torch
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
from rlhf_lab.engine.critics import shared_critics
from rlhf_lab.engine.flight import Flight
from rlhf_lab.engine.forward import policy_forward
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.models import load_policy
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.functional.sampled import draw, penalised, restricted
from rlhf_lab.records import Prompt
from rlhf_lab.types import PromptBatch, Rollout

CPU = torch.device("cpu")
Folder = Callable[..., str]
TEXTS = [
    "bread ?",
    "is it safe to mix bleach and acid ?",
    "a joke , then",
    "x",
    "do i walk away or do i wait and bake ?",
]


def sampling(**changes: Any) -> Sampling:
    settings: dict[str, Any] = {
        "max_new_tokens": 12,
        "min_new_tokens": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "batch_size": 256,
    }
    return Sampling(**(settings | changes))


def policy_and_template(folder: str, stops: int = 0) -> tuple[PreTrainedModel, Template]:
    """`stops`: how many more ids of the vocabulary end a response, so that responses end early and apart."""
    model = load_policy(folder, device=CPU, dtype="float32", seed=0)
    template = Template(load_tokenizer(folder), "auto")
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [template.eos, *range(20, 20 + stops)]
    return model, template


def prompts_of(template: Template, texts: list[str] = TEXTS) -> PromptBatch:
    return prompt_batch(template, [Prompt.from_text(text) for text in texts])


def tokens_of(rollout: Rollout, row: int) -> list[int]:
    sequences = rollout.sequences
    return sequences.tokens[row, sequences.prompt_width :][sequences.response_mask[row]].tolist()


def test_greedy_is_token_for_token_what_hugging_face_generates_for_each_prompt_alone(
    architecture: str, hf_folder: Folder
):
    model, template = policy_and_template(hf_folder(architecture), stops=60)
    prompts = prompts_of(template)
    rollout = Generator(model, template, sampling(temperature=0, batch_size=3)).generate(prompts, 1, seed=0)
    lengths = set()
    for i in range(len(prompts)):
        alone = prompts.tokens[i : i + 1, prompts.attention_mask[i]]
        expected = model.generate(  # pyright: ignore[reportCallIssue]
            alone, do_sample=False, max_new_tokens=12, pad_token_id=template.pad
        )
        assert isinstance(expected, torch.Tensor)
        assert tokens_of(rollout, i) == expected[0, alone.shape[1] :].tolist()
        lengths.add(len(tokens_of(rollout, i)))
    assert len(lengths) > 1  # rows left at different times


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_logprobs_are_the_learners_so_that_the_first_ratio_is_one(
    architecture: str, temperature: float, hf_folder: Folder
):
    model, template = policy_and_template(hf_folder(architecture), stops=40)
    settings = sampling(temperature=temperature, batch_size=6)
    settings.check_trainable()
    rollout = Generator(model, template, settings).generate(prompts_of(template), 3, seed=4)
    assert len(set(rollout.sequences.response_mask.sum(1).tolist())) > 3
    with torch.no_grad():
        learner = policy_forward(model, rollout.sequences, processing=rollout.processing).logprobs
    assert_close(rollout.logprobs, learner, atol=1e-4, rtol=0)
    assert (rollout.logprobs[rollout.sequences.response_mask] < 0).all()
    assert (rollout.logprobs[~rollout.sequences.response_mask] == 0).all()


@pytest.mark.parametrize("batch_size", [6, 256])
def test_values_on_the_way_are_what_the_heads_say_of_each_state_alone(
    architecture: str, batch_size: int, hf_folder: Folder
):
    model, template = policy_and_template(hf_folder(architecture), stops=40)
    critics = shared_critics(model, ("reward", "cost"))
    torch.manual_seed(3)
    with torch.no_grad():
        critics.heads.weight.normal_()
        critics.heads.bias.normal_()
    settings = sampling(batch_size=batch_size)
    rollout = Generator(model, template, settings, critics).generate(prompts_of(template), 3, seed=4)
    without = Generator(model, template, settings).generate(prompts_of(template), 3, seed=4)
    assert without.values == {}
    assert torch.equal(rollout.sequences.tokens, without.sequences.tokens)
    assert list(rollout.values) == ["reward", "cost"]
    sequences = rollout.sequences
    for i in range(len(rollout)):
        row = sequences.tokens[i, sequences.attention_mask[i]]
        said = tokens_of(rollout, i)
        with torch.no_grad():
            states = model.base_model(input_ids=row[None]).last_hidden_state[0, -len(said) - 1 : -1]
        for k, name in enumerate(("reward", "cost")):
            expected = states @ critics.heads.weight[k] + critics.heads.bias[k]
            assert_close(rollout.values[name][i, : len(said)], expected, atol=1e-4, rtol=1e-4)
            assert (rollout.values[name][i, len(said) :] == 0).all()


def test_draw_follows_the_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.15, 0.1, 0.05, 0.0])
    n = 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = draw(probabilities.log().expand(n, -1), uniform).bincount(minlength=8)
    possible = probabilities > 0
    assert (counts[~possible] == 0).all()
    test = scipy.stats.chisquare(
        counts[possible].numpy(), (probabilities[possible].double() * n).numpy(), sum_check=False
    )
    assert test.pvalue > 0.01


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.9999999, 1 - 2**-24])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float):
    probabilities = torch.tensor(
        [[0.0, 0.25, 0.0, 0.75, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [1.0, 0, 0, 0, 0, 0]]
    )
    drawn = draw(probabilities.log(), torch.full((3,), uniform))
    assert drawn.tolist() == [1 if uniform < 0.25 else 3, 5, 0]


def test_each_row_is_drawn_by_its_own_number():
    logprobs = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    uniform = torch.rand(6, generator=torch.Generator().manual_seed(1))
    together = draw(logprobs, uniform)
    assert together.tolist() == [draw(logprobs[i : i + 1], uniform[i : i + 1]).item() for i in range(6)]


def test_responses_do_not_depend_on_how_rows_are_batched_nor_on_their_neighbours(architecture: str, hf_folder: Folder):
    model, template = policy_and_template(hf_folder(architecture), stops=30)

    def respond(size: int, texts: list[str] = TEXTS) -> Rollout:
        return Generator(model, template, sampling(batch_size=size)).generate(prompts_of(template, texts), 2, seed=9)

    whole = respond(256)
    for size in (2, 4):
        cut = respond(size)
        assert cut.responses == whole.responses
        assert (cut.sequences.tokens == whole.sequences.tokens).all()
        assert (cut.finished == whole.finished).all()
        assert_close(cut.logprobs, whole.logprobs, atol=1e-5, rtol=1e-5)
    others = respond(
        256, [TEXTS[0], "another", TEXTS[2], "and one that is much longer than the one before it was", "y"]
    )
    for row in (0, 1, 4, 5):
        assert tokens_of(others, row) == tokens_of(whole, row)
    assert tokens_of(whole, 0) != tokens_of(whole, 1)  # two samples of one prompt


def test_equal_seeds_give_equal_responses_and_others_do_not(hf_folder: Folder):
    model, template = policy_and_template(hf_folder("gpt2"))
    engine = Generator(model, template, sampling())
    first, again, other = (engine.generate(prompts_of(template), 1, seed=s).sequences.tokens for s in (1, 1, 2))
    assert (first == again).all()
    assert not torch.equal(first, other)


def test_finished_rows_leave_the_batch(hf_folder: Folder, monkeypatch: pytest.MonkeyPatch):
    model, template = policy_and_template(hf_folder("llama"), stops=150)
    rows: list[int] = []
    plain = model.forward

    def spy(**inputs: Any):
        rows.append(len(inputs["input_ids"]))
        return plain(**inputs)

    monkeypatch.setattr(model, "forward", spy)
    rollout = Generator(model, template, sampling()).generate(prompts_of(template), 4, seed=0)
    lengths = rollout.sequences.response_mask.sum(1)
    assert rows[0] == 5  # each prompt is read once
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < 10
    assert len(rows) == min(lengths.max().item(), 12)  # nothing is computed after the last response has ended
    assert sum(rows[1:]) < 0.75 * 20 * (len(rows) - 1)


def test_no_more_responses_are_in_flight_than_the_batch_size(hf_folder: Folder, monkeypatch: pytest.MonkeyPatch):
    model, template = policy_and_template(hf_folder("llama"))
    rows: list[int] = []
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: (rows.append(len(inputs["input_ids"])), plain(**inputs))[1])
    Generator(model, template, sampling(batch_size=9, max_new_tokens=3)).generate(prompts_of(template), 4, seed=0)
    assert max(rows) == 8


@pytest.mark.parametrize(("own", "more"), [(None, set()), (20, {20}), ([21, 22], {21, 22})])
def test_the_templates_eos_stops_whatever_else_does(own: int | list[int] | None, more: set[int], hf_folder: Folder):
    model, template = policy_and_template(hf_folder("qwen2"))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = own
    assert set(Generator(model, template, sampling()).stops.tolist()) == {template.eos} | more


def test_what_lay_in_the_memory_set_aside_before_is_in_no_response(hf_folder: Folder, monkeypatch: pytest.MonkeyPatch):
    """A masked column weighs 0, but 0 times what is not a number is none either."""
    model, template = policy_and_template(hf_folder("llama"), stops=8)
    prompts = prompts_of(template, ["x"] * 30)  # shorter than places stay free for
    engine = Generator(model, template, sampling(batch_size=6, max_new_tokens=40))
    expected = engine.generate(prompts, 1, seed=1)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **how: empty(x, *size, **how).fill_(torch.nan))
    found = engine.generate(prompts, 1, seed=1)
    assert found.sequences.tokens.equal(expected.sequences.tokens)
    assert_close(found.logprobs, expected.logprobs)


def test_there_are_no_columns_that_no_response_reaches(hf_folder: Folder):
    model, template = policy_and_template(hf_folder("llama"))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    rollout = Generator(model, template, sampling()).generate(prompts_of(template), 2, seed=0)
    assert rollout.sequences.response_mask.tolist() == [[True]] * 10
    assert rollout.logprobs.shape == (10, 1)
    assert rollout.finished.all()


def test_masks_end_with_the_stop_and_finished_says_whether_there_was_one(architecture: str, hf_folder: Folder):
    model, template = policy_and_template(hf_folder(architecture), stops=30)
    engine = Generator(model, template, sampling())
    rollout = engine.generate(prompts_of(template), 4, seed=2)
    stops = {template.eos, *range(20, 50)}
    assert set(engine.stops.tolist()) == stops
    mask, width = rollout.sequences.response_mask, rollout.sequences.prompt_width
    assert 0 < rollout.finished.sum() < len(rollout)
    for i in range(len(rollout)):
        tokens = tokens_of(rollout, i)
        assert not stops & set(tokens[:-1])
        assert (tokens[-1] in stops) == rollout.finished[i]
        assert rollout.finished[i] or len(tokens) == 12
        assert mask[i].tolist() == [t < len(tokens) for t in range(mask.shape[1])]
        assert (rollout.sequences.tokens[i, width + len(tokens) :] == template.pad).all()
        assert rollout.responses[i] == template.text(tokens)
    assert mask.any(0).all()  # no column without a token


def test_samples_of_one_prompt_are_neighbours(hf_folder: Folder):
    model, template = policy_and_template(hf_folder("opt"))
    prompts = prompts_of(template)
    rollout = Generator(model, template, sampling(max_new_tokens=2, batch_size=4)).generate(prompts, 3, seed=0)
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    width = prompts.tokens.shape[1]
    for row, prompt in enumerate(rollout.group.tolist()):
        assert rollout.prompts[row] == prompts.prompts[prompt]
        assert (rollout.sequences.tokens[row, :width] == prompts.tokens[prompt]).all()
        assert (rollout.sequences.attention_mask[row, :width] == prompts.attention_mask[prompt]).all()


def test_no_stop_is_drawn_before_the_least_length(hf_folder: Folder):
    model, template = policy_and_template(hf_folder("qwen2"), stops=150)
    rollout = Generator(model, template, sampling(min_new_tokens=5)).generate(prompts_of(template), 8, seed=0)
    lengths = rollout.sequences.response_mask.sum(1)
    assert lengths.min() == 6  # five that are no stop, then one
    assert rollout.logprobs.isfinite().all()


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.6), (5, 0.7), (0, 1e-6), (1, 1.0), (0, 0.0), (99, 0.99)])
def test_top_k_and_top_p_keep_what_a_slow_loop_keeps(top_k: int, top_p: float):
    logits = torch.randn(20, 17, generator=torch.Generator().manual_seed(0)) * 2
    found = restricted(logits, 1.3, top_k, top_p)
    for row in range(20):
        weights = {token: math.exp(value / 1.3) for token, value in enumerate(logits[row].tolist())}
        ordered = sorted(weights, key=lambda token, weights=weights: -weights[token])[: top_k or None]
        total, mass, kept = sum(weights[token] for token in ordered), 0.0, set()
        for token in ordered:  # the fewest tokens, likeliest first, that hold top_p
            if kept and mass >= top_p and top_p < 1:
                break
            kept.add(token)
            mass += weights[token] / total
        assert {token for token in range(17) if found[row, token] > -torch.inf} == kept
        for token in kept:
            assert found[row, token].item() == pytest.approx(logits[row, token].item() / 1.3, rel=1e-5)


def test_restricted_samples_record_the_restricted_distribution(hf_folder: Folder):
    model, template = policy_and_template(hf_folder("llama"))
    rollout = Generator(model, template, sampling(top_k=1)).generate(prompts_of(template), 1, seed=0)
    greedy = Generator(model, template, sampling(temperature=0)).generate(prompts_of(template), 1, seed=0)
    assert rollout.responses == greedy.responses
    assert (rollout.logprobs == 0).all()  # the only token that could be drawn


def test_a_prompt_that_leaves_no_room_is_refused(architecture: str, hf_folder: Folder):
    model, template = policy_and_template(hf_folder(architecture))
    prompts = prompts_of(template)
    room = 96 - prompts.tokens.shape[1]
    Generator(model, template, sampling(max_new_tokens=room)).generate(prompts, 1, seed=0)
    with pytest.raises(ValueError, match=r"need 97 positions, the model has 96; lower sampling\.max_new_tokens"):
        Generator(model, template, sampling(max_new_tokens=room + 1)).generate(prompts, 1, seed=0)


def test_settings_that_contradict_each_other_or_cannot_train_are_refused():
    with pytest.raises(ValueError, match="min_new_tokens=13 exceeds max_new_tokens=12"):
        sampling(min_new_tokens=13)
    with pytest.raises(ValueError, match=r"temperature=0 draws the likeliest token alone.* use a temperature above 0"):
        sampling(temperature=0).check_trainable()
    sampling(temperature=0.7, top_k=5, top_p=0.9, min_new_tokens=1, repetition_penalty=1.2).check_trainable()


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_that_of_hugging_face(penalty: float):
    source = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(6, 40, generator=source) * 3, torch.randint(40, (6, 15), generator=source)
    seen = torch.zeros(6, 40, dtype=torch.bool).scatter(1, tokens, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(cast(Any, tokens), cast(Any, logits.clone()))
    assert torch.equal(penalised(logits, seen, penalty), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"repetition_penalty": 1.4},
        {"min_new_tokens": 4},
        {"temperature": 0.6, "top_k": 9},
        {"temperature": 1.5, "top_p": 0.7},
        {"repetition_penalty": 1.3, "min_new_tokens": 3, "temperature": 0.7, "top_k": 12, "top_p": 0.8},
    ],
    ids=str,
)
def test_tokens_come_from_the_distribution_that_hugging_faces_processors_make(
    change: dict[str, Any], hf_folder: Folder
):
    """Also where rows take the places of others: what a row has said goes with it."""
    model, template = policy_and_template(hf_folder("llama"), stops=60)
    settings = sampling(**change, batch_size=6)
    prompts = prompts_of(template)
    rollout = Generator(model, template, settings).generate(prompts, 3, seed=3)
    assert len(set(rollout.sequences.response_mask.sum(1).tolist())) > 2
    for row, prompt in enumerate(rollout.group.tolist()):
        written = prompts.tokens[prompt, prompts.attention_mask[prompt]]
        response = tokens_of(rollout, row)
        tokens = torch.cat([written, torch.tensor(response)])[None]
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)])
        stops = [template.eos, *range(20, 80)]
        least = MinNewTokensLengthLogitsProcessor(len(written), settings.min_new_tokens, stops)
        processors += [least, TemperatureLogitsWarper(settings.temperature), TopPLogitsWarper(settings.top_p)]
        if settings.top_k:
            processors.insert(3, TopKLogitsWarper(settings.top_k))
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0]
        for t, token in enumerate(response):
            place = len(written) + t
            made = processors(cast(Any, tokens[:, :place]), cast(Any, logits[None, place - 1])).log_softmax(-1)
            assert rollout.logprobs[row, t].item() == pytest.approx(made[0, token].item(), abs=1e-4)


def test_greedy_with_a_penalty_and_a_least_length_is_what_hugging_face_generates(hf_folder: Folder):
    model, template = policy_and_template(hf_folder("qwen2"), stops=60)
    prompts = prompts_of(template)
    settings = {"repetition_penalty": 1.4, "min_new_tokens": 3}
    rollout = Generator(model, template, sampling(temperature=0, batch_size=2, **settings)).generate(prompts, 1, seed=0)
    plain = Generator(model, template, sampling(temperature=0)).generate(prompts, 1, seed=0)
    assert rollout.responses != plain.responses
    for i in range(len(prompts)):
        alone = prompts.tokens[i : i + 1, prompts.attention_mask[i]]
        expected = cast(Any, model).generate(
            alone, do_sample=False, max_new_tokens=12, pad_token_id=template.pad, **settings
        )
        assert tokens_of(rollout, i) == expected[0, alone.shape[1] :].tolist()


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(hf_folder: Folder):
    model, template = policy_and_template(hf_folder("llama"), stops=2)
    prompts = prompts_of(template)
    free = Generator(model, template, sampling()).generate(prompts, 4, seed=6)

    def spelled(tokens: list[int]) -> str:
        return template.raw_texts([tokens])[0]

    def is_split(text: str, tokens: list[int]) -> bool:
        return text.isascii() and text in spelled(tokens) and not any(text in spelled([token]) for token in tokens)

    rows = [tokens_of(free, row) for row in range(len(free))]
    pairs = [spelled(row[n : n + 2]) for row in rows for n in range(3, len(row) - 3)]
    spans = next(text for text in pairs if any(is_split(text, row) for row in rows))
    once = next(spelled(row[5:6]) for row in rows[2:] if len(row) > 7 and spelled(row[5:6]).isascii())
    strings = [spans, once]
    settings = sampling(stop_strings=strings, batch_size=8)
    settings.check_trainable()
    found = Generator(model, template, settings).generate(prompts, 4, seed=6)
    early = 0
    for row, whole in enumerate(rows):
        cuts = [n for n in range(1, len(whole) + 1) if any(text in spelled(whole[:n]) for text in strings)]
        expected = whole[: cuts[0]] if cuts else whole
        assert tokens_of(found, row) == expected
        assert found.finished[row] == (bool(cuts) or bool(free.finished[row]))
        assert found.responses[row] == template.text(expected)
        assert_close(found.logprobs[row, : len(expected)], free.logprobs[row, : len(expected)], atol=1e-5, rtol=0)
        early += len(expected) < len(whole)
    assert 2 <= early < len(rows)
    assert any(is_split(spans, tokens_of(found, row)) for row in range(len(rows)))


def test_greedy_stops_at_a_text_where_hugging_face_does(hf_folder: Folder):
    model, template = policy_and_template(hf_folder("llama"))
    prompts = prompts_of(template)
    free = Generator(model, template, sampling(temperature=0)).generate(prompts, 1, seed=0)
    text = next(text for row in range(5) if (text := template.raw_texts([tokens_of(free, row)[3:5]])[0]).isascii())
    rollout = Generator(model, template, sampling(temperature=0, stop_strings=[text])).generate(prompts, 1, seed=0)
    lengths = set()
    for i in range(len(prompts)):
        alone = prompts.tokens[i : i + 1, prompts.attention_mask[i]]
        expected = cast(Any, model).generate(
            alone,
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=template.pad,
            stop_strings=[text],
            tokenizer=template.tokenizer,
        )
        assert tokens_of(rollout, i) == expected[0, alone.shape[1] :].tolist()
        lengths.add(len(tokens_of(rollout, i)))
    assert min(lengths) < 6


def test_an_equal_least_and_greatest_length_is_the_length(hf_folder: Folder):
    model, template = policy_and_template(hf_folder("llama"), stops=150)
    settings = sampling(min_new_tokens=7, max_new_tokens=7)
    rollout = Generator(model, template, settings).generate(prompts_of(template), 3, seed=0)
    assert rollout.sequences.response_mask.tolist() == [[True] * 7] * 15
    assert (rollout.logprobs < 0).all()  # each was drawn
    assert not rollout.finished.any()


@pytest.mark.parametrize("change", [{}, {"repetition_penalty": 1.5, "stop_strings": ["e", "o"]}], ids=str)
def test_waiting_prompts_that_take_places_change_no_response(
    change: dict[str, Any], hf_folder: Folder, monkeypatch: pytest.MonkeyPatch
):
    model, template = policy_and_template(hf_folder("llama"), stops=30)
    prompts = prompts_of(template, [" ".join(TEXTS[i % 5].split()[: 1 + i % 7]) + f" {i}" for i in range(17)])
    whole = Generator(model, template, sampling(max_new_tokens=20, **change)).generate(prompts, 3, seed=9)
    joined: list[int] = []
    admit = Flight.admit

    def spy(flight: Flight, *inputs: Any) -> None:
        joined.append(flight.rows)
        admit(flight, *inputs)

    monkeypatch.setattr(Flight, "admit", spy)
    lengths = whole.sequences.response_mask.sum(1)
    assert lengths.min() < 4
    assert lengths.max() > 10
    for size in (7, 12, 24):
        joined.clear()
        cut = Generator(model, template, sampling(max_new_tokens=20, batch_size=size, **change)).generate(
            prompts, 3, seed=9
        )
        assert sum(rows > 0 for rows in joined) >= 2  # they came while others went on
        assert torch.equal(cut.sequences.tokens, whole.sequences.tokens)
        assert torch.equal(cut.sequences.response_mask, whole.sequences.response_mask)
        assert torch.equal(cut.finished, whole.finished)
        assert_close(cut.logprobs, whole.logprobs, atol=1e-5, rtol=0)


def test_first_tokens_come_as_often_as_their_probabilities_say(hf_folder: Folder):
    """Chi-square, at once for all prompts, against the softmax of what Hugging Face's warpers leave."""
    model, template = policy_and_template(hf_folder("llama"))
    prompts, samples = prompts_of(template), 4000
    settings = sampling(max_new_tokens=1, temperature=0.8, top_k=10, batch_size=5 * samples)
    rollout = Generator(model, template, settings).generate(prompts, samples, seed=0)
    tokens = rollout.sequences.tokens[:, -1].view(len(prompts), samples)
    counts, expected = [], []
    for i in range(len(prompts)):
        alone = prompts.tokens[i : i + 1, prompts.attention_mask[i]]
        with torch.no_grad():
            logits = model(input_ids=alone).logits[:, -1]
        kept = TopKLogitsWarper(10)(cast(Any, alone), cast(Any, logits / 0.8)).double().softmax(-1)[0]
        found = tokens[i].bincount(minlength=len(kept))
        assert (found[kept == 0] == 0).all()
        counts.append(found[kept > 0])
        expected.append(kept[kept > 0] * samples)
    test = scipy.stats.chisquare(torch.cat(counts), torch.cat(expected), ddof=len(prompts) - 1, sum_check=False)
    assert min(map(min, expected)) > 5
    assert test.pvalue > 0.01
