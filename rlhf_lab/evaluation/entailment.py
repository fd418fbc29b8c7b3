"""Natural-language inference between the sentences of responses: which pairs are asked, and a model that answers."""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from rlhf_lab.engine.model_paths import check_path
from rlhf_lab.functional.entailment import LABELS, sentences
from rlhf_lab.seeds import derive
from rlhf_lab.types import Count

Question = tuple[str, str]  # premise and hypothesis


@dataclass(frozen=True, kw_only=True)
class Entailment:
    """How the entailment of responses is measured.

    Args:
        path: folder or hub id of a sequence classifier of three labels, such as one trained on MNLI; null for none.
        labels: what its outputs mean, in their order; null: as its config.json names them.
        sentences: of a response that are compared, drawn without replacement; null for all.
        pairs: of responses of one set that are compared, drawn likewise; null for all.
        weigh_by_confidence: whether a label counts as much as the model is sure of it, as released; else fully.
        at_once: pairs of sentences in one forward.
    """

    path: str | None
    labels: Sequence[str] | None
    sentences: Count | None
    pairs: Count | None
    weigh_by_confidence: bool
    at_once: Count

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse a model that is not there, or of which it cannot be said which output is which."""
        if self.path is None:
            return
        check_path(self.path, "stage.nli.path", promised)
        config = Path(self.path).expanduser() / "config.json"
        if config.is_file():
            named = json.loads(config.read_text()).get("id2label", {})
            self.columns({int(place): label for place, label in named.items()})

    def columns(self, id2label: Mapping[int, str]) -> list[int]:
        """Which output of the model stands for each of `LABELS`.

        Raises:
            ValueError: the names do not say.
        """
        named = self.labels or [id2label[place] for place in sorted(id2label)]
        lowered = [label.lower() for label in named]
        if sorted(lowered) != sorted(LABELS):
            raise ValueError(
                f"stage.nli.path={self.path} has the labels {list(named)}; expected {', '.join(LABELS)}: say which "
                f"output is which, in their order, e.g. stage.nli.labels=[{','.join(LABELS)}]"
            )
        return [lowered.index(label) for label in LABELS]

    def chosen_sentences(self, text: str, seed: int) -> list[str]:
        """The sentences of a text that are compared; the same ones wherever the text occurs."""
        found = sentences(text)
        if self.sentences is None or len(found) <= self.sentences:
            return found
        places = Random(derive(seed, "sentences", text)).sample(range(len(found)), self.sentences)
        return [found[place] for place in sorted(places)]

    def chosen_pairs(self, num_texts: int, seed: int) -> NDArray[np.intp]:
        """(q, 2) the pairs i < j of a set's texts that are compared."""
        total = math.comb(num_texts, 2)
        if self.pairs is None or total <= self.pairs:
            return np.stack(np.triu_indices(num_texts, 1), axis=1)
        numbers = sorted(Random(derive(seed, "pairs", num_texts)).sample(range(total), self.pairs))
        return np.array([_pair(number) for number in numbers], dtype=np.intp)


def _pair(number: int) -> tuple[int, int]:
    """Pair i < j that stands at a place in the order (0, 1), (0, 2), (1, 2), (0, 3), …"""
    j = (1 + math.isqrt(1 + 8 * number)) // 2
    return number - j * (j - 1) // 2, j


def questions(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[Question, Question]]:
    """Every pair of sentences of two texts, in either direction."""
    for one in first:
        for other in second:
            yield (one, other), (other, one)


class EntailmentModel:
    """The classifier in memory."""

    def __init__(self, settings: Entailment, device: torch.device) -> None:
        assert settings.path is not None
        self.settings, self.device = settings, device
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(settings.path, trust_remote_code=False)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            settings.path, trust_remote_code=False, use_safetensors=True
        )
        self.columns = settings.columns(model.config.id2label)
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def probabilities(self, asked: Sequence[Question]) -> tuple[NDArray[np.float64], int]:
        """(n, 3) chances of `LABELS` for each premise and hypothesis, and how many tokens were read.

        Premise and hypothesis are encoded as the pair that the model was trained on, not glued into one text.
        """
        order = sorted(range(len(asked)), key=lambda i: sum(map(len, asked[i])))  # alike in length, little padding
        found, tokens = np.empty((len(asked), len(LABELS))), 0
        for start in range(0, len(order), self.settings.at_once):
            rows = order[start : start + self.settings.at_once]
            batch = self.tokenizer(
                [asked[i][0] for i in rows], [asked[i][1] for i in rows], padding=True, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            logits = self.model(**batch.to(self.device)).logits.float()
            found[rows] = logits.softmax(1)[:, self.columns].double().cpu().numpy()
            tokens += int(batch["attention_mask"].sum())
        return found, tokens
