"""One run as one page: pictures beside it, nothing loaded from anywhere, readable without scripts."""

import base64
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_lab.report.canvas import DARK, LIGHT, Panel, in_words, png
from rlhf_lab.report.data_tables import DataTable, data_tables
from rlhf_lab.report.figures import FIGURES, OVERVIEW, FigureSpec
from rlhf_lab.report.headline import verdict
from rlhf_lab.report.run import Run, Sample, read_run
from rlhf_lab.report.summary import (
    comparisons,
    duration,
    judge_name,
    memory,
    not_finite,
    number,
    short,
    signed,
    tables,
    timings,
)

LONGEST_TEXT = 4000  # characters of a prompt or response on the page; the whole is in samples/
DPI = 150


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn figure, ready for the page: two data URIs and the words that stand for it."""

    name: str
    title: str
    caption: str
    alt: str
    light: str
    dark: str
    num_panels: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one response got: each score with its members, the gold scores, the KL."""

    name: str
    value: float
    members: Sequence[float]


def build_report(run_dir: Path) -> Path:
    """Draw `plots/*.png` and write `report.html` into a run directory, from its files alone.

    The run may be finished, unfinished or failed; a figure whose metrics were not logged is left out. Each file
    replaces its former self at once, so a reader never sees half of it.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: one of its files is malformed; the message names file and line.
    """
    run = read_run(run_dir)
    pictures = [draw(spec, panels, run_dir) for spec in (OVERVIEW, *FIGURES) if (panels := spec.panels(run))]
    page = run_dir / "report.html"
    replace(page, render(run, pictures, data_tables(run_dir)).encode())
    return page


def draw(spec: FigureSpec, panels: Sequence[Panel], run_dir: Path) -> Picture:
    light = png(panels, LIGHT, DPI)
    replace(run_dir / "plots" / f"{spec.name}.png", light)
    return Picture(
        name=spec.name,
        title=spec.title,
        caption=spec.caption,
        alt=in_words(panels),
        light=data_uri(light),
        dark=data_uri(png(panels, DARK, DPI)),
        num_panels=len(panels),
    )


def data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def replace(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same directory, then rename."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def render(run: Run, pictures: Sequence[Picture], data: Sequence[DataTable] = ()) -> str:
    limits = {cost: run.limit(cost) for cost in run.costs if math.isfinite(run.limit(cost))}
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            run=run,
            verdict=verdict(run),
            tables=tables(run),
            limits=limits,
            pictures=pictures,
            data=data,
            comparisons=comparisons(run),
            judge=judge_name(run),
            verdicts=verdicts,
            timings=timings(run),
            not_finite=not_finite(run),
            provenance=provenance(run.environment),
        )
    )


def templates() -> Environment:
    # autoescape: prompts and responses are whatever a model wrote
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "duration": duration,
        "memory": memory,
        "clipped": clipped,
        "short": short,
    }
    return environment


def verdicts(sample: Sample) -> Sequence[Verdict]:
    """What is said of a response, gold first; ensembles carry their members' scores beside the aggregate."""
    gold = [Verdict(name=f"gold {name}", value=value, members=()) for name, value in sample.gold.items()]
    names = dict.fromkeys([*sample.scores, *sample.members])
    proxies = [
        Verdict(name=name, value=sample.scores.get(name, math.nan), members=sample.members.get(name, ()))
        for name in names
    ]
    return [*gold, *proxies, Verdict(name="KL", value=sample.kl, members=())]


def clipped(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … [{len(text) - LONGEST_TEXT:,} more characters in samples/]"


def provenance(environment: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parts of environment.json that belong on a page. A list of what is shown, so that nothing else ever is."""
    git = environment.get("git") or {}
    command = environment.get("command", "")
    return {
        "command": command if isinstance(command, str) else shlex.join(map(str, command)),
        "sha": git.get("sha") or "",
        "dirty": bool(git.get("dirty")),
        "host": environment.get("host", ""),
        "python": environment.get("python", ""),
        "packages": environment.get("packages") or {},
        "artifacts": environment.get("artifacts") or {},
    }
