"""Rows of responses -> the metrics of a split, each a mean with its 95 % interval over prompts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_lab.data.tables import Rows
from rlhf_lab.functional.estimates import mean, rate
from rlhf_lab.types import Metrics

SHARES = ("refusal", "refusal_of_harmful", "refusal_of_harmless", "exact_match")  # of texts, 0 or 1 for each response


def clusters(rows: Rows) -> Tensor:
    """(N,) int64: rows with one value answer one prompt, under one condition."""
    places: dict[tuple[str, str], int] = {}
    return torch.tensor([places.setdefault((row["id"], row["condition"]), len(places)) for row in rows])


def split_metrics(split: str, rows: Rows) -> Metrics:
    """`eval/<split>/…` of rows as `evaluator.sample_rows` makes them, all of one split.

    Scores, gold scores, KL (k1 as kl) and lengths; text/<name> where the texts themselves were measured, and
    win_rate/<criterion> where a judge compared them. Means have `ci95`, the half width of their Student-t interval over
    prompts, shares also low and high, of Wilson's. What could not be measured is left out and counted: `…/excluded`.
    """
    key, cluster = f"eval/{split}", clusters(rows)
    metrics: Metrics = {}
    for name, values in _measured(rows).items():
        found = mean(values, cluster)
        metrics[f"{key}/{name}" if name.startswith("kl") else f"{key}/{name}/mean"] = found.value
        metrics[f"{key}/{name}/ci95"] = found.high - found.value
    lengths, cut = mean(_column(rows, "tokens"), cluster), rate(1 - _column(rows, "finished"), cluster)
    for name, found in (("mean_length", lengths), ("truncated_ratio", cut)):
        metrics[f"{key}/completions/{name}"] = found.value
        metrics[f"{key}/completions/{name}/ci95"] = (found.high - found.low) / 2
    for kind, metric in (("texts", "text"), ("verdicts", "win_rate")):
        for name in rows[0].get(kind, {}):
            metrics |= _of_texts(f"{key}/{metric}/{name}", [row[kind][name] for row in rows], cluster, name)
    return metrics


def _measured(rows: Rows) -> Mapping[str, Tensor]:
    """Everything that every response has, by its metric's name."""
    scores = {f"rewards/{name}": [row["scores"][name] for row in rows] for name in rows[0]["scores"]}
    gold = {f"gold/{name}": [row["gold"][name] for row in rows] for name in rows[0]["gold"]}
    kl = {name: [row[name] for row in rows] for name in ("kl", "kl_k2", "kl_k3")}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in {**scores, **gold, **kl}.items()}


def _column(rows: Rows, name: str) -> Tensor:
    return torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)


def _of_texts(key: str, values: list[float | None], cluster: Tensor, name: str) -> Metrics:
    """The mean of what could be measured, and of how many it could not."""
    known = torch.tensor([value is not None for value in values])
    metrics: Metrics = {f"{key}/excluded": float((~known).sum())}
    if known.any():
        measured = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
        is_share = name in SHARES or "/win_rate/" in key
        metrics |= (rate if is_share else mean)(measured, cluster[known]).named(key)
    return metrics
