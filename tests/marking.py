"""Which of a slow test's parameters are tried with every commit, and which before a release."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def at_release(values: Iterable[Any], unless: Container[Any]) -> list[Any]:
    """The parameters, marked `long` but for those that show by themselves most of what the others do."""
    return [value if value in unless else pytest.param(value, marks=pytest.mark.long) for value in values]
