"""Measures of diversity on sets of responses, and their intervals over prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_lab.evaluation.entailment import Entailment, Question, questions
from rlhf_lab.functional.diversity import Text, distinct, expected_distinct, gram_vectors, mean_cosine, self_bleu
from rlhf_lab.functional.entailment import pair_values
from rlhf_lab.functional.estimates import Estimate
from rlhf_lab.functional.jackknife import delete_a_group
from rlhf_lab.functional.resampling import bootstrap_means
from rlhf_lab.functional.words import words
from rlhf_lab.types import Count

Places = NDArray[np.intp]


class Measure(Protocol):
    """A number that says how diverse some texts are; nan where it cannot be said."""

    @property
    def name(self) -> str: ...

    def on(self, texts: Sequence[str]) -> Callable[[Places], float]:
        """What it says of any part of these texts, given by their places, ascending."""
        ...


@dataclass(frozen=True, kw_only=True)
class GramSettings:
    """What n-grams are counted.

    Args:
        orders: n of distinct-n and EAD, whose average is reported; 1 to 5 as released.
        cosine_order, bleu_order: n of the n-gram cosine, 3 as released; the highest of self-BLEU.
        vocabulary: V of EAD for words of any order; 50257 as released.
        token_vocabulary: likewise for tokens; null: of order n the size of the tokenizer to the power n.
    """

    orders: Sequence[Count]
    cosine_order: Count
    bleu_order: Count
    vocabulary: Count
    token_vocabulary: Count | None


@dataclass(frozen=True)
class OfPieces:
    """A measure of texts as sequences of words or tokens."""

    name: str
    split: Callable[[str], Text]
    statistic: Callable[[Sequence[Text]], float]

    def on(self, texts: Sequence[str]) -> Callable[[Places], float]:
        pieces = [self.split(text) for text in texts]
        return lambda places: self.statistic([pieces[place] for place in places])


def gram_measures(settings: GramSettings, tokens: Callable[[str], Text] | None, vocabulary: int) -> list[OfPieces]:
    """Those that need no model but, for tokens, a tokenizer; all but self-BLEU are higher for what is more diverse.

    Args:
        tokens: a text's tokens; None: words only.
        vocabulary: how many different ones there are.
    """
    orders = tuple(settings.orders)
    cosine = partial(_gram_cosine, n=settings.cosine_order)
    of_words = [settings.vocabulary for _ in orders]
    bleu = partial(self_bleu, max_order=settings.bleu_order)
    measures = [
        OfPieces("distinct_words", words, partial(distinct, orders=orders)),
        OfPieces("ead_words", words, partial(expected_distinct, orders=orders, vocabularies=of_words)),
        OfPieces("ngram_cosine", words, cosine),
        OfPieces("self_bleu", words, bleu),
    ]
    if tokens is not None:
        of_tokens = [settings.token_vocabulary or vocabulary**n for n in orders]
        measures += [
            OfPieces("distinct_tokens", tokens, partial(distinct, orders=orders)),
            OfPieces("ead_tokens", tokens, partial(expected_distinct, orders=orders, vocabularies=of_tokens)),
        ]
    return measures


def _gram_cosine(texts: Sequence[Text], n: int) -> float:
    return 1 - mean_cosine(gram_vectors(texts, n))


@dataclass(frozen=True)
class OfEmbeddings:
    """1 - the mean cosine of all pairs of embeddings, which have length 1.

    Fields:
        rows: text -> row of `vectors`.
    """

    rows: Mapping[str, int]
    vectors: NDArray[np.float32]
    name: str = "sentence_bert"

    def on(self, texts: Sequence[str]) -> Callable[[Places], float]:
        held = self.vectors[[self.rows[text] for text in texts]].astype(np.float64)
        return lambda places: 1 - mean_cosine(held[places])


@dataclass(frozen=True)
class OfEntailment:
    """Mean over pairs of texts of their diversity by entailment, in [-2, 2]; see `functional/entailment.py`.

    Fields:
        values: premise and hypothesis -> value in [-1, 1].
        seed: of the pairs and sentences that are compared.
    """

    settings: Entailment
    values: Mapping[Question, float]
    seed: int
    name: str = "nli"

    def on(self, texts: Sequence[str]) -> Callable[[Places], float]:
        pairs = compared(self.settings, texts, self.seed)
        if not pairs:
            return lambda _: float("nan")
        both = [
            (k, self.values[forth], self.values[back])
            for k, (_, first, second) in enumerate(pairs)
            for forth, back in questions(first, second)
        ]
        pair, forwards, backwards = (np.array(column) for column in zip(*both, strict=True))
        values = pair_values(forwards, backwards, pair, len(pairs))
        ends = np.array([places for places, *_ in pairs])

        def mean(places: Places) -> float:
            kept = np.isin(ends, places).all(1)
            return float(values[kept].mean()) if kept.any() else float("nan")

        return mean


Compared = tuple[tuple[int, int], list[str], list[str]]


def compared(settings: Entailment, texts: Sequence[str], seed: int) -> list[Compared]:
    """Places and sentences of each pair of texts that is compared; a text without a sentence is in none."""
    spoken = [settings.chosen_sentences(text, seed) for text in texts]
    pairs = settings.chosen_pairs(len(texts), seed).tolist()
    return [((i, j), spoken[i], spoken[j]) for i, j in pairs if spoken[i] and spoken[j]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A measure over prompts, and how many of them it could not be said of."""

    estimate: Estimate
    counted: int
    excluded: int


def over_prompts(values: NDArray[np.float64], prompt: Sequence[str], draws: int, seed: int) -> Summary:
    """The mean over prompts of what was said of each, with its percentile-bootstrap interval.

    Args:
        values: (P,) nan is left out.
        prompt: (P,) id of each; several of one, under several conditions, count as their mean.
    """
    there = np.isfinite(values)
    by_prompt: dict[str, list[float]] = {}
    for name, value in zip(np.array(prompt, dtype=object)[there], values[there].tolist(), strict=True):
        by_prompt.setdefault(name, []).append(value)
    excluded = int((~there).sum())
    if not by_prompt:
        nothing = Estimate(value=float("nan"), low=float("nan"), high=float("nan"))
        return Summary(estimate=nothing, counted=0, excluded=excluded)
    means = torch.tensor([np.mean(each) for each in by_prompt.values()], dtype=torch.float64)
    low, high = bootstrap_means(means, draws, seed)
    estimate = Estimate(value=means.mean().item(), low=low.item(), high=high.item())
    return Summary(estimate=estimate, counted=int(there.sum()), excluded=excluded)


def of_each(measure: Measure, sets: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """(P,) what a measure says of each set of texts."""
    return np.array([measure.on(texts)(np.arange(len(texts))) for texts in sets], dtype=np.float64)


def of_all(measure: Measure, texts: Sequence[str], prompt: Sequence[str], groups: int, seed: int) -> Estimate:
    """What a measure says of one set of texts, with its interval from leaving out groups of prompts."""
    return delete_a_group(measure.on(texts), prompt, groups, seed)
