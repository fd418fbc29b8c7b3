"""The processes of one run: who they are, and every message between them. Alone, each function is trivial.

Data parallel by rows. Every rank holds the whole (weightless) batch and draws the same random numbers, so all take the
same decisions; what costs time is cut by `share`, done by one rank each, and put together again. Whoever writes a
method never meets a rank. Every rank must reach every function here that sends: when one fails, the others are `Lost`.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, distributed, nn

Item = TypeVar("Item")
PATIENCE = timedelta(minutes=30)  # for a rank that writes, or asks a judge, while the others wait
_planned: ContextVar[int] = ContextVar("planned", default=1)
_missed: list[str] = []  # what sending failed with


class Lost(RuntimeError):
    """Another process of this run is gone, so this one cannot go on; why, the other one knows."""


def lost() -> bool:
    """Whether this process was left alone by another of its run."""
    return bool(_missed)


@contextmanager
def _sending() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own for this
        _missed.append(str(error))
        raise Lost("another process of this run ended, or does not answer") from error


def start(device: torch.device) -> None:
    """Join the other processes of this run, where a launcher (elastic, torchrun, accelerate) started several.

    Tensors on the CPU travel by gloo, those on GPUs by nccl, which wants a GPU for each rank; ranks that share one
    send by gloo.

    Raises:
        ValueError: the device is one certain GPU, which all ranks would take.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        return
    backend = "gloo"
    if device.type == "cuda":
        if device.index is not None:
            raise ValueError(f"hardware.device={device} with several processes; use cuda, so that each takes its own")
        if there := torch.cuda.device_count():  # without any, the run is refused in its own words
            torch.cuda.set_device(local_rank() % there)
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= there:
            backend = "cpu:gloo,cuda:nccl"
    with _sending():
        distributed.init_process_group(backend, timeout=PATIENCE)


def stop() -> None:
    """Leave, when every rank has done its work; not for use after an error, when the others may never come."""
    if distributed.is_initialized():
        barrier()
        distributed.destroy_process_group()


def rank() -> int:
    """Which of the `world()` processes this is; 0 alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many processes share the work."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def planned(count: int) -> Iterator[None]:
    """Within it a run is looked at that `count` processes will share, before they are started."""
    token = _planned.set(count)
    try:
        yield
    finally:
        _planned.reset(token)


def expected() -> int:
    """How many processes share the work, or will."""
    return max(world(), int(os.environ.get("WORLD_SIZE", "1")), _planned.get())


def local_rank() -> int:
    """Which of the processes on this node this is, and so which of its GPUs it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the one process that writes and speaks; right from the beginning, before `start` too."""
    return rank() == 0 if distributed.is_initialized() else os.environ.get("RANK", "0") == "0"


@overload
def share(items: Tensor) -> Tensor: ...
@overload
def share(items: Sequence[Item]) -> Sequence[Item]: ...
def share(items: Any) -> Any:
    """This rank's part, every world-th: of items sorted by size all ranks get a like amount of work, perhaps none."""
    return items[rank() :: world()]


def dealt(items: Tensor) -> Tensor:
    """The items in the order in which `gather_rows` returns what the ranks made of their shares of them."""
    return torch.cat([items[one :: world()] for one in range(world())])


def gather_rows(rows: Tensor | None) -> Tensor:
    """The rows of all ranks, in the order of the ranks, on every rank and on the CPU.

    Args:
        rows: (b, …) of any type, b different on every rank; None on a rank that had nothing to do.

    Raises:
        ValueError: no rank has rows, or their shapes or types differ.
    """
    if world() == 1:
        if rows is None:
            raise ValueError("no rank has rows to gather")
        return rows.cpu()
    # bytes, since not every backend sends every type
    mine = torch.empty(0, dtype=torch.uint8) if rows is None else rows.cpu().contiguous().view(-1).view(torch.uint8)
    kinds = gather(None if rows is None else (tuple(rows.shape), rows.dtype))
    found = {(kind[0][1:], kind[1]) for kind in kinds if kind is not None}
    if len(found) != 1:
        raise ValueError(f"the ranks have rows of {sorted(map(str, found)) or 'no kind'}; they must all be of one")
    ((shape, dtype),) = found
    counts = [0 if kind is None else kind[0][0] for kind in kinds]
    sizes = [count * math.prod(shape) * dtype.itemsize for count in counts]
    parts = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
    with _sending():
        distributed.all_gather(parts, nn.functional.pad(mine, (0, max(sizes) - len(mine))))
    whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return whole.view(dtype).view(sum(counts), *shape)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the ranks, the same to the bit on every rank.

    A rank without a gradient counts as zero; a parameter that no rank has a gradient of keeps none, as alone.
    """
    if world() == 1:
        return
    learnt = [parameter for parameter in parameters if parameter.requires_grad]
    if not learnt:
        return
    device = learnt[0].device
    pieces = [
        torch.zeros(p.numel(), device=device) if p.grad is None else p.grad.detach().float().view(-1) for p in learnt
    ]
    present = torch.tensor([float(p.grad is not None) for p in learnt], device=device)
    flat = torch.cat([*pieces, present])
    with _sending():
        distributed.all_reduce(flat)
    *sums, counts = flat.split([*(p.numel() for p in learnt), len(learnt)])
    for parameter, total, count in zip(learnt, sums, counts.tolist(), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype) if count else None


def sum_by_name(values: dict[str, float]) -> dict[str, float]:
    """Sums over the ranks of small named figures; a rank may lack any of them."""
    sums: dict[str, float] = {}
    for part in gather(values):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def check_equal(what: str, tensors: Iterable[Tensor]) -> None:
    """Make sure that what all ranks computed for themselves is the same everywhere, to the bit, by its sums of bytes.

    Raises:
        RuntimeError: it is not, on any rank; nothing that is made of it can be trusted.
    """
    if world() == 1:
        return
    sums = [int(x.detach().contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64)) for x in tensors]
    if len(set(map(tuple, gather(sums)))) > 1:
        raise RuntimeError(
            f"the {world()} processes of this run no longer have the same {what}: one of them computed something else; "
            "run on nodes of one kind, or with num_processes=1"
        )


def gather(value: Any) -> list[Any]:
    """What each rank has, in the order of the ranks; for small things only."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with _sending():
        distributed.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """What the first rank has; for small things only."""
    if world() == 1:
        return value
    holder = [value]
    with _sending():
        distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def agree(flag: bool) -> bool:
    """Whether any rank says so."""
    if world() == 1:
        return flag
    raised = torch.tensor(int(flag))
    with _sending():
        distributed.all_reduce(raised, op=distributed.ReduceOp.MAX)
    return bool(raised)


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        with _sending():
            distributed.barrier()
