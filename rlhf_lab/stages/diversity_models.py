"""What models say of responses whose diversity is measured: asked once of each text, in shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyarrow import parquet

from rlhf_lab.evaluation.diversity import OfEmbeddings, OfEntailment, compared
from rlhf_lab.evaluation.embeddings import SentenceEncoder
from rlhf_lab.evaluation.entailment import Entailment, EntailmentModel, Question, questions
from rlhf_lab.evaluation.response_sets import View
from rlhf_lab.functional.entailment import LABELS, direction_values
from rlhf_lab.run import Run
from rlhf_lab.stages.shards import Shard, sharded
from rlhf_lab.types import batches


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Models asked about every text of some views; each is loaded only if a shard of its is missing.

    Fields:
        per_shard: texts, or pairs of sentences, between two saves.
    """

    run: Run
    views: Sequence[View]
    per_shard: int
    device: torch.device

    def embeddings(self, path: str, at_once: int) -> OfEmbeddings:
        """Each text embedded once, however many sets it is in, and kept under the digest of its content."""
        texts = list(dict.fromkeys(text for view in self.views for text in view.texts))
        encoder = cache(partial(SentenceEncoder, path, self.device))

        def embed(part: Sequence[str]) -> Shard:
            vectors, tokens = encoder().embed(part, at_once)
            is_cut = (tokens > encoder().longest).tolist()
            rows = [
                {"sha256": _digest(text), "vector": vector, "is_cut": cut}
                for text, vector, cut in zip(part, vectors, is_cut, strict=True)
            ]
            return Shard(rows, int(tokens.sum()))

        parts = list(batches(len(texts), self.per_shard))
        files = sharded(self.run, "embeddings", "embedding", [partial(embed, texts[part]) for part in parts])
        vectors = [_column(file, texts[part], "vector") for file, part in zip(files, parts, strict=True)]
        if cut := sum(sum(parquet.read_table(file)["is_cut"].to_pylist()) for file in files):
            self.run.warn(0, f"the sentence model read only the beginning of {cut} of {len(texts)} responses")
        return OfEmbeddings({text: k for k, text in enumerate(texts)}, np.concatenate(vectors).astype(np.float32))

    def entailment(self, settings: Entailment, seed: int) -> OfEntailment:
        """Each pair of sentences asked once in each direction, however many pairs of responses it is in."""
        sets = (texts for view in self.views for texts in ([view.texts] if view.is_pooled else view.sets))
        asked: list[Question] = list(
            dict.fromkeys(
                question
                for texts in sets
                for _, first, second in compared(settings, texts, seed)
                for both in questions(first, second)
                for question in both
            )
        )
        model = cache(partial(EntailmentModel, settings, self.device))

        def answer(part: Sequence[Question]) -> Shard:
            chances, tokens = model().probabilities(part)
            rows = [
                {"sha256": _digest(*question), "chances": chance}
                for question, chance in zip(part, chances.tolist(), strict=True)
            ]
            return Shard(rows, tokens)

        parts = list(batches(len(asked), self.per_shard))
        files = sharded(self.run, "entailment", "entailment", [partial(answer, asked[part]) for part in parts])
        chances = [_column(file, asked[part], "chances") for file, part in zip(files, parts, strict=True)]
        found = np.concatenate(chances) if chances else np.empty((0, len(LABELS)))
        values = direction_values(found, settings.weigh_by_confidence).tolist()
        return OfEntailment(settings, dict(zip(asked, values, strict=True)), seed)


def _digest(*texts: str) -> str:
    return sha256("\x1f".join(texts).encode()).hexdigest()


def _column(file: Path, expected: Sequence[str] | Sequence[Question], name: str) -> NDArray[np.float64]:
    """(n, …) a column of lists of equal length, of a shard that must be of these texts in this order.

    Raises:
        ValueError: it is of others, of an earlier table at the same path.
    """
    table = parquet.read_table(file)
    digests = [_digest(text) if isinstance(text, str) else _digest(*text) for text in expected]
    if table["sha256"].to_pylist() != digests:
        raise ValueError(f"{file} was made of other responses than are there now; remove the run's folder shards/")
    values = table[name].combine_chunks()
    assert isinstance(values, pa.ListArray)
    return values.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(expected), -1)
