"""The Learner against gradients written out by hand, whole batches at once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_lab.data.tokenise import join, pad
from rlhf_lab.engine.checkpoint import load_tree, save_tree
from rlhf_lab.engine.distribution import Whole
from rlhf_lab.engine.forward import policy_forward
from rlhf_lab.engine.learner import Learner, Part, minibatch_count
from rlhf_lab.engine.models import load_policy
from rlhf_lab.types import Batch, PolicyForward, Sequences, Term, TextBatch

close = partial(assert_close, atol=1e-6, rtol=1e-6)
ROWS, WIDTH = 16, 7


@dataclass(frozen=True, kw_only=True)
class Rows(Batch):
    """Numbers per token, and which are real."""

    x: Tensor  # (B, T, 3)
    token_mask: Tensor  # (B, T)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def lengths(self) -> Tensor:
        return self.token_mask.sum(1)


def rows(count: int = ROWS, seed: int = 0) -> Rows:
    """Rows of 1 to 7 tokens; what is masked holds a number that would be noticed."""
    source = torch.Generator().manual_seed(seed)
    mask = torch.arange(WIDTH) < torch.randint(1, WIDTH + 1, (count, 1), generator=source)
    x = torch.randn(count, WIDTH, 3, generator=source).where(mask[..., None], 50.0)
    return Rows(x=x, token_mask=mask)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def terms(values: Tensor, batch: Rows) -> list[Term]:
    """A term per token, one per row, and one that is only reported."""
    per_row = (values * batch.token_mask).sum(1) ** 2
    return [
        Term("token", values**2, "token", 0.7),
        Term("row", per_row, "row", 0.3),
        Term("seen", values, "token", 0.0),
    ]


def learner(modules: dict[str, nn.Module], **changes: Any) -> Learner:
    settings: dict[str, Any] = {
        "total_updates": 10,
        "lr": dict.fromkeys(modules, 0.01),
        "epochs": 1,
        "minibatch_size": 0,
        "tokens_at_once": 10_000,
        "schedule": "constant",
        "warmup": 0,
        "weight_decay": 0.0,
        "betas": (0.9, 0.95),
        "max_grad_norm": math.inf,
    }
    return Learner(modules=modules, **(settings | changes))


def part(net: nn.Module, batch: Rows, weight: float = 1.0, loss: Callable[[Any, Any], Sequence[Term]] = terms) -> Part:
    return Part(batch, lambda b: net(b.x)[..., 0], loss, weight)


def by_hand(net: nn.Module, batch: Rows) -> Tensor:
    """0.7 x mean of squares over real tokens + 0.3 x mean over rows of the squared sum, one number at a time."""
    squares, sums = [], []
    for i in range(len(batch)):
        values = net(batch.x[i, : int(batch.token_mask[i].sum())])[:, 0]
        squares += list(values**2)
        sums.append(values.sum() ** 2)
    return 0.7 * torch.stack(squares).mean() + 0.3 * torch.stack(sums).mean()


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, ROWS])
@pytest.mark.parametrize("budget", [1, 10, 23, 10_000])
def test_accumulated_gradient_is_that_of_the_mean_whatever_the_microbatches(count: int, budget: int):
    net, batch = network(), rows(count)
    metrics = learner({"net": net}, tokens_at_once=budget).accumulate(part(net, batch, weight=2.0))
    found = gradients(net)
    expected = torch.autograd.grad(2.0 * by_hand(net, batch), list(net.parameters()))
    close(found, list(expected))
    values = torch.cat([net(batch.x[i, batch.token_mask[i]])[:, 0] for i in range(count)])
    assert metrics["token"] == pytest.approx((values**2).mean().item(), rel=1e-5)
    assert metrics["seen"] == pytest.approx(values.mean().item(), rel=1e-4, abs=1e-6)


def test_one_microbatch_of_sixteen_updates_like_sixteen_of_one():
    results = []
    for budget in (10_000, 1):
        net = network()
        teacher = learner({"net": net}, tokens_at_once=budget, epochs=2, minibatch_size=8, max_grad_norm=1.0)
        metrics = [teacher.update([part(net, rows())], seed=step) for step in range(3)]
        assert teacher.updates == 12
        results.append((weights(net), metrics))
    close(results[0][0], results[1][0])
    for one, many in zip(results[0][1], results[1][1], strict=True):
        assert one == pytest.approx(many, rel=1e-4, abs=1e-6)


def test_microbatches_do_not_matter_to_a_language_model_either(hf_folder: Callable[..., str]):
    folder, torch_rows = hf_folder("gpt2"), 16
    source = torch.Generator().manual_seed(0)

    def token_rows(longest: int) -> list[list[int]]:
        lengths = torch.randint(1, longest + 1, (torch_rows,), generator=source).tolist()
        return [torch.randint(0, 290, (n,), generator=source).tolist() for n in lengths]

    sequences: Sequences = join(*pad(token_rows(6), 0, "left"), *pad(token_rows(9), 0, "right"))

    def loss(new: PolicyForward, batch: TextBatch) -> list[Term]:
        return [Term("nll", -new.logprobs, "token"), Term("row", new.sequence_logprobs**2 / 100, "row", 0.1)]

    found = []
    for budget in (10_000, 40, 1):
        model = load_policy(folder, device=torch.device("cpu"), dtype="float32", seed=0)
        teacher = learner({"policy": model}, tokens_at_once=budget)
        teacher.accumulate(
            Part(TextBatch(sequences=sequences), lambda b, m=model: policy_forward(m, b.sequences), loss)
        )
        found.append(torch.cat([g.flatten() for g in gradients(model)]))
    scale = found[0].norm()
    assert ((found[1] - found[0]).norm() / scale).item() < 1e-5
    assert ((found[2] - found[0]).norm() / scale).item() < 1e-5


def test_update_takes_adamw_steps_on_minibatches_of_every_row_once():
    net, twin, batch = network(), network(), rows()
    seen: list[Tensor] = []

    def remember(values: Tensor, batch: Rows) -> list[Term]:
        seen.append(batch.x[:, 0, 0].clone())
        return terms(values, batch)

    learner({"net": net}, minibatch_size=4, epochs=2, weight_decay=0.1).update(
        [part(net, batch, loss=remember)], seed=3
    )
    assert [len(x) for x in seen] == [4] * 8
    for epoch in (seen[:4], seen[4:]):
        assert sorted(torch.cat(epoch).tolist()) == sorted(batch.x[:, 0, 0].tolist())
    assert torch.cat(seen[:4]).tolist() != torch.cat(seen[4:]).tolist()  # shuffled anew

    optimiser = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for first in seen:
        index = torch.tensor([batch.x[:, 0, 0].tolist().index(value) for value in first.tolist()])
        optimiser.zero_grad()
        by_hand(twin, batch.select(index)).backward()
        optimiser.step()
    assert_close(weights(net), weights(twin), atol=1e-5, rtol=1e-5)


def test_two_parts_are_summed_each_with_its_own_mean_and_weight():
    net, twin = network(), network()
    first, second = rows(16, seed=1), rows(6, seed=2)
    parts = [part(net, first, 1.0), part(net, second, 2.5, lambda v, b: [Term("ptx", v.abs(), "token")])]
    metrics = learner({"net": net}, tokens_at_once=9).update(parts, seed=0)
    values = torch.cat([twin(second.x[i, second.token_mask[i]])[:, 0] for i in range(6)])
    (by_hand(twin, first) + 2.5 * values.abs().mean()).backward()
    close(gradients(net), gradients(twin))
    assert metrics["ptx"] == pytest.approx(values.abs().mean().item(), rel=1e-5)
    norm = torch.cat([g.flatten() for g in gradients(twin)]).norm().item()
    assert metrics["grad_norm/net"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 3, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", 0, [1, (1 + math.sqrt(3) / 2) / 2, 3 / 4, 1 / 2, 1 / 4, (1 - math.sqrt(3) / 2) / 2]),
        ("cosine", 4, [1 / 4, 1 / 2, 3 / 4, 1, 1, 1 / 2]),
    ],
)
def test_rates_follow_the_schedule(schedule: str, warmup: int, expected: list[float]):
    net, other = network(), network(1)
    teacher = learner(
        {"a": net, "b": other}, total_updates=6, schedule=schedule, warmup=warmup, lr={"b": 0.5, "a": 0.01}
    )
    for factor in expected:
        metrics = teacher.update([part(net, rows(4))], seed=0)
        assert metrics["lr"] == pytest.approx(0.01 * factor, abs=1e-12)
        assert [group["lr"] for group in cast(Whole, teacher.training).optimiser.param_groups] == pytest.approx(
            [0.01 * factor, 0.5 * factor]
        )
    teacher.update([part(net, rows(4))], seed=0)
    assert teacher.rate_factor() == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-12)  # past the end


def test_each_module_is_clipped_on_its_own():
    small, large = network(0), network(1)
    batch = rows()

    def forward(b: Rows) -> tuple[Tensor, Tensor]:
        return small(b.x)[..., 0], large(b.x)[..., 0]

    def loss(values: tuple[Tensor, Tensor], b: Rows) -> list[Term]:
        return [Term("small", values[0] * 1e-3, "token"), Term("large", values[1] * 100, "token")]

    metrics = learner({"small": small, "large": large}, max_grad_norm=0.5).update([Part(batch, forward, loss)], seed=0)
    norms = {name: torch.cat([g.flatten() for g in gradients(net)]).norm().item() for name, net in
             (("small", small), ("large", large))}  # fmt: skip
    assert metrics["grad_norm/large"] > 50  # as it was before clipping
    assert norms["large"] == pytest.approx(0.5, rel=1e-4)
    assert norms["small"] == pytest.approx(metrics["grad_norm/small"], rel=1e-6)  # untouched by the other's size


def test_rows_that_do_not_divide_into_minibatches_are_refused():
    net = network()
    with pytest.raises(ValueError, match="batch of 16 rows does not divide into minibatches of 5"):
        learner({"net": net}, minibatch_size=5).update([part(net, rows())], seed=0)
    with pytest.raises(ValueError, match="a part of 3 rows cannot be cut into 4 minibatches"):
        learner({"net": net}, minibatch_size=4).update([part(net, rows()), part(net, rows(3))], seed=0)
    assert (minibatch_count(16, 4), minibatch_count(16, 0), minibatch_count(16, 16)) == (4, 1, 1)


def test_what_is_only_reported_is_averaged_over_steps_and_teaches_nothing():
    net, twin = network(), network()

    def loss(values: Tensor, batch: Rows) -> list[Term]:
        steep = (values - values.detach()).abs().sqrt()  # 0, with an infinite slope
        return [Term("three", torch.full_like(values, 3.0), "token", 0.0), Term("steep", steep, "token", 0.0)]

    def both(values: Tensor, batch: Rows) -> list[Term]:
        return [*terms(values, batch), *loss(values, batch)]

    settings = {"epochs": 3, "minibatch_size": 4}
    metrics = learner({"net": net}, **settings).update([part(net, rows(), loss=both)], seed=0)
    learner({"net": twin}, **settings).update([part(twin, rows())], seed=0)
    assert metrics["three"] == pytest.approx(3.0)
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(twin), strict=True))


@pytest.mark.parametrize("where", ["loss", "infinite loss", "gradient"])
def test_what_is_not_finite_is_refused_and_the_weights_stay(where: str):
    net = network()
    teacher = learner({"net": net}, warmup=2)
    teacher.update([part(net, rows())], seed=0)
    before, moments = weights(net), teacher.state_dict()
    moments = {k: v["exp_avg"].clone() for k, v in moments["optimiser"]["net"].items()}

    def broken(values: Tensor, batch: Rows) -> list[Term]:
        if where == "loss":
            return [Term("policy", values * math.nan, "token")]
        if where == "infinite loss":
            return [Term("policy", values + math.inf, "token")]  # its gradient is finite
        return [Term("policy", (values - values).abs().sqrt(), "token")]  # 0, but its slope is infinite

    with pytest.raises(FloatingPointError, match="not finite at optimiser step 1; the weights were not changed"):
        teacher.update([part(net, rows(), loss=broken)], seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    assert teacher.updates == 1
    after = teacher.state_dict()["optimiser"]["net"]
    assert all(torch.equal(after[k]["exp_avg"], moment) for k, moment in moments.items())


def test_a_resumed_learner_continues_bit_for_bit(tmp_path: Path):
    def continued(net: nn.Module, teacher: Learner, first: int) -> list[Tensor]:
        for step in range(first, 4):
            teacher.update([part(net, rows(seed=step))], seed=step)
        return weights(net)

    settings = {"minibatch_size": 4, "epochs": 2, "schedule": "cosine", "warmup": 3, "total_updates": 40}
    net = network()
    expected = continued(net, learner({"net": net}, **settings), 0)

    net = network()
    teacher = learner({"net": net}, **settings)
    for step in range(2):
        teacher.update([part(net, rows(seed=step))], seed=step)
    save_tree(tmp_path / "step_1", {"learner": teacher.state_dict(), "net": dict(net.named_parameters())})

    state = load_tree(tmp_path / "step_1")
    fresh = network(seed=99)
    fresh.load_state_dict(state["net"])
    other = learner({"net": fresh}, **settings)
    other.load_state_dict(state["learner"])
    assert other.updates == 16
    assert all(torch.equal(a, b) for a, b in zip(expected, continued(fresh, other, 2), strict=True))


def test_a_module_without_a_rate_is_refused_and_rates_of_absent_modules_are_not():
    with pytest.raises(ValueError, match=r"\['critic'\] learn too; add learner.lr.critic"):
        learner({"policy": network(), "critic": network()}, lr={"policy": 1e-3})
    assert learner({"policy": network()}, lr={"policy": 1e-3, "critic": 1e-2}).lr == {"policy": 1e-3}


def test_what_is_frozen_stays():
    net = network()
    net[0].requires_grad_(False)
    before = weights(net)
    learner({"net": net}, weight_decay=0.5).update([part(net, rows())], seed=0)
    after = weights(net)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])
