"""Making preferences over preferences: pairs of pairs, ordered by their margins, with label noise, saved as a table."""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.quadruples import Sampling, flip, pair_up
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.model_paths import ModelPaths, check_path
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import PreferencePair
from rlhf_lab.run import Run
from rlhf_lab.seeds import derive
from rlhf_lab.stages.shards import write_splits
from rlhf_lab.types import Count, Fraction, Metrics


class Quadruples:
    """A table of preferences with margins becomes one of quadruples, `data/<split>.parquet`.

    Columns: strong_ and weak_ with prompt, chosen, rejected, margin and condition, and flipped. The training split
    alone is noisy.

    Args:
        sampling: "iterative" or "random", see `pair_up`.
        partners: weaker pairs drawn for each pair.
        strength_noise: share of the training quadruples whose two pairs are swapped, exactly.
    """

    def __init__(
        self,
        *,
        model: ModelPaths,
        dataset: Dataset,
        hardware: Hardware,
        sampling: Sampling,
        partners: Count,
        strength_noise: Fraction,
    ) -> None:
        self.model, self.dataset, self.hardware = model, dataset, hardware
        self.sampling: Sampling = sampling
        self.partners, self.strength_noise = partners, strength_noise

    def check(self, promised: Collection[str] = ()) -> None:
        """Refuse what cannot work, before anything is loaded; `promised` paths will be there by then."""
        check_path(self.model.policy, "model.policy", promised)
        self.dataset.check(promised, "preferences", is_copied=True)
        if self.dataset.is_world:
            raise ValueError(
                f"{self.dataset.path} draws prompts and demonstrations only; quadruples are made of a table of pairs "
                "with margins, e.g. dataset=tiny_help_scored"
            )

    def run(self, run: Run) -> Metrics:
        names = self.dataset.made
        self.hardware.start()
        template = Template(load_tokenizer(self.model.policy, self.model.new_tokens), self.dataset.template_style)
        tables: dict[str, list[dict[str, Any]]] = {}
        metrics: Metrics = {}
        for split, name in names.items():
            pairs = self.dataset.preferences(split, template)
            margins = [pair.margin for pair in pairs]
            seed = derive(run.seed, split)
            couples = pair_up(margins, self.sampling, self.partners, seed)
            if not couples:
                raise ValueError(
                    f"no two of the {len(pairs)} pairs of {split} differ in margin, so none is the stronger; say which "
                    "column holds the margins (dataset.columns.margin=), or the scores (dataset.columns.score_0= …)"
                )
            named = flip(couples, self.strength_noise if name == "train" else 0.0, seed)
            tables[name] = _rows(pairs, couples, named)
            strong, weak = (Counter(couple[side] for couple in named) for side in (0, 1))
            metrics |= {
                f"{name}/quadruples": float(len(named)),
                f"{name}/pairs": float(len(pairs)),
                f"{name}/strong_pairs": float(len(strong)),
                f"{name}/weak_pairs": float(len(weak)),
                f"{name}/margin/mean": sum(margins) / len(margins),
                f"{name}/strong_margin/mean": sum(margins[a] for a, _ in named) / len(named),
                f"{name}/weak_margin/mean": sum(margins[b] for _, b in named) / len(named),
            }
            run.console.say(
                f"{split}: {len(named)} quadruples of {len(pairs)} pairs; {len(strong)} are a stronger one, "
                f"{len(weak)} a weaker one"
            )
        run.resume()
        for note in self.dataset.notes:
            run.warn(0, note)
        run.make("data", partial(write_splits, tables))
        run.log(0, metrics)
        return metrics


def _rows(
    pairs: Sequence[PreferencePair], couples: Sequence[tuple[int, int]], named: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    return [
        {
            **_columns("strong", pairs[strong]),
            **_columns("weak", pairs[weak]),
            "flipped": (strong, weak) != couple,
        }
        for couple, (strong, weak) in zip(couples, named, strict=True)
    ]


def _columns(side: str, pair: PreferencePair) -> dict[str, Any]:
    return {
        f"{side}_prompt": [dict(message) for message in pair.prompt.messages],
        f"{side}_chosen": pair.chosen,
        f"{side}_rejected": pair.rejected,
        f"{side}_margin": pair.margin,
        f"{side}_condition": pair.prompt.condition,
    }
