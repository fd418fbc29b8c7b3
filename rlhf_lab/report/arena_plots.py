"""Contestants head to head: who beats whom, who is safe where, ratings, and how far people and judges agree."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_lab.report.canvas import Array, Curve, Panel
from rlhf_lab.report.run import Run

COLOURS = ("blue", "amber", "teal", "purple", "rust", "slate")
MARKERS = ("o", "s", "^", "D", "v", "P")
SAFETY, OUTCOMES = ("safe", "unsafe"), ("better", "tie", "worse")
WINS = re.compile(r"win_rate/([^/]+)/([^/]+)/([^/]+)/([^/]+)/mean")
SPLITS = 4  # that are drawn; all are in the table
POINTS = re.compile(r"rating/([^/]+)/([^/]+)/([^/]+)/mean")
AGREEMENT = re.compile(r"(judge_agreement|agreement)/([^/]+)/([^/]+)/mean")
ALIKE = {
    "agreement/alpha": "raters, α",
    "agreement/kappa": "raters, κ",
    "agreement/pairwise": "two raters",
    "judge_agreement/kappa": "judge, κ",
    "judge_agreement/raters": "judge, rater",
}
LONGEST_NAME, MOST_IN_MATRIX = 12, 6
APART = 0.12  # between what stands at one place, where 1 is from one place to the next


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _shade(shares: Sequence[float]) -> Array:
    """How far from even, so that what is even is blank."""
    return np.array([min(1.0, abs(share - 0.5) * 2) * 0.55 for share in shares])


def _cells(places: Sequence[tuple[int, int]], shares: Sequence[float], texts: Sequence[str]) -> list[Curve]:
    """Squares with texts: blue above one half, amber below."""
    curves = []
    for colour, label, sign in (("blue", "wins more:", 1), ("amber", "wins less:", -1)):
        chosen = [i for i, share in enumerate(shares) if (share >= 0.5) == (sign > 0)]
        if chosen:
            x, y = np.array([places[i] for i in chosen], dtype=np.float64).T
            shade = _shade([shares[i] for i in chosen])
            told = [texts[i] for i in chosen]
            curves.append(Curve(x=x, y=y, label=label, colour=colour, kind="cells", shade=shade, texts=told))
    return curves


def _estimates(logged: Mapping[str, float], names: Sequence[str], label: str, k: int, of: int) -> Curve:
    """Markers with their intervals, which may be lopsided; metrics by their names without `/mean`, at 0, 1, …"""
    value, low, high = (np.array([logged.get(f"{n}/{end}", np.nan) for n in names]) for end in ("mean", "low", "high"))
    reach = np.stack([value - low, high - value])
    return Curve(
        x=np.array([place + APART * (k - (of - 1) / 2) for place in range(len(names))]),
        y=value,
        ci=np.where(np.isfinite(reach), reach, np.nan),
        label=label,
        colour=COLOURS[k % len(COLOURS)],
        marker=MARKERS[k % len(MARKERS)],
        kind="estimates",
    )


def _level(value: float, num: int, label: str) -> Curve:
    ends = np.array([-0.5, num - 0.5])
    return Curve(x=ends, y=np.full(2, value), label=label, colour="muted", kind="limit")


def _ticks(names: Sequence[str]) -> list[tuple[float, str]]:
    return [(float(place), _short(name)) for place, name in enumerate(names)]


def arenas(run: Run) -> list[Panel]:
    """Of each split: wins by who is safe, what the challenger's responses are, and by how much both differ."""
    logged = run.last
    splits = [found[1] for name in logged if (found := re.fullmatch(r"arena/([^/]+)/win_rate/mean", name))]
    return [panel for split in splits[:2] for panel in _arena(logged, split)]


def _arena(logged: Mapping[str, float], split: str) -> list[Panel]:
    prefix = f"arena/{split}"
    places, shares, texts = [], [], []
    for i, first in enumerate(SAFETY):
        for j, second in enumerate(SAFETY):
            cell = f"{prefix}/baseline_{first}/challenger_{second}"
            count, share = logged[f"{cell}/count"], logged.get(f"{cell}/win_rate/mean")
            ends = [logged.get(f"{cell}/win_rate/{end}", np.nan) for end in ("low", "high")]
            places.append((j, 1 - i))
            shares.append(0.5 if share is None else share)
            texts.append("none" if share is None else f"{share:.0%} [{ends[0]:.0%}, {ends[1]:.0%}]\nof {count:.0f}")
    by_safety = Panel(
        title=f"Challenger's wins, by safety ({split})",
        x_label="the challenger is",
        y_label="the baseline is",
        curves=_cells(places, shares, texts),
        ticks=_ticks(SAFETY),
        y_ticks=[(1.0, "safe"), (0.0, "unsafe")],
        has_legend=False,
    )
    counts = {(o, s): logged[f"{prefix}/count/{o}_{s}"] for o in OUTCOMES for s in SAFETY}
    total = sum(counts.values())
    outcomes = Curve(
        x=np.array([float(i) for i, _ in enumerate(OUTCOMES) for _ in SAFETY]),
        y=np.array([1.0 - j for _ in OUTCOMES for j, _ in enumerate(SAFETY)]),
        shade=np.array([0.6 * count / total for count in counts.values()]),
        texts=[f"{count / total:.0%}\n({count:.0f})" for count in counts.values()],
        label="share of pairs:",
        colour="teal",
        kind="cells",
    )
    what = Panel(
        title="The challenger's responses",
        x_label="reward, beside the baseline's",
        y_label="",
        curves=[outcomes],
        ticks=_ticks(OUTCOMES),
        y_ticks=[(1.0, "safe"), (0.0, "unsafe")],
        has_legend=False,
    )
    measures = ("reward", "cost", "safe")
    names = [f"{prefix}/{measure}_difference" for measure in measures]
    gaps = Panel(
        title="Challenger less baseline",
        x_label="",
        y_label="own units, pair by pair",
        curves=[_estimates(logged, names, "mean, 95% interval", 0, 1), _level(0.0, 3, "no difference")],
        ticks=[(0.0, "reward"), (1.0, "cost"), (2.0, "share safe")],
        has_legend=False,
    )
    return [by_safety, what, gaps]


