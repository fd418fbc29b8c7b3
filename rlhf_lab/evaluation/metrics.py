"""What is reported of a scored rollout: the contract names of the metrics, and intervals for held-out ones."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_lab.functional.kl import kl_estimate
from rlhf_lab.functional.resampling import mean_interval
from rlhf_lab.types import Metrics, Score, ScoredRollout


def half_width(values: Tensor) -> float:
    """Half the width of the 95 % Student-t interval of a mean of independent values; infinite for one value."""
    return mean_interval(values)[1]


def score_metrics(scores: Mapping[str, Score], limits: Mapping[str, float]) -> Metrics:
    """Means and spreads of every source; `limits` names the costs and says above which value one is a violation."""
    metrics: Metrics = {}
    for name, score in scores.items():
        if name in limits:
            metrics[f"cost/{name}/mean"] = score.value.mean().item()
            metrics[f"cost/{name}/std"] = score.value.std().item()
            metrics[f"cost/{name}/frac_violating"] = (score.value > limits[name]).float().mean().item()
        else:
            metrics[f"rewards/{name}/mean"] = score.value.mean().item()
            metrics[f"rewards/{name}/std"] = score.value.std().item()
        if score.members.shape[1] > 1:
            average = score.members.mean(1)
            metrics[f"ensemble/{name}/mean"] = average.mean().item()
            metrics[f"ensemble/{name}/std"] = average.std().item()
            metrics[f"ensemble/{name}/min"] = score.members.amin(1).mean().item()
            metrics[f"ensemble/{name}/penalty"] = (average - score.value).mean().item()
            metrics[f"ensemble/{name}/disagreement"] = score.members.std(1).mean().item()
    return metrics


def kl_metrics(scored: ScoredRollout) -> Metrics:
    """Every estimate of KL(policy || reference), in nats per response: a sum over its tokens, a mean over responses."""
    logprobs, reference = scored.logprobs, scored.ref_logprobs
    return {f"kl/{name}": kl_estimate(logprobs, reference, name).sum(1).mean().item() for name in ("k1", "k2", "k3")}


def completion_metrics(scored: ScoredRollout) -> Metrics:
    """Lengths in tokens, the share of responses that were cut, and how many ended by themselves."""
    finished = scored.rollout.finished
    return {
        "completions/mean_length": scored.response_mask.sum(1).float().mean().item(),
        "completions/truncated_ratio": (~finished).float().mean().item(),
        "val/num_eos_tokens": float(finished.sum()),
    }


def group_metrics(reward: Tensor, group: Tensor) -> Metrics:
    """Share of prompts whose responses all earned the same (B,) reward, so that they teach nothing; {} if alone."""
    order = torch.unique(group)
    if len(order) == len(group):
        return {}
    same = [float(reward[group == prompt].max() == reward[group == prompt].min()) for prompt in order]
    return {"val/zero_variance_groups": sum(same) / len(same)}


def rollout_metrics(
    scored: ScoredRollout, gold: Mapping[str, Score], limits: Mapping[str, float], rewarded: str
) -> Metrics:
    """Everything that is reported of a rollout: scores, gold, KL, lengths, entropy, groups.

    Args:
        gold: true scores of the same responses.
        limits: cost -> above which value one is a violation.
        rewarded: the source by which responses to one prompt are told apart.
    """
    mask = scored.response_mask
    return {
        **score_metrics(scored.scores, limits),
        **{f"gold/{name}/mean": score.value.mean().item() for name, score in gold.items()},
        **kl_metrics(scored),
        **completion_metrics(scored),
        **group_metrics(scored.scores[rewarded].value, scored.rollout.group),
        "objective/entropy": -(scored.logprobs.sum() / mask.sum()).item(),  # nats per token, from its own samples
    }


def warnings(metrics: Metrics) -> list[str]:
    """One line for each thing that a person should look at."""
    found = []
    if metrics.get("kl/k1", 0.0) < -0.1:
        found.append(
            f"mean KL is {metrics['kl/k1']:.2f} nats per response, below 0: the samples do not come from the policy "
            "that is measured (temperature, top-p or a stale engine), or there are too few"
        )
    if abs(metrics.get("val/ratio", 1.0) - 1) > 0.2:
        found.append(f"probability ratio averages {metrics['val/ratio']:.2f}, far from 1; lower the learning rate")
    if metrics.get("val/num_eos_tokens") == 0:
        found.append("no response ended by itself; raise sampling.max_new_tokens, or look at the samples")
    if metrics.get("val/zero_variance_groups", 0.0) > 0.9:
        found.append("nearly every prompt's responses earn the same reward; there is little to learn from")
    for name, value in metrics.items():
        if name.endswith("/at_cap") and value:
            found.append(f"multiplier {name.split('/')[1]} is at its cap; the limit may be out of reach")
        if name.endswith("/trapped") and value > 0.1:
            found.append(
                f"{value:.0%} of the responses cost so little beside the others that the bound on "
                f"{name.split('/')[1]} would price them as if they cost more; keep bound.guard=true, or bound=mean"
            )
    return found
