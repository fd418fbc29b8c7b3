"""Rewards as conditions: a policy is told, after the request, which rewards its response is to obtain.

Source: Rewards-in-Context, Yang et al. 2024, arXiv:2402.10207.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlhf_lab.data.templates import Template
from rlhf_lab.functional.simplex import Grid, preference_grid
from rlhf_lab.functional.targets import TargetMap, sample_goals, targets
from rlhf_lab.records import Prompt
from rlhf_lab.seeds import generator
from rlhf_lab.types import Positive

CONTEXT_FILE = "rewards_in_context.json"


@dataclass(frozen=True, kw_only=True)
class RewardNotation:
    """How rewards are written for a policy to read: each at the nearest level, a multiple of the step.

    Fields:
        style: "numbers", plain text, for models that read numbers, as released: `<rm1_score> 1.3 <rm2_score> -0.2`;
            or "tokens", one new word per reward and level, `<helpful=1.3> <humour=-0.2>`, for a vocabulary of words.
        step: between two levels.
        largest: levels beyond +-largest are written as that.
    """

    style: Literal["numbers", "tokens"]
    step: Positive
    largest: Positive

    def __post_init__(self) -> None:
        if self.step > self.largest:
            raise ValueError(f"notation.step={self.step} exceeds notation.largest={self.largest}; only 0 is a level")

    def new_tokens(self, names: Sequence[str]) -> list[str]:
        """What the tokenizer has to learn: every level of every reward, or nothing."""
        if self.style == "numbers":
            return []
        most = self._level(self.largest)
        return [self._word(name, level) for name in names for level in range(-most, most + 1)]

    def at_levels(self, rewards: Tensor) -> Tensor:
        """Rewards of any shape, each moved to the level at which it would be written."""
        levels = [self._level(value) * self.step for value in rewards.flatten().tolist()]
        return torch.tensor(levels, dtype=torch.float64).reshape(rewards.shape)

    def write(self, names: Sequence[str], rewards: Sequence[float]) -> str:
        """The text that tells these rewards, in this order."""
        levels = [self._level(value) for value in rewards]
        if self.style == "tokens":
            return " ".join(self._word(name, level) for name, level in zip(names, levels, strict=True))
        return " ".join(f"<rm{k}_score> {self._number(level)}" for k, level in enumerate(levels, start=1))

    def read(self, names: Sequence[str], text: str) -> list[float]:
        """The rewards that a text tells: the inverse of `write` at the levels.

        Raises:
            ValueError: the text does not tell these rewards in this order.
        """
        number = r"(-?\d+(?:\.\d+)?)"
        tokens = [rf"<{re.escape(name)}={number}>" for name in names]
        plain = [rf"<rm{k}_score> {number}" for k in range(1, len(names) + 1)]
        found = re.fullmatch(" ".join(tokens if self.style == "tokens" else plain), text)
        if found is None:
            raise ValueError(f"{text!r} does not tell the rewards {list(names)} in the notation {self.style!r}")
        return [float(value) for value in found.groups()]

    def _level(self, reward: float) -> int:
        most = int(self.largest / self.step + 1e-9)  # 0.3 / 0.1 is a little below 3
        return max(-most, min(most, round(reward / self.step)))

    def _number(self, level: int) -> str:
        return str(level * Decimal(str(self.step)))  # with the decimals of the step, and no -0.0

    def _word(self, name: str, level: int) -> str:
        return f"<{name}={self._number(level)}>"


@dataclass(frozen=True, kw_only=True)
class RewardContext:
    """Everything that turns rewards and preferences into the conditions of one policy; it is saved beside the policy.

    K rewards; told rewards are standardised: raw reward minus `mean`, over `sd`.

    Fields:
        names: of the rewards, in the order in which they are told.
        mean, sd: (K,) of the raw rewards of the responses that were learnt from; the population's deviation.
        scale: (Q, K) standardised rewards at ascending levels, see `functional/targets.py`.
        method: which rewards a preference asks for.
    """

    names: tuple[str, ...]
    notation: RewardNotation
    mean: Tensor
    sd: Tensor
    scale: Tensor
    method: TargetMap

    def standardised(self, raw: Tensor) -> Tensor:
        """(N, K) raw rewards -> in the units that are told."""
        return (raw.double() - self.mean) / self.sd

    def told(self, prompt: Prompt, rewards: Sequence[float], weights: Mapping[str, float]) -> Prompt:
        """The prompt with standardised rewards to obtain, and the weights that they stand for, if any."""
        return prompt.conditioned(self.notation.write(self.names, rewards), weights)

    def asked(self, weights: Sequence[float]) -> Tensor:
        """(K,) standardised rewards, at levels, that a preference asks for; the weights sum to 1."""
        return self.notation.at_levels(targets(torch.tensor(weights, dtype=torch.float64), self.scale, self.method))

    def goals(self, count: int, seed: int) -> Tensor:
        """(N, K) rewards to explore with, at levels."""
        return self.notation.at_levels(sample_goals(self.scale, count, generator(seed, "goals")))

    def trade_offs(self, steps: Grid) -> dict[str, tuple[float, ...]]:
        """name -> (K,) weights, for every preference of the grid."""
        return {
            ",".join(f"{name}={w:.4g}" for name, w in zip(self.names, weights, strict=True)): weights
            for weights in preference_grid(len(self.names), steps)
        }

    def under_trade_offs(self, prompts: Sequence[Prompt], steps: Grid) -> dict[str, list[Prompt]]:
        """trade-off -> all prompts, told the rewards that it asks for."""
        told: dict[str, list[Prompt]] = {}
        for name, weights in self.trade_offs(steps).items():
            rewards, by_name = self.asked(weights).tolist(), dict(zip(self.names, weights, strict=True))
            told[name] = [self.told(prompt, rewards, by_name) for prompt in prompts]
        return told

    def save(self, folder: Path) -> None:
        """Write the context beside a policy."""
        plain = {
            "names": self.names,
            "notation": self.notation.__dict__,
            "mean": self.mean.tolist(),
            "sd": self.sd.tolist(),
            "scale": self.scale.tolist(),
            "method": self.method,
        }
        (folder / CONTEXT_FILE).write_text(json.dumps(plain, indent=1))

    @classmethod
    def load(cls, folder: Path) -> "RewardContext":
        """Read it back.

        Raises:
            ValueError: there is none.
        """
        file = folder / CONTEXT_FILE
        if not file.exists():
            raise ValueError(f"no {CONTEXT_FILE} in {folder}; name the policy folder of an algorithm=ric run")
        plain = json.loads(file.read_text())
        tensors = {key: torch.tensor(plain[key], dtype=torch.float64) for key in ("mean", "sd", "scale")}
        return cls(
            names=tuple(plain["names"]),
            notation=RewardNotation(**plain["notation"]),
            method=plain["method"],
            **tensors,
        )


def moments(raw: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(N, K) raw rewards -> (K,) mean and (K,) standard deviation, of the population.

    Raises:
        ValueError: a reward is the same for every response, so it cannot be asked for.
    """
    raw = raw.double()
    sd = raw.std(0, correction=0)
    if constant := [name for name, value in zip(names, sd.tolist(), strict=True) if not value > 0]:
        raise ValueError(
            f"the reward {constant[0]} is the same for all {len(raw)} responses, so nothing can be learnt from it; "
            "leave it out of stage.told, or give more varied responses"
        )
    return raw.mean(0), sd


