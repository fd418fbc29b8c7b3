"""Demonstrations of several data sets in stated shares, each told its own condition: one policy for many tastes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction as Ratio
from typing import Any, Literal

import torch

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Style, Template
from rlhf_lab.records import Demonstration
from rlhf_lab.seeds import generator
from rlhf_lab.types import Count, Fraction, Positive


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """The demonstrations that serve one taste.

    Fields:
        dataset: where they are.
        condition: what the policy is told when it is to serve this taste; "" for nothing.
        share: of the mixture, beside the shares of the others.
        chosen_by: by what they are chosen: a column of the table, such as `score_humour` of stage=score_table; or a
            gold score of the embedded world; null for all of them.
        best: share of the rows that are chosen, those with the highest values; 1 for all.
    """

    dataset: Dataset
    condition: str
    share: Positive
    chosen_by: str | None
    best: Fraction

    def __post_init__(self) -> None:
        if (self.chosen_by is None) != (self.best == 1):
            raise ValueError(
                f"best={self.best} with chosen_by={self.chosen_by}: a share of the rows is the best by something; "
                "set both, or chosen_by=null and best=1.0"
            )

    def demonstrations(self, split: str, template: Template) -> list[Demonstration]:
        """The chosen rows of a split, in their order.

        Raises:
            ValueError: there is nothing of that name to choose by.
        """
        if self.chosen_by is None:
            chosen = self.dataset.demonstrations(split, template)
        else:
            rows, prompts, sides = self.dataset.table(split, "demonstrations", template)
            records = [Demonstration(prompt=p, response=r) for p, r in zip(prompts, sides[""], strict=True)]
            values = self._values(rows, records)
            order = sorted(range(len(records)), key=lambda i: -values[i])
            chosen = [records[i] for i in sorted(order[: round(self.best * len(records))])]
        told = self.condition
        return [replace(r, prompt=r.prompt.conditioned(told, {})) for r in chosen] if told else chosen

    def _values(self, rows: Sequence[Mapping[str, Any]], records: Sequence[Demonstration]) -> list[float]:
        by = str(self.chosen_by)
        if by in self.dataset.gold:
            return [self.dataset.gold[by](record.prompt.request, record.response) for record in records]
        if by not in rows[0]:
            raise ValueError(
                f"chosen_by={by}, but {self.dataset.path} has the columns {sorted(rows[0])} and the gold scores "
                f"{sorted(self.dataset.gold)}; stage=score_table adds the scores of reward models as columns"
            )
        return [float(row[by]) for row in rows]


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of the shares that add up to `total` exactly.

    By largest remainders; of equal ones the first is served first.
    """
    ratios = [Ratio(str(share)) for share in shares]  # as they were typed: .1 is a tenth
    exact = [ratio * total / sum(ratios) for ratio in ratios]
    counts = [int(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda k: counts[k] - exact[k])
    for k in order[: total - sum(counts)]:
        counts[k] += 1
    return counts


class Mixture:
    """A data set of demonstrations made of others, exactly in their shares and without repetition.

    Its held-out splits are those that every part has.

    Args:
        parts: taste -> its demonstrations.
        train_size, eval_size: rows of the training split, and of each held-out one.
        seed: of which rows are drawn.

    Source: the multitask baseline of Personalized Soups, Jang et al. 2023, arXiv:2310.11564.
    """

    train_split = "train"

    def __init__(self, parts: Mapping[str, Ingredient], train_size: Count, eval_size: Count, seed: int) -> None:
        if not parts:
            raise ValueError("dataset.parts is empty; a mixture has at least one part")
        self.parts, self.train_size, self.eval_size, self.seed = dict(parts), train_size, eval_size, seed
        self.path = "a mixture of " + ", ".join(f"{name} ({part.dataset.path})" for name, part in parts.items())
        styles = {name: part.dataset.template_style for name, part in parts.items()}
        if len(set(styles.values())) > 1:
            raise ValueError(f"the parts of a mixture write conversations differently: {styles}; use one template")
        self.template_style: Style = next(iter(parts.values())).dataset.template_style

    @property
    def notes(self) -> list[str]:
        """What there is to say of the parts."""
        return [note for part in self.parts.values() for note in part.dataset.notes]

    @property
    def splits(self) -> tuple[str, ...]:
        """The held-out splits that every part has."""
        first, *others = [part.dataset.splits for part in self.parts.values()]
        return tuple(split for split in first if all(split in other for other in others))

    def check(self, promised: Collection[str] = (), reads: Literal["demonstrations"] = "demonstrations") -> None:
        """Refuse parts that are not there, or are no demonstrations; see `Dataset.check`.

        Raises:
            ValueError: something other than demonstrations is asked for.
        """
        if reads != "demonstrations":
            raise ValueError(f"a mixture is of demonstrations, but {reads} are needed; name a data set of them")
        for part in self.parts.values():
            part.dataset.check(promised, reads)

    def demonstrations(self, split: str, template: Template) -> list[Demonstration]:
        """The rows of a split, part after part.

        Raises:
            ValueError: a part has too few, or the tokenizer cannot read a condition.
        """
        training = split == self.train_split
        counts = apportion(self.train_size if training else self.eval_size, [p.share for p in self.parts.values()])
        mixed: list[Demonstration] = []
        for (name, part), count in zip(self.parts.items(), counts, strict=True):
            if unknown := template.unknown(part.condition):
                raise ValueError(
                    f"the policy's tokenizer does not know {unknown}, of dataset.parts.{name}.condition; "
                    "add the words with model.new_tokens, or use words that it knows"
                )
            rows = part.demonstrations(part.dataset.train_split if training else split, template)
            if len(rows) < count and training:
                raise ValueError(
                    f"the part {name} of the mixture has {len(rows)} rows for {count}; lower dataset.train_size or its "
                    "share, raise its best, or give it more data"
                )
            order = torch.randperm(len(rows), generator=generator(self.seed, "mixture", split, name))
            mixed += [rows[i] for i in order[:count].tolist()]  # of a held-out split, as many as there are
        return mixed
