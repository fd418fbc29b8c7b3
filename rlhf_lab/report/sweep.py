"""A sweep as one page: every run compared, pictures on it, nothing loaded from anywhere, readable without scripts."""

import base64
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_lab.report.canvas import DARK, LIGHT
from rlhf_lab.report.page import Picture, data_uri, replace, templates
from rlhf_lab.report.sweep_export import export
from rlhf_lab.report.sweep_figures import SweepFigure, figures
from rlhf_lab.report.sweep_runs import SweepRuns, read_sweep
from rlhf_lab.report.sweep_tables import FactorTables, by_combination, by_factor, final, p_spelled
from rlhf_lab.report.sweep_values import Values, read_values

DPI = 130
MANY_ROWS = 12  # beyond these a table scrolls in a box of its own
MOST_FINDINGS = 12
MOST_ENDS = 4
SHOWN_METRICS = 5  # in the list of runs
SCRIPT = Path(__file__).with_name("sweep.js")


def build_sweep_report(root: Path) -> Path:
    """Write `report.html`, `plots/*.png`, `metrics.csv`, `metrics.parquet` and `runs.csv` into a sweep's directory.

    From sweep.json and the runs' directories alone, whatever state the runs are in. Each file replaces its former self
    at once.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no sweep in that directory.
    """
    values = read_values(read_sweep(root))
    export(values)
    found = figures(values)
    pictures = [draw(figure, root) for figure in found]
    for stale in (root / "plots").glob("*.png"):  # of what the sweep was before runs were added
        if stale.stem not in {figure.name for figure in found}:
            stale.unlink()
    if not found:
        shutil.rmtree(root / "plots", ignore_errors=True)
    page = root / "report.html"
    replace(page, render(values, pictures).encode())
    return page


def draw(figure: SweepFigure, root: Path) -> Picture:
    light = figure.draw(LIGHT, DPI)
    replace(root / "plots" / f"{figure.name}.png", light)
    return Picture(
        name=figure.name,
        title=figure.title,
        caption=figure.caption,
        alt=figure.alt,
        light=data_uri(light),
        dark=data_uri(figure.draw(DARK, DPI)),
        num_panels=figure.num_panels,
    )


def render(values: Values, pictures: Sequence[Picture]) -> str:
    sweep, script = values.sweep, SCRIPT.read_text()
    factors = by_factor(values)
    environment = templates()
    environment.filters |= {"p": p_spelled}
    return environment.get_template("sweep.html.j2").render(
        sweep=sweep,
        values=values,
        headline=headline(sweep),
        findings=findings(factors),
        lost=lost(sweep),
        basis=basis(values),
        combinations={split: by_combination(values, split) for split in values.metrics},
        factors=factors,
        pictures=pictures,
        many=MANY_ROWS,
        shown=values.headline[:SHOWN_METRICS],
        final=lambda member, metric: final(values, member, metric),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def headline(sweep: SweepRuns) -> str:
    """What was compared, over how many seeds, and how far it is."""
    varied = [f"{sweep.short_names[factor]} ({listed(levels)})" for factor, levels in sweep.factors.items()]
    seeds = [plural(len(levels), key.replace("_", " ")) for key, levels in sweep.seeds.items()]
    states = ", ".join(f"{count} {state}" for state, count in sweep.states.items())
    return f"{' × '.join([*varied, *seeds]) or plural(len(sweep.members), 'run')}: {states or 'no runs'}"


def listed(levels: Sequence[str]) -> str:
    """Up to four values, and how many there are if there are more."""
    return ", ".join(levels) if len(levels) <= 4 else f"{', '.join(levels[:3])}, … {len(levels)} values"


def findings(factors: Sequence[FactorTables]) -> list[str]:
    """One line for each comparison that is resolved and has a better side, and one that counts the others."""
    said, others = [], 0
    for table in factors:
        for pair in table.pairs:
            if pair.verdict in ("better", "worse"):
                said.append(
                    f"{pair.level} is {pair.verdict} than {table.baseline} in {pair.metric.label}: {pair.mean} "
                    f"({pair.count} pairs)"
                )
            elif pair.metric.better:
                others += 1
    more = said[MOST_FINDINGS:]
    said = said[:MOST_FINDINGS]
    if more:
        said.append(f"{plural(len(more), 'comparison')} more resolved, below.")
    if others:
        said.append(f"{plural(others, 'comparison')} of scores, costs, losses or accuracies not resolved.")
    return said


def lost(sweep: SweepRuns) -> Mapping[str, int]:
    """Combination -> how many of its runs failed: their seeds are missing from its means."""
    failed = {
        sweep.label(combination): sum(member.state in ("failed", "unreadable") for member in members)
        for combination, members in sweep.combinations.items()
    }
    return {label: count for label, count in failed.items() if count}


def basis(values: Values) -> str:
    """Where, and of which runs, the numbers of the page are taken."""
    sweep = values.sweep
    if not sweep.counted:
        return "No run has logged anything yet."
    if sweep.is_provisional:
        where = "at their last evaluation, which is not the same for all"
        if values.at_step is not None:
            where = f"at step {values.at_step}, the last that all of them have"
        return f"Provisional: no run is finished. {plural(len(sweep.counted), 'run')} compared {where}."
    others = len(sweep.members) - len(sweep.counted)
    said = f"{plural(len(sweep.counted), 'finished run')} compared at the last evaluation of each"
    said += f"; the other {others} are not in any mean." if others else "."
    if len(values.ends) > 1:
        ends = ", ".join(f"{plural(count, 'run')} at step {step}" for step, count in values.ends.items())
        if len(values.ends) > MOST_ENDS:
            ends = f"{len(values.ends)} different ones, from {min(values.ends)} to {max(values.ends)}"
        said += f" They did not end at the same step ({ends}): what differs may be how long they ran."
    return said
