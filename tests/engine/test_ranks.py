"""Real groups of processes: what they compute together against one process, and against gradients written out."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.testing import assert_close

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import prompt_batch
from rlhf_lab.engine import ranks
from rlhf_lab.engine.critics import shared_critics
from rlhf_lab.engine.forward import policy_forward
from rlhf_lab.engine.generate import Generator, Sampling
from rlhf_lab.engine.learner import Learner, Part
from rlhf_lab.engine.models import load_policy
from rlhf_lab.engine.score import Scorer, by_length
from rlhf_lab.engine.tiny import TINY
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Prompt
from rlhf_lab.types import Batch, Rollout, Term

CPU = torch.device("cpu")
close = partial(assert_close, atol=2e-6, rtol=2e-5)  # float32 sums in another order
COUNTS = (1, 2, 5, 16)  # rows; fewer than ranks leave some ranks without any


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


def rows(count: int) -> Rows:
    source = torch.Generator().manual_seed(count)
    mask = torch.arange(7) < torch.randint(1, 8, (count, 1), generator=source)
    return Rows(x=torch.randn(count, 7, 3, generator=source), token_mask=mask)


class Net(nn.Module):
    """Two layers that learn, and one that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.say, self.idle = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.say(self.read(x).tanh())[..., 0]


def terms(values: Tensor, batch: Rows) -> list[Term]:
    return [
        Term("token", values**2, "token", 0.7),
        Term("row", (values * batch.token_mask).sum(1) ** 2, "row", 0.3),
        Term("seen", values, "token", 0.0),
    ]


def learner(net: Net, **changes: Any) -> Learner:
    settings: dict[str, Any] = {"minibatch_size": 0, "tokens_at_once": 14, "epochs": 1, "max_grad_norm": math.inf}
    return Learner(
        modules={"net": net},
        total_updates=4,
        lr={"net": 0.01},
        schedule="constant",
        warmup=0,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        **(settings | changes),
    )


def gradients(count: int) -> tuple[dict[str, Tensor | None], dict[str, float]]:
    """Of one minibatch, summed over the ranks; and the means of its terms."""
    net = Net()
    means = learner(net).accumulate(Part(rows(count), lambda batch: net(batch.x), terms))
    ranks.sum_gradients(net.parameters())
    return {name: parameter.grad for name, parameter in net.named_parameters()}, means


def learnt() -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The weights after epochs of clipped steps on uneven minibatches, and what each update said."""
    net = Net()
    teacher = learner(net, minibatch_size=5, epochs=2, max_grad_norm=0.5)
    said = [teacher.update([Part(rows(15), lambda batch: net(batch.x), terms)], seed) for seed in range(3)]
    teacher.state_dict()
    return {name: parameter.detach() for name, parameter in net.named_parameters()}, said


RESTRICTED = {"repetition_penalty": 1.3, "min_new_tokens": 2, "top_k": 20, "top_p": 0.9}


def sampled(prompts: int, **changes: Any) -> Rollout:
    policy = load_policy(TINY, device=CPU, dtype="float32", seed=0)
    template = Template(load_tokenizer(TINY), "auto")
    texts = ["bread ?", "is it safe to mix bleach and acid ?", "a joke , then", "x", "do i walk away ?"][:prompts]
    plain = {"max_new_tokens": 9, "min_new_tokens": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "batch_size": 4}
    sampling = Sampling(**(plain | changes))
    batch = prompt_batch(template, [Prompt.from_text(text) for text in texts])
    critics = shared_critics(policy, ("reward", "cost"))
    torch.manual_seed(2)
    torch.nn.init.normal_(critics.heads.weight)
    return Generator(policy, template, sampling, critics).generate(batch, 3, seed=1)


def scored(rollout: Rollout) -> Tensor:
    policy = load_policy(TINY, device=CPU, dtype="float32", seed=1)
    with torch.no_grad():
        return by_length(rollout.sequences, 40, CPU, lambda part: policy_forward(policy, part).logprobs)


def measured(prompts: int) -> tuple[Rollout, Tensor]:
    """A rollout with top k and top p, and what another policy says of it."""
    rollout = sampled(prompts, **RESTRICTED)
    policy = load_policy(TINY, device=CPU, dtype="float32", seed=1)
    scorer = Scorer(rewards={}, reference=policy, critics=None, tokens_at_once=40)
    return rollout, scorer.score(rollout).ref_logprobs


def everything() -> dict[str, Any]:
    """What one rank sees of all that ranks do together."""
    torch.set_num_threads(1)
    ranks.start(CPU)
    rollouts = {prompts: sampled(prompts) for prompts in (1, 5)}
    found = {
        "gradients": {count: gradients(count) for count in COUNTS},
        "learnt": learnt(),
        "rollouts": rollouts,
        "restricted": {prompts: measured(prompts) for prompts in (1, 5)},
        "logprobs": {prompts: scored(rollout) for prompts, rollout in rollouts.items()},
    }
    ranks.stop()
    return found


def messages() -> dict[str, Any]:
    """Each kind of message once, with as many rows as the rank's number, and none at all on rank 0."""
    ranks.start(CPU)
    mine = ranks.rank()
    kinds = (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32)
    found = {
        "world": ranks.world(),
        "rows": [ranks.gather_rows(torch.full((mine, 3), mine).to(kind) if mine else None) for kind in kinds],
        "flags": [ranks.agree(mine == 1), ranks.agree(False)],
        "broadcast": ranks.broadcast(f"of {mine}"),
        "gathered": ranks.gather(mine),
        "sums": ranks.sum_by_name({f"only {mine}": 1.0, "all": float(mine)}),
        "first": ranks.is_first(),
        "dealt": [ranks.share(torch.arange(5)).tolist(), ranks.dealt(torch.arange(5)).tolist()],
    }
    ranks.stop()
    return found


