"""How launch's tables, times and sizes look to a person."""

import os
import sys

from rich.console import Console as Terminal

WIDE = 180  # columns of what is no terminal, such as a file


def terminal() -> Terminal:
    """Where tables go: as wide as the terminal, wide where there is none."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    return Terminal(file=sys.stdout, highlight=False, width=width)


def duration(seconds: float) -> str:
    """As a person says it: 45s, 3m05s, 2h10m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, rest_of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours}h{rest_of_hour:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def memory(mib: float) -> str:
    """In the unit that a person asks for."""
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"
