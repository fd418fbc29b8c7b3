"""How much of a reference's wording a response has: ROUGE, by the library that papers quote, and exact match."""

import importlib.util
import re
from collections.abc import Sequence
from typing import Literal

Tokens = Literal["ascii", "unicode"]
MEASURES = ("rouge1", "rougeL")


class _Words:
    """Words of any script, in lower case: the library's own reads a to z and digits alone, and 中文 as nothing."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


class TextOverlap:
    """F-measures of ROUGE-1 and ROUGE-L, the best over the references, and whether a response equals one.

    Args:
        tokens: "ascii" as the library and the papers have it; "unicode" for texts that are not in latin letters.
        use_stemmer: whether words count as equal that share Porter's stem; for "ascii".

    Source: Lin 2004, "ROUGE: a package for automatic evaluation of summaries", in the implementation rouge-score.
    """

    def __init__(self, tokens: Tokens, use_stemmer: bool) -> None:
        self.tokens: Tokens = tokens
        self.use_stemmer = use_stemmer

    def check(self) -> None:
        """Raises ValueError if the library is not installed, or a stemmer is wanted where there is none."""
        if importlib.util.find_spec("rouge_score") is None:
            raise ValueError("ROUGE needs the package rouge-score; pip install -c constraints.txt -e '.[rouge]'")
        if self.use_stemmer and self.tokens == "unicode":
            raise ValueError("stage.overlap.use_stemmer=true knows English alone; set it to false for tokens=unicode")

    def load(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer  # imports nltk

        own = _Words() if self.tokens == "unicode" else None
        self.scorer = RougeScorer(list(MEASURES), use_stemmer=self.use_stemmer, tokenizer=own)

    def __call__(self, response: str, references: Sequence[str]) -> dict[str, float | None]:
        """rouge_1, rouge_l and exact_match, each from 0 to 1.

        Raises:
            ValueError: a reference has words of which ROUGE would read none.
        """
        for reference in references:
            if reference.strip() and self.tokens == "ascii" and not re.search("[a-zA-Z0-9]", reference):
                raise ValueError(
                    f"reference {reference[:40]!r} has no latin letter or digit, so ROUGE would read nothing; "
                    "set stage.overlap.tokens=unicode and stage.overlap.use_stemmer=false"
                )
        scores = self.scorer.score_multi(list(references), response)
        same = {_plain(reference) for reference in references}
        return {
            "rouge_1": scores["rouge1"].fmeasure,
            "rouge_l": scores["rougeL"].fmeasure,
            "exact_match": float(_plain(response) in same),
        }


def _plain(text: str) -> str:
    """Without what white space there is more than one blank of."""
    return " ".join(text.split())