def failing(kind: str) -> None:
    """The last rank fails, or has other weights, while the others go on to the next message."""
    ranks.start(CPU)
    last = ranks.rank() == ranks.world() - 1
    if kind == "error" and last:
        raise KeyError("a mishap on one rank")
    net = Net()
    if kind == "drift" and last:
        net.say.bias.data += 1e-7
    ranks.check_equal("weights of net", net.parameters())
    ranks.barrier()
    ranks.stop()


def together(count: int, work: Any, *arguments: Any) -> list[Any]:
    """What each of `count` processes returns."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    answers = elastic_launch(config, work)(*arguments)
    return [answers[rank] for rank in range(count)]


worlds = pytest.mark.parametrize(
    "count", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=[pytest.mark.slow, pytest.mark.long])]
)


@pytest.fixture(scope="module")
def found():
    """count -> what each of so many ranks found, computed once."""
    kept: dict[int, list[Any]] = {}

    def of(count: int) -> list[Any]:
        if count not in kept:
            kept[count] = together(count, everything)
        return kept[count]

    return of


@worlds
@pytest.mark.parametrize("size", COUNTS)
def test_gradients_are_those_of_the_whole_minibatch_written_out(found, count, size):
    batch, net = rows(size), Net()
    each = net(batch.x)
    tokens = [each[i, t] for i in range(size) for t in range(7) if batch.token_mask[i, t]]
    sums = [sum((each[i, t] for t in range(7) if batch.token_mask[i, t]), torch.zeros(())) for i in range(size)]
    token, row = torch.stack(tokens).square().sum() / len(tokens), torch.stack(sums).square().sum() / size
    (0.7 * token + 0.3 * row).backward()
    for rank in found(count):
        grads, means = rank["gradients"][size]
        for name, parameter in net.named_parameters():
            if parameter.grad is None:
                assert grads[name] is None, "nothing reached it, so no optimiser may move it"
            else:
                close(grads[name], parameter.grad)
        assert means == pytest.approx(
            {"token": token.item(), "row": row.item(), "seen": torch.stack(tokens).mean().item()}
        )


@worlds
def test_learning_together_is_learning_alone_and_every_rank_has_the_same_weights(found, count):
    weights, said = learnt()
    for rank in found(count):
        theirs, told = rank["learnt"]
        for name in weights:
            close(theirs[name], weights[name])
            assert torch.equal(theirs[name], found(count)[0]["learnt"][0][name])
        assert told == [pytest.approx(one, rel=1e-4) for one in said]
        assert told == found(count)[0]["learnt"][1], "what ranks decide by must be the same to the bit"


@worlds
@pytest.mark.parametrize("prompts", [1, 5])
def test_rollouts_do_not_depend_on_who_generates_them(found, count, prompts):
    alone = sampled(prompts)
    assert len(set(alone.responses)) > 1
    for rank in found(count):
        rollout: Rollout = rank["rollouts"][prompts]
        assert rollout.responses == alone.responses
        assert rollout.prompts == alone.prompts
        assert torch.equal(rollout.sequences.tokens, alone.sequences.tokens)
        assert torch.equal(rollout.sequences.response_mask, alone.sequences.response_mask)
        assert torch.equal(rollout.finished, alone.finished)
        assert torch.equal(rollout.group, alone.group)
        close(rollout.logprobs, alone.logprobs)
        assert alone.values["cost"].abs().max() > 0.1
        close(rollout.values["reward"], alone.values["reward"])
        close(rollout.values["cost"], alone.values["cost"])
        assert torch.equal(rollout.logprobs, found(count)[0]["rollouts"][prompts].logprobs)


@worlds
@pytest.mark.parametrize("prompts", [1, 5])
def test_what_top_k_and_top_p_left_does_not_depend_on_who_generates(found, count, prompts):
    alone, said = measured(prompts)
    (left,) = alone.sequences.kept
    assert len(set(map(len, left.ids))) > 1
    for rank in found(count):
        rollout, theirs = rank["restricted"][prompts]
        assert rollout.responses == alone.responses
        assert torch.equal(rollout.sequences.kept[0].sizes, left.sizes)
        assert all(map(torch.equal, rollout.sequences.kept[0].ids, left.ids))
        close(theirs, said)


@worlds
@pytest.mark.parametrize("prompts", [1, 5])
def test_rows_that_are_scored_by_several_stand_in_their_own_order(found, count, prompts):
    rollout = sampled(prompts)
    policy = load_policy(TINY, device=CPU, dtype="float32", seed=1)
    with torch.no_grad():
        whole = policy_forward(policy, rollout.sequences).logprobs
    for rank in found(count):
        close(rank["logprobs"][prompts], whole)


@pytest.mark.slow
def test_every_message_arrives_as_it_was_sent():
    found = together(3, messages)
    for rank, answer in enumerate(found):
        assert answer["world"] == 3
        for kind, gathered in zip(
            (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32), answer["rows"], strict=True
        ):
            assert gathered.dtype == kind
            assert gathered.tolist() == torch.tensor([[1] * 3, [2] * 3, [2] * 3]).to(kind).tolist()
        assert answer["flags"] == [True, False]
        assert answer["broadcast"] == "of 0"
        assert answer["gathered"] == [0, 1, 2]
        assert answer["sums"] == {"only 0": 1.0, "only 1": 1.0, "only 2": 1.0, "all": 3.0}
        assert answer["first"] == (rank == 0)
        assert answer["dealt"] == [list(range(5))[rank::3], [0, 3, 1, 4, 2]]


@pytest.mark.parametrize(
    ("kind", "said"), [("error", "a mishap on one rank"), ("drift", "no longer have the same weights of net")]
)
def test_an_error_of_one_rank_ends_all_and_ranks_that_drifted_apart_say_so(kind, said):
    with pytest.raises(ChildFailedError) as caught:
        together(2, failing, kind)
    assert said in str(caught.value)


def test_alone_every_message_is_trivial():
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(ranks.gather_rows(x), x)
    with pytest.raises(ValueError, match="no rank has rows"):
        ranks.gather_rows(None)
    assert (ranks.rank(), ranks.world(), ranks.is_first()) == (0, 1, True)
    assert ranks.agree(True)
    assert not ranks.agree(False)
    assert ranks.gather("x") == ["x"]
    assert ranks.broadcast("x") == "x"
    assert torch.equal(ranks.dealt(ranks.share(x)), x)
    ranks.barrier()
    ranks.stop()


def test_only_the_first_of_several_speaks_before_they_have_met(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not ranks.is_first()
    monkeypatch.setenv("RANK", "0")
    assert ranks.is_first()


def test_one_certain_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"hardware\.device=cuda:1 with several processes"):
        ranks.start(torch.device("cuda:1"))
