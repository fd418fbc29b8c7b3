"""What a policy obtains that is asked for every trade-off between its rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_lab.data.reward_conditions import RewardContext
from rlhf_lab.data.tables import Rows
from rlhf_lab.engine.generate import Sampling
from rlhf_lab.engine.score import Scorer
from rlhf_lab.evaluation.evaluator import Evaluator, leave_table
from rlhf_lab.functional.simplex import Grid
from rlhf_lab.interfaces import RolloutEngine
from rlhf_lab.run import Run
from rlhf_lab.types import Metrics

_KINDS = ("weight", "desired", "obtained")


@dataclass(frozen=True, kw_only=True)
class TradeOffs:
    """Held-out prompts under every preference on a grid.

    Fields:
        evaluator: its splits are `<split>:<preference>`.
        costs: names of the rewards whose sign is turned.
        steps: of the grid, from one reward to another; or "released".
    """

    context: RewardContext
    evaluator: Evaluator
    scorer: Scorer
    splits: Sequence[str]
    costs: Sequence[str]
    steps: Grid

    def measure(
        self, run: Run, engine: RolloutEngine, sampling: Sampling, phase: int, step: int
    ) -> tuple[Metrics, Rows]:
        """What was asked for and what was obtained, as metrics and as a row for each split and preference.

        The metrics are the correlations of the two, over all responses and over the means of the trade-offs; of a
        reward of which all trade-offs ask the same there is none. Every response goes to samples/.
        """
        measured, samples = self.evaluator.evaluate(engine, self.scorer)
        run.write_rows(f"samples/step_{step:06d}.jsonl", samples)
        leave_table(run, step, samples, self.scorer, sampling)
        names = self.context.names
        signs = torch.tensor([-1.0 if name in self.costs else 1.0 for name in names])
        grid: Rows = []
        metrics: Metrics = {}
        for split in self.splits:
            desired, obtained, means = [], [], []
            for preference, weights in self.context.trade_offs(self.steps).items():
                place = f"{split}:{preference}"
                rows = [row for row in samples if row["split"] == place]
                raw = torch.tensor([[row["scores"][told] for told in names] for row in rows]) * signs
                asked, got = self.context.asked(weights), self.context.standardised(raw)
                desired.append(asked.expand_as(got))
                obtained.append(got)
                means.append(got.mean(0))
                by_name = zip(names, weights, asked.tolist(), means[-1].tolist(), strict=True)
                grid.append(
                    {"step": step, "phase": phase, "split": split, "responses": len(rows)}
                    | {f"{kind}_{told}": v for told, *vs in by_name for kind, v in zip(_KINDS, vs, strict=True)}
                    | {
                        key.removeprefix(f"eval/{place}/").replace("/", "_"): value
                        for key, value in measured.items()
                        if key.startswith(f"eval/{place}/")
                    }
                )
            for k, told in enumerate(names):
                wanted, found = torch.cat(desired)[:, k], torch.cat(obtained)[:, k]
                if len(wanted.unique()) == 1:  # one reward alone has nothing to be traded for
                    continue
                points = torch.stack([torch.stack(desired)[:, 0, k], torch.stack(means)[:, k]])
                prefix = f"eval/{split}/ric/{told}"
                metrics[f"{prefix}/correlation"] = torch.corrcoef(torch.stack([wanted, found]))[0, 1].item()
                metrics[f"{prefix}/correlation_of_means"] = torch.corrcoef(points)[0, 1].item()
        return metrics, grid