class TradeOffs:
    """The conditions under which a policy of Rewards-in-Context is evaluated, or trained further: `conditions=`.

    Args:
        policy: folder of the policy, with its rewards_in_context.json.
        steps: of the grid of preferences that held-out prompts are told, from one reward to another; or "released".
    """

    def __init__(self, policy: str, steps: Grid) -> None:
        self.policy = policy
        self.steps: Grid = steps

    @cached_property
    def context(self) -> RewardContext:
        """Read when it is first asked for."""
        return RewardContext.load(Path(self.policy))

    @property
    def streams(self) -> tuple[str, ...]:
        return self.context.names

    @property
    def new_tokens(self) -> list[str]:
        return self.context.notation.new_tokens(self.context.names)

    def check(self, template: Template) -> None:
        """Refuse a tokenizer that cannot read the rewards.

        Raises:
            ValueError: naming a word.
        """
        known = template.tokenizer.get_vocab()
        if unknown := [word for word in self.new_tokens if word not in known]:
            raise ValueError(
                f"the policy's tokenizer does not know {unknown[0]!r} and {len(unknown) - 1} other words of "
                f"{self.policy}; set model.policy to that folder"
            )

    def drawn(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
        """Each prompt with goals of its own, and a weight of 1 for every reward: all are wanted."""
        equal = dict.fromkeys(self.context.names, 1.0)
        goals = self.context.goals(len(prompts), seed).tolist()
        return [self.context.told(prompt, goal, equal) for prompt, goal in zip(prompts, goals, strict=True)]

    def evaluated(self, prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
        return self.context.under_trade_offs(prompts, self.steps)
