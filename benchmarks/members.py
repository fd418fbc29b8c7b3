"""What scoring five ensemble members costs beside one, where they share their first layers and where they do not.

python benchmarks/members.py

Llamas of ten layers, random weights, rows of unequal lengths. Members as after training with `model.frozen_layers=0.9`,
as adapters on the last layer, and as adapters on all layers. Medians of rounds in which all are timed in turn; the
ratios are of these. Nothing is asserted.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from rlhf_lab.data.tokenise import join, pad
from rlhf_lab.engine.backbone import Lora
from rlhf_lab.engine.forward import raw_outputs
from rlhf_lab.engine.model_paths import Adapters
from rlhf_lab.engine.models import new_scorer
from rlhf_lab.engine.parameters import freeze
from rlhf_lab.engine.trunk import Members
from rlhf_lab.types import Sequences

LAYERS, MEMBERS, VOCABULARY = 10, 5, 1024


def base(folder: Path, hidden: int) -> str:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=LAYERS,
            num_attention_heads=8, max_position_embeddings=512, tie_word_embeddings=True,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def members(path: str, share: float, adapters: Adapters | None) -> list[Any]:
    """Value models from one policy that learnt other things where they may."""
    models = [
        new_scorer(path, device=torch.device("cpu"), dtype="float32", seed=k, adapters=adapters).eval()
        for k in range(MEMBERS)
    ]
    for model in models:
        freeze(model, share)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 1e-3 * torch.randn_like(parameter)
    return models


def adapters_from(first: int) -> Adapters:
    layers = list(range(first, LAYERS))
    lora = Lora(rank=16, alpha=32, dropout=0.0, target_modules="all-linear", layers_to_transform=layers)
    return Adapters(lora=lora, quantise=None, frozen_layers=0.0)


def rows(count: int) -> Sequences:
    source = torch.Generator().manual_seed(0)

    def draw(longest: int) -> list[list[int]]:
        lengths = torch.randint(longest // 2, longest + 1, (count,), generator=source).tolist()
        return [torch.randint(0, VOCABULARY, (n,), generator=source).tolist() for n in lengths]

    return join(*pad(draw(32), 0, "left"), *pad(draw(64), 0, "right"))


def seconds(work: Callable[[], object]) -> float:
    begun = perf_counter()
    work()
    return perf_counter() - begun


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = rows(asked.rows)
    with tempfile.TemporaryDirectory() as place:
        path = base(Path(place), asked.hidden)
        for kind, share, adapters in (
            ("whole models, 90 % frozen", 0.9, None),
            ("adapters on the last layer", 0.0, adapters_from(LAYERS - 1)),
            ("adapters on all layers", 0.0, adapters_from(0)),
        ):
            models = members(path, share, adapters)
            together = Members(models)
            ways: dict[str, Callable[[], object]] = {
                "one": lambda models=models: raw_outputs(models[0], text),
                "apart": lambda models=models: [raw_outputs(model, text) for model in models],
                "together": lambda together=together: together.raw_outputs(text),
            }
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(asked.rounds):
                for name, work in ways.items():
                    taken[name].append(seconds(work))
            one, apart, both = (statistics.median(taken[name]) for name in ways)
            print(
                f"{kind:27} {together.common:2} of {LAYERS} layers in common; one {one:.3f} s, {MEMBERS} apart "
                f"{apart / one:.2f}x, together {both / one:.2f}x"
            )


if __name__ == "__main__":
    main()
