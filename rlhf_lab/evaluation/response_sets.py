"""Which responses are compared with which: those to one prompt, one of every prompt, equally long ones, best of n."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Annotated

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from rlhf_lab.data.generations import Generations
from rlhf_lab.functional.words import cut
from rlhf_lab.seeds import derive

PER_INPUT, ACROSS_INPUTS, OVERALL = "per_input", "across_inputs", "overall"
AtLeastTwo = Annotated[int, Ge(2)]


@dataclass(frozen=True, kw_only=True)
class LengthControl:
    """Every response cut after its word number `words`; shorter ones are left out.

    A prompt counts with the first `samples` of its responses that are long enough, so that all sets are equally large;
    one with fewer is left out, and counted. Equal settings make policies comparable whose lengths differ.
    """

    words: Annotated[int, Ge(1)]
    samples: AtLeastTwo


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """Best of n, made of responses that are there: of each prompt's, in random order, the best of every n in a row.

    No response is in two draws, so the K / n best are as independent as if they had been sampled anew; the released
    code draws with overlap, which makes them look more alike. Beside them stand as many single responses, the first of
    each n, since measures on sets of unequal size do not compare.

    Args:
        n: it divides the number of samples, and leaves two or more.
        by: column of the generation table; of equal values the earlier is better.
    """

    n: AtLeastTwo
    by: str


@dataclass(frozen=True, kw_only=True)
class Held:
    """The responses of a table's split that are measured.

    Fields:
        prompt, condition: (P,) of each prompt.
        texts: (P, K) responses.
        best_by: (P, K) what the best of n is best by, or none.
        logprobs, tokens: (P, K) of whole responses, or none if the table does not say.
    """

    prompt: Sequence[str]
    condition: Sequence[str]
    texts: Sequence[Sequence[str]]
    best_by: NDArray[np.float64] | None
    logprobs: NDArray[np.float64] | None
    tokens: NDArray[np.float64] | None


@dataclass(frozen=True, kw_only=True)
class View:
    """Sets of texts; or, if it is pooled, one set of which each text belongs to a prompt.

    Fields:
        place: (n,) which prompt of `Held` each set, or each text, belongs to.
        sets: (n,) texts; one text each if pooled.
        left_out: prompts that have no set.
    """

    name: str
    is_pooled: bool
    place: Sequence[int]
    sets: Sequence[Sequence[str]] = field(repr=False)
    left_out: int

    @property
    def texts(self) -> list[str]:
        """All texts, set after set."""
        return [text for each in self.sets for text in each]


def hold(table: Generations, split: str, prompts: int | None, samples: int | None, by: str | None, seed: int) -> Held:
    """Read what is measured of a split.

    Args:
        prompts: how many are drawn without replacement; null for all.
        samples: K, the first of each prompt; null for all, of which every prompt then has as many.
        by: column of what the best is best by.

    Raises:
        ValueError: there are fewer prompts or samples than asked for, or fewer than two samples.
    """
    keys = table.keys(split)
    if prompts is not None and prompts > len(keys):
        raise ValueError(f"{table.path} has {len(keys)} prompts in {split}; set stage.prompts to that or less, or null")
    counts = np.diff(table.starts(split))
    kept = table.num_samples(split) if samples is None else samples
    if kept < 2 or counts.min() < kept:
        raise ValueError(
            f"{table.path} has {counts.min()} responses to some prompt of {split}; diversity per input needs "
            f"{max(kept, 2)}: sample more (stage.samples_per_prompt of what made it)"
            + ("" if samples is None else ", or lower stage.samples_per_prompt")
        )
    everyone = range(len(keys))
    chosen = everyone if prompts is None else sorted(Random(derive(seed, split)).sample(everyone, prompts))
    rows = table.starts(split)[:-1][chosen][:, None] + np.arange(kept)

    def column(name: str | None) -> NDArray[np.float64] | None:
        return table.column(name, split).astype(np.float64)[rows] if name in table.columns else None

    wanted = set(chosen)
    return Held(
        prompt=[keys[p][0] for p in chosen],
        condition=[keys[p][1] for p in chosen],
        texts=[texts[:kept] for p, (_, texts) in enumerate(table.texts(split)) if p in wanted],
        best_by=column(by),
        logprobs=column("logprob"),
        tokens=column("tokens"),
    )


def views(
    held: Held, overall: int | None, length: LengthControl | None, best_of: BestOf | None, seed: int
) -> list[View]:
    """Every view of the responses that is asked for.

    Args:
        overall: of all responses pooled, how many are drawn without replacement; null for no such view.
        seed: of what is drawn; equal for all tables, so that they are drawn alike.
    """
    everyone = range(len(held.texts))
    found = [
        View(name=PER_INPUT, is_pooled=False, place=everyone, sets=held.texts, left_out=0),
        View(name=ACROSS_INPUTS, is_pooled=True, place=everyone, sets=[texts[:1] for texts in held.texts], left_out=0),
    ]
    if overall is not None:
        found.append(_overall(held, overall, seed))
    if length is not None:
        found += _equally_long(held, length)
    if best_of is not None and held.best_by is not None:
        found += _best_of(held, held.best_by, best_of, seed)
    return found


def _overall(held: Held, size: int, seed: int) -> View:
    places = [(p, text) for p, texts in enumerate(held.texts) for text in texts]
    if size > len(places):
        raise ValueError(
            f"stage.overall={size}, but there are {len(places)} responses; set it to that or less, or null"
        )
    drawn = sorted(Random(derive(seed, OVERALL)).sample(range(len(places)), size))
    place = [places[i][0] for i in drawn]
    left_out = len(held.texts) - len(set(place))
    return View(name=OVERALL, is_pooled=True, place=place, sets=[[places[i][1]] for i in drawn], left_out=left_out)


def _equally_long(held: Held, length: LengthControl) -> list[View]:
    said = f"_at_{length.words}_words"
    long: Mapping[int, list[str]] = {
        p: [part for text in texts if (part := cut(text, length.words)) is not None]
        for p, texts in enumerate(held.texts)
    }
    enough = [p for p, texts in long.items() if len(texts) >= length.samples]
    some = [p for p, texts in long.items() if texts]
    total = len(held.texts)
    sets = [long[p][: length.samples] for p in enough]
    firsts = [long[p][:1] for p in some]
    return [
        View(name=PER_INPUT + said, is_pooled=False, place=enough, sets=sets, left_out=total - len(enough)),
        View(name=ACROSS_INPUTS + said, is_pooled=True, place=some, sets=firsts, left_out=total - len(some)),
    ]


def _best_of(held: Held, value: NDArray[np.float64], best_of: BestOf, seed: int) -> list[View]:
    best, single = [], []
    for p, texts in enumerate(held.texts):
        order = np.array(Random(derive(seed, "best of", held.prompt[p], held.condition[p])).sample(
            range(len(texts)), len(texts)
        )).reshape(-1, best_of.n)  # fmt: skip
        winners = order[np.arange(len(order)), value[p, order].argmax(1)]
        best.append([texts[i] for i in winners])
        single.append([texts[i] for i in order[:, 0]])
    everyone = range(len(held.texts))
    named = {f"{PER_INPUT}_best_of_{best_of.n}": best, f"{PER_INPUT}_one_of_{best_of.n}": single}
    return [
        View(name=name, is_pooled=False, place=everyone, sets=sets, left_out=0) for name, sets in named.items()
    ] + [
        View(name=name.replace(PER_INPUT, ACROSS_INPUTS), is_pooled=True, place=everyone, left_out=0,
             sets=[texts[:1] for texts in sets])
        for name, sets in named.items()
    ]  # fmt: skip
