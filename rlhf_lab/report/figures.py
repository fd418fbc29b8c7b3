"""The figures of the page: which panels, under which heading, and how to read them."""

from collections.abc import Callable
from dataclasses import dataclass

from rlhf_lab.report.arena_plots import agreements, arenas, contest_ratings, win_rates
from rlhf_lab.report.benchmark_plots import benchmarks
from rlhf_lab.report.best_of_n_plots import best_of_n_ensembles
from rlhf_lab.report.canvas import Panel
from rlhf_lab.report.diversity_plots import across_inputs, per_input
from rlhf_lab.report.generalisation_plots import scores_and_gaps, side_by_side
from rlhf_lab.report.overoptimisation_plots import at_equal_kl
from rlhf_lab.report.pareto_plots import fronts
from rlhf_lab.report.plots import (
    best_of_n,
    by_split,
    cost_against_limit,
    diagnostics,
    divergence,
    divergence_estimates,
    ensembles,
    gold,
    learning,
    lengths,
    multipliers,
    overoptimisation,
    overshoot,
    overview,
    rewards,
    soups,
    trade_offs,
    violations,
)
from rlhf_lab.report.run import Run
from rlhf_lab.report.value_model_plots import accuracies, value_models
from rlhf_lab.report.verdict_plots import verdicts


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """One figure of the report.

    Args:
        name: of its file, without `.png`.
        title: heading on the page.
        caption: how to read it.
        panels: what it shows of a run; nothing when the run has no such series.
    """

    name: str
    title: str
    caption: str
    panels: Callable[[Run], list[Panel]]


