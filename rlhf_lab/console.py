"""What a person sees while a run runs: progress with rates and time left, sample tables, loud warnings, a summary."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console as Terminal
from rich.markup import escape
from rich.table import Table

SHOWN = {
    "gold/helpfulness/mean": "gold",
    "objective/scores": "reward",
    "cost/cost/mean": "cost",
    "lagrange/cost/lambda": "λ",
    "objective/kl": "kl",
    "completions/mean_length": "length",
    "throughput/step": "tokens/s",
    "memory/peak": "MiB",
    "loss/nll": "nll",
    "loss/pairwise": "pairwise",
    "accuracy": "accuracy",
    "accuracy_sign": "sign accuracy",
}
SECONDS_BETWEEN_LINES = 5.0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Console:
    """Plain lines, so that a log file reads like the terminal did; one line every few seconds while work goes on."""

    def __init__(self) -> None:
        silent = os.environ.get("RANK", "0") != "0"  # of several processes of one run, the first one speaks
        self._terminal = Terminal(file=sys.stdout, soft_wrap=True, highlight=False, quiet=silent)

    def say(self, message: str) -> None:
        self._terminal.print(escape(message))

    def warn(self, message: str) -> None:
        self._terminal.print(f"[bold yellow]WARNING[/] {escape(message)}")

    def steps(self, what: str, first: int, total: int, latest: Mapping[str, float]) -> Iterator[int]:
        """Count from `first` to `total - 1`, saying how far, how fast, what `latest` holds and how long it still takes.

        Args:
            latest: the metrics of the last step; the caller keeps it up to date.
        """
        begun = said = time.monotonic()
        for step in range(first, total):
            yield step
            now, done = time.monotonic(), step + 1 - first
            if now - said >= SECONDS_BETWEEN_LINES or step + 1 == total:
                said = now
                pace = (now - begun) / done
                rate = f"{1 / pace:.1f}/s" if pace < 1 else f"{pace:.1f}s each"
                values = headline(latest).replace(",", "")
                left = f"{_duration(pace * (total - step - 1))} left" if step + 1 < total else _duration(now - begun)
                self.say("  " + " · ".join(filter(None, (f"{what} {step + 1}/{total}", rate, values, left))))

    def samples(self, title: str, rows: Sequence[Mapping[str, object]]) -> None:
        """A table of sample responses; numbers are rounded, text is shown as the model wrote it."""
        if not rows:
            return
        table = Table(title=title, show_lines=True)
        for column in rows[0]:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else escape(str(cell)) for cell in row.values()))
        self._terminal.print(table)

    def summary(self, lines: Mapping[str, str]) -> None:
        """The last thing a run says: what came out and where it lies."""
        width = max(map(len, lines))
        for what, value in lines.items():
            self._terminal.print(f"  [bold]{what:<{width}}[/]  {escape(value)}")


def headline(metrics: Mapping[str, float]) -> str:
    """The metrics that a person asks for first, on one line."""
    return ", ".join(f"{short} {_short(metrics[name])}" for name, short in SHOWN.items() if name in metrics)


def _short(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
