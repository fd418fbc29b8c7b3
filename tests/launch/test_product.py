"""What a person may combine on the command line: every pair of options of the groups that meet in an on-policy run."""

from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import pytest

from rlhf_lab.launch.compose import Plan

GROUPS: dict[str, tuple[str, ...]] = {
    "algorithm": ("ppo", "ppo_lag", "reinforce", "rloo", "grpo"),
    "objective": ("helpful", "shaped", "morlhf", "worst_case", "chebyshev"),
    "reward_ensemble": ("single", "mean", "wco", "uwo", "probit_lcb"),
    "constraint": ("mean_cost", "ci_cost", "two_costs"),
    "bound": ("mean", "student_t", "hoeffding", "empirical_bernstein", "bootstrap", "clopper_pearson"),
    "dual": ("log_ascent", "pid", "fixed"),
    "kl": ("fixed", "adaptive", "in_loss", "chi2"),
}
WITH_RANGE = ("hoeffding", "empirical_bernstein")


def covering() -> list[dict[str, str]]:
    """Few rows in which every pair of options of two groups stands together (greedy)."""
    names = list(GROUPS)
    missing = {((a, x), (b, y)) for a, b in combinations(names, 2) for x, y in product(GROUPS[a], GROUPS[b])}
    rows = []
    while missing:
        (a, x), (b, y) = min(missing)
        row = {a: x, b: y}
        for name in names:
            if name not in row:
                row[name] = max(
                    GROUPS[name],
                    key=lambda option, name=name: sum(
                        tuple(sorted([(name, option), pair], key=lambda each: names.index(each[0]))) in missing
                        for pair in row.items()
                    ),
                )
        missing -= set(combinations([(name, row[name]) for name in names], 2))
        rows.append({name: row[name] for name in names})
    return rows


def typed(row: dict[str, str]) -> list[str]:
    """What a person types for these choices; PPO has no constraint, and so no bound and no dual."""
    free = row["algorithm"] == "ppo"
    words = [
        f"{group}={option}" for group, option in row.items() if not (free and group in ("constraint", "bound", "dual"))
    ]
    words.insert(0, "reward=two")
    if not free and row["bound"] in WITH_RANGE:
        words += ["bound.low=-20", "bound.high=20"]
    if not free and row["bound"] == "clopper_pearson":
        words += ["constraint.cost.limit=0.1", "constraint.cost.margin=0"]
        words += ["constraint.length.limit=0.1"] if row["constraint"] == "two_costs" else []
    return words


def test_the_rows_cover_every_pair():
    pairs = {pair for row in covering() for pair in combinations(row.items(), 2)}
    wanted = sum(len(GROUPS[a]) * len(GROUPS[b]) for a, b in combinations(GROUPS, 2))
    assert len(pairs) == wanted


@pytest.mark.parametrize("row", covering(), ids=lambda row: "-".join(row.values()))
def test_every_pair_of_options_composes(row: dict[str, str], plan_of: Callable[..., Plan], untouched: Path):
    plan = plan_of(*typed(row), f"runs_dir={untouched}")
    assert plan.config["stage"]["_target_"] == "rlhf_lab.stages.train_online.TrainOnline"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["algorithm=ppo", "constraint=mean_cost"], "does not read constraint"),
        (["algorithm=dpo", "objective=morlhf"], "does not read objective"),
        (["algorithm=sft", "reward=two"], "does not read reward"),
        (["algorithm=rloo", "bound=student_t"], "does not read bound"),
    ],
)
def test_a_choice_that_would_do_nothing_is_refused(words: list[str], reason: str, plan_of: Callable[..., Plan]):
    with pytest.raises(ValueError, match=reason):
        plan_of(*words)