OVERVIEW = FigureSpec(
    name="overview",
    title="The run at a glance",
    caption="Lines are training, markers are held-out prompts with 95% intervals where they were logged.",
    panels=lambda run: accuracies(run) or scores_and_gaps(run)[:6] or benchmarks(run)[:6] or overview(run),
)
FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec(
        name="reward",
        title="Reward",
        caption="Left, each reward model in its own units; right, what the policy is trained on.",
        panels=rewards,
    ),
    FigureSpec(
        name="gold",
        title="Gold scores",
        caption="The true scores of the world, which no model of this run was shown. More is better.",
        panels=gold,
    ),
    FigureSpec(
        name="cost",
        title="Cost against its limit",
        caption="Less is better. The limit is in the units of the cost model, the one that is priced.",
        panels=lambda run: cost_against_limit(run) + violations(run),
    ),
    FigureSpec(
        name="lambda",
        title="The price of the cost",
        caption="λ rises while the cost is above its limit and falls below; red shade means that it sat at its cap.",
        panels=lambda run: multipliers(run) + overshoot(run),
    ),
    FigureSpec(
        name="kl",
        title="Distance from the reference",
        caption="The penalised estimate, the three estimators, and the coefficient.",
        panels=lambda run: divergence(run) + divergence_estimates(run),
    ),
    FigureSpec(
        name="proxy_gold_gap",
        title="Proxy and gold against √KL",
        caption="Gain since the first evaluation. Where the proxy climbs and gold does not, the reward model is being "
        "gamed; upright strokes are the gap.",
        panels=overoptimisation,
    ),
    FigureSpec(
        name="best_of_n",
        title="Best of n",
        caption="Unbiased, with 95% intervals over prompts. Where the proxy climbs and gold does not, choosing "
        "harder no longer pays.",
        panels=best_of_n,
    ),
    FigureSpec(
        name="value_models",
        title="Value models on held-out pairs",
        caption="95% intervals over prompts. On the dashed diagonal a model is as sure as it is right.",
        panels=value_models,
    ),
    FigureSpec(
        name="generalisation",
        title="In and out of distribution",
        caption="95% intervals over prompts, or over runs where a method has several. Above the dashed line a method "
        "scores more in distribution than on that split.",
        panels=scores_and_gaps,
    ),
    FigureSpec(
        name="best_of_n_ensembles",
        title="Best of n by single reward models and by ensembles",
        caption="Each line chooses by its own scores. Thin lines are the members alone, and `single` their average; "
        "shade is the 95% interval from resampling prompts, of differences where it stands beside a single model.",
        panels=best_of_n_ensembles,
    ),
    FigureSpec(
        name="overoptimisation",
        title="Over-optimisation at equal KL",
        caption="Means over seeds, where every seed came so far, with 95% t intervals over seeds as shade; the "
        "difference is seed by seed. Dashed: best of n, at its own KL.",
        panels=at_equal_kl,
    ),
    FigureSpec(
        name="benchmarks",
        title="Standard benchmarks",
        caption="95% intervals over questions, where the harness knows them.",
        panels=benchmarks,
    ),
    FigureSpec(
        name="soups",
        title="Soups",
        caption="Each marker is a policy mixed by weights; the dashed line is what taking some responses from each "
        "single policy would give.",
        panels=soups,
    ),
    FigureSpec(
        name="trade_offs",
        title="Preferences told as rewards",
        caption="Each marker is one preference on the held-out prompts, in standard deviations of the data. On the "
        "dashed line a policy obtains what it is asked for.",
        panels=trade_offs,
    ),
    FigureSpec(
        name="fronts",
        title="Fronts",
        caption="Each marker is one preference, with 95% intervals over prompts; the thin line joins those that no "
        "other of the same method beats in everything. Of hypervolume more is better.",
        panels=fronts,
    ),
    FigureSpec(
        name="diversity_per_input",
        title="Diversity of the responses to one prompt",
        caption="Means over prompts with 95% bootstrap intervals. Equal length means cut to as many words; of the best "
        "of n, compare with as many single ones.",
        panels=per_input,
    ),
    FigureSpec(
        name="diversity_across_inputs",
        title="Diversity of responses to many prompts",
        caption="One set of responses, with the 95% interval that leaving out groups of prompts gives.",
        panels=across_inputs,
    ),
    FigureSpec(
        name="arena",
        title="Arena: reward and cost",
        caption="The challenger beside the baseline on the same prompts, ties as halves, with 95% intervals over "
        "prompts. Blue cells: the challenger wins more; amber: the baseline does.",
        panels=arenas,
    ),
    FigureSpec(
        name="win_rates",
        title="Win rates",
        caption="Ties as halves, with 95% intervals over prompts. In a matrix each row plays against each column: blue "
        "wins more than it loses, amber less.",
        panels=win_rates,
    ),
    FigureSpec(
        name="ratings",
        title="Ratings",
        caption="Bradley–Terry strengths on Elo's scale with 95% bootstrap intervals over prompts; 400 points are odds "
        "of ten to one. The anchor has its rating by declaration.",
        panels=contest_ratings,
    ),
    FigureSpec(
        name="agreement",
        title="People and judges",
        caption="How far raters agree with one another, and the judge with them; 95% intervals over prompts.",
        panels=agreements,
    ),
    FigureSpec(
        name="verdicts",
        title="The judge",
        caption="With 95% intervals over prompts. A judge whom the order sways is seen in all three panels: what it is "
        "shown first wins, its orders disagree, and where they do, both together are a tie.",
        panels=verdicts,
    ),
    FigureSpec(
        name="ensemble",
        title="Reward-model ensemble",
        caption="Disagreement that grows means that the policy has left what the members were trained on.",
        panels=ensembles,
    ),
    FigureSpec(
        name="lengths",
        title="Length and truncation",
        caption="Reward that grows only with length shows here first.",
        panels=lengths,
    ),
    FigureSpec(
        name="diagnostics",
        title="Losses and diagnostics",
        caption="Ratio near 1, few clipped tokens and an entropy that does not collapse are healthy.",
        panels=diagnostics,
    ),
    FigureSpec(
        name="learning",
        title="Loss and accuracy",
        caption="Training as a line, held-out splits as markers.",
        panels=learning,
    ),
    FigureSpec(
        name="held_out",
        title="Held-out scores by split",
        caption="One line per split; splits are never averaged together.",
        panels=lambda run: side_by_side(run) if len(run.metrics) == 1 else by_split(run),
    ),
)
