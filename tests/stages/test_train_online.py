"""What a run on own samples says of the scores that it holds below a limit."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf_lab.run import Run
from rlhf_lab.stages.train_online import TrainOnline


@pytest.mark.parametrize(("units", "said"), [("none", "is raw"), ("standardised", "mean of its reference set")])
def test_a_limit_on_a_cost_without_a_known_zero_is_warned_of(units: str, said: str):
    warned: list[str] = []
    run = SimpleNamespace(warn=lambda step, message: warned.append(message))
    rewards = {"cost": SimpleNamespace(units=units), "helpful": SimpleNamespace(units=units), "length": object()}

    def warn(*constrained: str) -> list[str]:
        warned.clear()
        stage = SimpleNamespace(rewards=rewards, algorithm=SimpleNamespace(constraints=dict.fromkeys(constrained)))
        TrainOnline._warn_of_units(cast(Any, stage), cast(Run, run))
        return list(warned)

    [message] = warn("cost", "length")
    assert message.startswith("the cost 'cost'")
    assert said in message
    assert warn("length") == []
    assert warn() == []
    rewards["cost"].units = "gold"
    assert warn("cost") == []
