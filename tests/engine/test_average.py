"""The moving average of a policy: its recursion, its precision, and that it comes back from a checkpoint."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_lab.engine.average import MovingAverage
from rlhf_lab.engine.models import load_policy
from rlhf_lab.engine.parameters import parameters_of

CPU = torch.device("cpu")


def policy(dtype: str = "float32"):
    return load_policy("embedded:tiny", device=CPU, dtype=dtype, seed=0)


def moved(model, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def test_it_is_the_geometric_mean_of_what_was():
    model, decay = policy(), 0.9
    average = MovingAverage(model, decay)
    name, first = next(iter(parameters_of(model).items()))
    history = [first.detach().clone()]
    for factor in (1.5, 0.5, 2.0):
        moved(model, factor)
        average.update(model)
        history.append(parameters_of(model)[name].detach().clone())
    expected = decay**3 * history[0] + sum((1 - decay) * decay ** (3 - k) * history[k] for k in (1, 2, 3))
    assert_close(parameters_of(average.model)[name], expected)


def test_it_follows_a_bfloat16_policy_that_moves_by_less_than_bfloat16_can_add():
    """Each update adds 1e-4 of a weight, of which bfloat16 knows 1 / 256: there it would stand still."""
    model = policy("bfloat16")
    average = MovingAverage(model, 0.99)
    start = {name: value.clone() for name, value in parameters_of(average.model).items()}
    moved(model, 1.0 + 2**-6)  # 1.6 %: what bfloat16 can hold
    for _ in range(3):
        average.update(model)
    for name, value in parameters_of(average.model).items():
        target = parameters_of(model)[name].float()
        assert value.dtype == torch.float32
        assert_close(value - start[name], (1 - 0.99**3) * (target - start[name]), rtol=1e-2, atol=1e-7)
    coarse = next(iter(start.values())).bfloat16()
    assert torch.equal(coarse.lerp(coarse * (1 + 2**-6), 0.01), coarse)  # what it would have been


def test_the_policy_does_not_move_with_it_nor_learn_through_it():
    model = policy()
    average = MovingAverage(model, 0.5)
    before = {name: value.clone() for name, value in parameters_of(model).items()}
    moved(average.model, 3.0)
    average.update(model)
    assert all(torch.equal(value, before[name]) for name, value in parameters_of(model).items())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_decay_it_is_the_policy_itself():
    model = policy()
    average = MovingAverage(model, 0.0)
    average.update(model)
    assert average.model is model
    assert average.state_dict() == {}


def test_it_comes_back_from_a_checkpoint():
    model = policy()
    average = MovingAverage(model, 0.9)
    moved(model, 2.0)
    average.update(model)
    again = MovingAverage(policy(), 0.9)
    again.load_state_dict({name: value.clone() for name, value in average.state_dict().items()})
    for other in (average, again):
        other.update(model)
    assert_close(average.state_dict(), again.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="other parameters"):
        again.load_state_dict({})
