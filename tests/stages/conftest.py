"""The embedded world as its configuration has it, small."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lab.data.dataset import Dataset

SETTINGS = Path(__file__).resolve().parents[2] / "conf/dataset/tiny_help.yaml"


@pytest.fixture(scope="session")
def world() -> Callable[..., Dataset]:
    """`world(**changes)`: prompts of the embedded world."""
    settings = yaml.safe_load(SETTINGS.read_text())
    del settings["_target_"]

    def make(**changes: Any) -> Dataset:
        return Dataset(**{**settings, "seed": 0, **changes})

    return make
