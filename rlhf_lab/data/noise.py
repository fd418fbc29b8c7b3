"""Labels that are wrong on purpose: how methods bear annotators who err, told apart from how well they learn."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_lab.types import Fraction

Recipe = Literal["exact", "each", "redrawn"]


@dataclass(frozen=True, kw_only=True)
class LabelNoise:
    """Which pairs of a training split have their two responses exchanged.

    What is decided of a pair depends on the pair and the seed, not on its place, so the rows may come in any order;
    and what is flipped at one rate is flipped at every higher one, so that curves over rates are paired.

    Fields:
        recipe: "exact", round(rate × pairs) are flipped; "each", every pair is flipped with probability `rate`;
            "redrawn", round(rate × pairs) have their label drawn anew by a fair coin: about half of them are flipped.
        rate: share of the pairs.
        seed: of the choice.

    Source: "redrawn" with rate 0.5 is the quarter of wrong labels of the reward-model ensembles study, Coste et al.
    2023, arXiv:2310.02743; its released code has no such step.
    """

    recipe: Recipe
    rate: Fraction
    seed: int

    def __post_init__(self) -> None:
        if self.recipe not in ("exact", "each", "redrawn"):
            raise ValueError(f"dataset.noise_recipe={self.recipe!r}; expected exact, each or redrawn")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"dataset.noise={self.rate}; expected a share of the pairs, 0 to 1")

    def flipped(self, identities: Sequence[bytes]) -> list[int]:
        """The places of the pairs that are flipped, ascending.

        Args:
            identities: of the pairs; equal ones are told apart by their place.
        """
        places = [self._place("choice", identity) for identity in identities]
        if self.recipe == "each":
            return [i for i, place in enumerate(places) if place < self.rate]
        order = sorted(range(len(places)), key=lambda i: (places[i], identities[i], i))
        chosen = sorted(order[: round(self.rate * len(places))])
        if self.recipe == "exact":
            return chosen
        return [i for i in chosen if self._place("coin", identities[i]) < 0.5]

    def _place(self, purpose: str, identity: bytes) -> float:
        """A number in [0, 1) that the pair has under this seed."""
        digest = hashlib.blake2b(identity, digest_size=8, key=f"{purpose} {self.seed}".encode()).digest()
        return int.from_bytes(digest, "big") / 2**64
