"""Several data sets as one: in stated shares, in proportion to their sizes, or in exact numbers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

import torch

from rlhf_lab.data.columns import NEEDS
from rlhf_lab.data.ingredient import Ingredient, Record, apportion, prompt_ids
from rlhf_lab.data.source import OnOverlap
from rlhf_lab.data.splits import overlap
from rlhf_lab.data.statistics import Counted, SplitStatistics
from rlhf_lab.data.templates import Style, Template
from rlhf_lab.records import Demonstration, PreferencePair, Prompt, Quadruple, Ranking, SafetyPair
from rlhf_lab.seeds import generator
from rlhf_lab.types import Count


class Mixture:
    """A data set of records of any one kind made of others, part after part.

    Its held-out splits are those that every part has. In shares they hold `eval_size` rows, or as many as there are;
    else all that the parts' own eval_size leaves.

    Args:
        parts: name -> its records. All have a share, or none has.
        train_size, eval_size: rows of the training split, and of each held-out one, that shares divide; else null.
        seed: of which rows are drawn; each part draws for itself, so that another part changes nothing.
        on_overlap: what becomes of training rows of one part whose prompt is in a held-out split of another: "keep",
            "drop" or "error".

    Source: the multitask baseline of Personalized Soups, Jang et al. 2023, arXiv:2310.11564; lists of data sets of
    Safe RLHF, Dai et al. 2023, arXiv:2310.12773.
    """

    train_split = "train"

    def __init__(
        self,
        parts: Mapping[str, Ingredient],
        train_size: Count | None,
        eval_size: Count | None,
        seed: int,
        on_overlap: OnOverlap = "keep",
    ) -> None:
        if not parts:
            raise ValueError("dataset.parts is empty; a mixture has at least one part")
        self.parts, self.train_size, self.eval_size, self.seed = dict(parts), train_size, eval_size, seed
        self.on_overlap: OnOverlap = on_overlap
        self.path = "a mixture of " + ", ".join(f"{name} ({part.dataset.path})" for name, part in parts.items())
        shared = {name for name, part in parts.items() if part.share is not None}
        if shared and len(shared) < len(parts):
            raise ValueError(
                f"of the parts of a mixture {sorted(shared)} have a share of it, {sorted(parts.keys() - shared)} a "
                "proportion or count of their own; give all of them a share, or none"
            )
        self.in_shares = bool(shared)
        if self.in_shares != (train_size is not None) or self.in_shares != (eval_size is not None):
            raise ValueError(
                f"dataset.train_size={train_size}, eval_size={eval_size}: shares divide both, proportions and counts "
                f"need neither (null), and the parts have {'shares' if self.in_shares else 'no shares'}"
            )
        styles = {name: part.dataset.template_style for name, part in parts.items()}
        if len(set(styles.values())) > 1:
            raise ValueError(f"the parts of a mixture write conversations differently: {styles}; use one template")
        self.template_style: Style = next(iter(parts.values())).dataset.template_style
        self.counted = Counted()
        self._notes: list[str] = []
        self._read: dict[tuple[str, str, str], list[Record]] = {}

    @property
    def notes(self) -> list[str]:
        """What there is to say of the parts, and of what they share."""
        return [*(note for part in self.parts.values() for note in part.dataset.notes), *self._notes]

    @property
    def splits(self) -> tuple[str, ...]:
        """The held-out splits that every part has."""
        first, *others = [part.dataset.splits for part in self.parts.values()]
        return tuple(split for split in first if all(split in other for other in others))

    @property
    def is_world(self) -> bool:
        """Whether all parts are drawn from the embedded world."""
        return all(part.dataset.is_world for part in self.parts.values())

    @property
    def gold(self) -> Mapping[str, Callable[[str, str], float]]:
        """The true scores, if all parts come from a world that has them."""
        return next(iter(self.parts.values())).dataset.gold if self.is_world else {}

    def check(self, promised: Collection[str] = (), reads: str = "prompts") -> None:
        """Refuse parts that are not there, or have not what is read; see `Dataset.check`.

        Raises:
            ValueError: something other than demonstrations is to be chosen.
        """
        if reads not in NEEDS or reads == "pairs":
            raise ValueError(f"a mixture is of records of one kind, not of {reads}; name a single data set")
        for name, part in self.parts.items():
            if part.chosen_by is not None and reads != "demonstrations":
                raise ValueError(
                    f"dataset.parts.{name}.chosen_by={part.chosen_by} chooses demonstrations, but {reads} are needed; "
                    "set it to null, and best to 1.0"
                )
            part.dataset.check(promised, reads)

    def prompts(self, split: str, template: Template) -> list[Prompt]:
        """Prompts of all parts; one that several have is there for each."""
        return cast(list[Prompt], self._mixed("prompts", split, template))

    def demonstrations(self, split: str, template: Template) -> list[Demonstration]:
        """Responses to imitate."""
        return cast(list[Demonstration], self._mixed("demonstrations", split, template))

    def preferences(self, split: str, template: Template) -> list[PreferencePair]:
        """Pairs, the preferred response first.

        Raises:
            ValueError: some have scores that others have not.
        """
        pairs = cast(list[PreferencePair], self._mixed("preferences", split, template))
        if odd := next((pair for pair in pairs if pair.gaps.keys() != pairs[0].gaps.keys()), None):
            raise ValueError(
                f"{self.path}: some pairs have the scores {sorted(pairs[0].gaps)}, others {sorted(odd.gaps)}; score "
                "all of them with stage=score_table, or leave those columns out"
            )
        return pairs

    def quadruples(self, split: str, template: Template) -> list[Quadruple]:
        """Two pairs, the stronger preference first."""
        return cast(list[Quadruple], self._mixed("quadruples", split, template))

    def rankings(self, split: str, template: Template) -> list[Ranking]:
        """Two or more responses, the best first."""
        return cast(list[Ranking], self._mixed("rankings", split, template))

    def safety_pairs(self, split: str, template: Template) -> list[SafetyPair]:
        """Pairs, the safer response first."""
        return cast(list[SafetyPair], self._mixed("safety_pairs", split, template))

    def _mixed(self, reads: str, split: str, template: Template) -> list[Record]:
        """The rows of a split, part after part.

        Raises:
            ValueError: a part has too few, or the tokenizer cannot read a condition, or parts share prompts.
        """
        training = split == self.train_split
        pools: dict[str, list[Record]] = {}
        for name, part in self.parts.items():
            if unknown := template.unknown(part.condition):
                raise ValueError(
                    f"the policy's tokenizer does not know {unknown}, of dataset.parts.{name}.condition; "
                    "add the words with model.new_tokens, or use words that it knows"
                )
            pools[name] = self._records(name, reads, split, template)
        there = sum(map(len, pools.values()))
        if training and self.on_overlap != "keep":
            pools = {name: self._apart(name, pool, reads, template) for name, pool in pools.items()}
        sizes = {name: len(pool) for name, pool in pools.items()}
        wanted = self._wanted(sizes, training=training)
        mixed: list[Record] = []
        for name, pool in pools.items():
            mixed += self._drawn(pool, wanted[name], split, name)
        self._count(split, reads, there, sizes, wanted, mixed)
        return mixed

    def _records(self, name: str, reads: str, split: str, template: Template) -> list[Record]:
        """What a part has of a split, read once."""
        if (name, reads, split) not in self._read:
            part = self.parts[name]
            place = part.dataset.train_split if split == self.train_split else split
            self._read[name, reads, split] = part.records(reads, place, template)
        return self._read[name, reads, split]

    def _apart(self, name: str, pool: list[Record], reads: str, template: Template) -> list[Record]:
        """The training rows of a part, without the prompts of other parts' held-out splits.

        Raises:
            ValueError: there are some, and `on_overlap` refuses them.
        """
        for other in (part for part in self.parts if part != name):
            for split in self.splits:
                held_out = self._records(other, reads, split, template)
                found = overlap([prompt_ids(r) for r in pool], [prompt_ids(r) for r in held_out])
                if found is None:
                    continue
                said = (
                    f"{found.prompts} prompts of the training rows of the part {name} are in the split {split!r} of "
                    f"the part {other} too ({len(found.rows)} rows), such as that of row {found.example[0]}"
                )
                if self.on_overlap == "error":
                    raise ValueError(
                        f"{said}; what is learnt there would be measured here: dataset.on_overlap=drop leaves those "
                        "rows out of the training split, keep leaves them in"
                    )
                self._notes.append(f"{said}; left out of the training split (dataset.on_overlap=drop)")
                gone = set(found.rows)
                pool = [record for i, record in enumerate(pool) if i not in gone]
        return pool

    def _wanted(self, sizes: Mapping[str, int], *, training: bool) -> dict[str, int]:
        """Part -> how many of its rows are taken."""
        if not self.in_shares:
            return {name: part.wanted(sizes[name]) if training else sizes[name] for name, part in self.parts.items()}
        total = (self.train_size if training else self.eval_size) or 0
        counts = apportion(total, [part.share or 0 for part in self.parts.values()])
        wanted = dict(zip(self.parts, counts, strict=True))
        for name, count in wanted.items():
            if sizes[name] < count and training:
                raise ValueError(
                    f"the part {name} of the mixture has {sizes[name]} rows for {count}; lower dataset.train_size or "
                    "its share, raise its best, or give it more data"
                )
        return {name: min(count, sizes[name]) for name, count in wanted.items()}  # of a held-out split what there is

    def _drawn(self, pool: list[Record], count: int, split: str, name: str) -> list[Record]:
        """Whole copies, then the rest without repetition.

        Raises:
            ValueError: there is nothing to copy.
        """
        if count and not pool:
            raise ValueError(f"the part {name} of the mixture has no rows, but {count} are asked for")
        copies, rest = divmod(count, len(pool)) if pool else (0, 0)
        order = torch.randperm(len(pool), generator=generator(self.seed, "mixture", split, name)).tolist()
        return [pool[i] for i in order * copies + order[:rest]]

    def _count(
        self,
        split: str,
        reads: str,
        there: int,
        sizes: Mapping[str, int],
        wanted: Mapping[str, int],
        mixed: Sequence[Record],
    ) -> None:
        left = {f"rows of {name} not drawn": sizes[name] - wanted[name] for name in sizes if sizes[name] > wanted[name]}
        if shared := there - sum(sizes.values()):
            left = {"a prompt that another part holds out": shared, **left}
        self.counted.add(
            split,
            SplitStatistics(
                reads=reads,
                total=there,
                dropped=left,
                kept=len(mixed),
                prompts=len({id for record in mixed for id in prompt_ids(record)}),
                prompt_tokens=None,  # those of the parts say
                response_tokens=None,
                labels={f"of {name}": count / max(len(mixed), 1) for name, count in wanted.items()},
                flipped=None,
            ),
        )