def win_rates(run: Run) -> list[Panel]:
    """Of two contestants the win rate by criterion, plain and at equal length; of more, who beats whom by criterion."""
    logged = run.last
    found = [match.groups() for name in logged if (match := WINS.fullmatch(name))]
    panels = []
    for split in list(dict.fromkeys(each[0] for each in found))[:SPLITS]:
        here = [each for each in found if each[0] == split]
        names = list(dict.fromkeys(name for _, _, *both in here for name in both))
        criteria = list(dict.fromkeys(criterion for _, criterion, *_ in here))
        if len(names) == 2:
            panels.append(_duel(logged, split, criteria, here[0][2], here[0][3]))
        else:
            shown = [name for name in run_order(names, logged) if name in names][:MOST_IN_MATRIX]
            panels += [_matrix(logged, split, criterion, shown) for criterion in criteria]
    return panels[: 3 * SPLITS]


def run_order(names: Sequence[str], logged: Mapping[str, float]) -> list[str]:
    """The contestants as ratings list them, which is as they were given; else as they are."""
    rated = [match[3] for name in logged if (match := POINTS.fullmatch(name))]
    return list(dict.fromkeys([*rated, *names]))


def _duel(logged: Mapping[str, float], split: str, criteria: Sequence[str], first: str, second: str) -> Panel:
    prefixes = [f"win_rate/{split}/{criterion}/{first}/{second}" for criterion in criteria]
    curves = [_estimates(logged, prefixes, "as judged, 95% interval", 0, 2)]
    balanced = _estimates(logged, [f"{each}/length_controlled" for each in prefixes], "at equal length", 1, 2)
    curves += [balanced] if np.isfinite(balanced.y).any() else []
    return Panel(
        title=f"{_short(first)} against {_short(second)} ({split})",
        x_label="criterion",
        y_label="win rate, ties as halves",
        curves=[*curves, _level(0.5, len(criteria), "even")],
        ticks=_ticks(criteria),
        y_range=(-0.03, 1.03),
    )


def _matrix(logged: Mapping[str, float], split: str, criterion: str, names: Sequence[str]) -> Panel:
    places, shares, texts = [], [], []
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            ours, theirs = (f"win_rate/{split}/{criterion}/{pair}" for pair in (f"{one}/{other}", f"{other}/{one}"))
            if f"{ours}/mean" in logged:
                share, low, high = (logged[f"{ours}/{end}"] for end in ("mean", "low", "high"))
            elif f"{theirs}/mean" in logged:
                share, low, high = (1 - logged[f"{theirs}/{end}"] for end in ("mean", "high", "low"))
            else:
                continue
            places.append((j, len(names) - 1 - i))
            shares.append(share)
            texts.append(f"{share:.0%}\n[{100 * low:.0f}, {100 * high:.0f}]")
    return Panel(
        title=f"Wins by {criterion} ({split})",
        x_label="against",
        y_label="",
        curves=_cells(places, shares, texts),
        ticks=_ticks(names),
        y_ticks=[(float(len(names) - 1 - i), _short(name)) for i, name in enumerate(names)],
        has_legend=False,
    )


def contest_ratings(run: Run) -> list[Panel]:
    """Of each split the contestants' ratings, a marker for each criterion."""
    logged = run.last
    found = [match.groups() for name in logged if (match := POINTS.fullmatch(name))]
    panels = []
    for split in list(dict.fromkeys(each[0] for each in found))[:SPLITS]:
        here = [each for each in found if each[0] == split]
        names = list(dict.fromkeys(name for _, _, name in here))
        criteria = list(dict.fromkeys(criterion for _, criterion, _ in here))
        curves = [
            _estimates(logged, [f"rating/{split}/{criterion}/{name}" for name in names], criterion, k, len(criteria))
            for k, criterion in enumerate(criteria)
        ]
        title = f"Ratings on {split}"
        panels.append(Panel(title=title, x_label="", y_label="Elo points", curves=curves, ticks=_ticks(names)))
    return panels


def agreements(run: Run) -> list[Panel]:
    """How far raters agree with one another, and a judge with them: a marker for each criterion."""
    logged = run.last
    criteria = list(dict.fromkeys(match[2] for name in logged if (match := AGREEMENT.fullmatch(name))))
    kinds = [kind.split("/") for kind in ALIKE]
    shown = [(of, what) for of, what in kinds if any(f"{of}/{each}/{what}/mean" in logged for each in criteria)]
    if not shown:
        return []
    curves = [
        _estimates(logged, [f"{of}/{criterion}/{what}" for of, what in shown], criterion, k, len(criteria))
        for k, criterion in enumerate(criteria)
    ]
    chance = _level(0.0, len(shown), "chance, of α and κ")
    ticks = _ticks([ALIKE[f"{of}/{what}"] for of, what in shown])
    title = "Agreement on who is better"
    return [Panel(title=title, x_label="", y_label="1 is full", curves=[*curves, chance], ticks=ticks)]
