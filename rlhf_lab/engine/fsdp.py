"""Weights, gradients and moments in shards: torch's `fully_shard` (FSDP2), on GPUs and on CPUs.

Not through accelerate: its plugin becomes plain DDP on a CPU, and says nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_lab.engine import ranks
from rlhf_lab.engine.backbone import Backbone, bases_of
from rlhf_lab.engine.distribution import (
    COPY,
    Distribution,
    Entry,
    Moments,
    Root,
    TorchTraining,
    Training,
    Whole,
    hollow,
)
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.parameters import layers, matched, parameters_of

Module = TypeVar("Module", bound=nn.Module)


class Sharded(Distribution):
    """Each rank keeps one part of every weight; layers are gathered one at a time."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(hardware)
        self.mesh = init_device_mesh(self.device.type, (ranks.world(),))

    @property
    def loads_on(self) -> torch.device:
        # a base is found by its device's name: one that will be cut is never one that is used whole, on "cpu"
        return torch.device("cpu", 0)

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: _whole(tensor.detach()).cpu() for name, tensor in parameters_of(module).items()}

    @torch.no_grad()
    def restore(self, module: nn.Module, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in matched(module, saved).items():
            tensor.copy_(_like(tensor, saved[name].detach()))

    def _train(self, modules: Mapping[str, nn.Module], betas: tuple[float, float], weight_decay: float) -> Training:
        if bases := bases_of(modules.values()):
            entry = self._enter(self._on_shards(bases, list(modules.values())), modules, self.hardware.bf16)
            return Whole(modules, entry, betas, weight_decay)
        for module in modules.values():
            vars(module)[COPY] = hollow(module, self.device)
        entry = self._enter(self._shard(modules), modules, self.hardware.bf16)
        return ShardedTraining(modules, entry, self.device, betas, weight_decay)

    def _cut_frozen(self, module: nn.Module) -> Callable[..., Any] | None:
        if bases := bases_of([module]):
            return self._on_shards(bases, [module])
        return self._shard({"frozen": module})

    def _on_shards(self, bases: Sequence[Backbone], modules: Sequence[nn.Module]) -> Callable[..., Any]:
        """The root of adapters and heads, which stay whole: of the bases below them, one within the other."""
        first, *others = [base.root or self._cut(base) for base in bases]
        within: Callable[..., Any] = first
        for root in others:
            within = partial(within, root)
        for module in modules:
            module.to(self.device)  # they were read to where the base was
        return within

    def _cut(self, base: Backbone) -> nn.Module:
        """Cut a base, which does not learn, for all that stand on it; returns its root.

        Raises:
            ValueError: it is quantised.
        """
        if base.quantise:
            raise ValueError(
                f"the base {base.path} is stored as {base.quantise}, whose packed layers hardware=fsdp does not cut; "
                "use hardware=ddp, gpu or cpu, where each process keeps all of it"
            )
        # the way in which attention is computed is set there, for both
        settings = [part.config for part in base.model.modules() if hasattr(part, "config")]
        base.copy = vars(base.model)[COPY] = hollow(base.model, self.device, [base, base.active, *settings])
        base.root, base.device = self._shard({"base": base.model}), self.device
        return base.root

    def _shard(self, modules: Mapping[str, nn.Module]) -> Root:
        root = Root(modules)
        # a root is resharded after its forward too: it may be called without gradient just before the weights change
        moves = self.hardware.offload and self.device.type != "cpu"  # on a CPU they are there already
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": True,
            "offload_policy": CPUOffloadPolicy() if moves else OffloadPolicy(),
        }
        for module in modules.values():
            for layer in layers(module):
                fully_shard(layer, **options)
        return cast(Root, fully_shard(root, **options))

    @contextlib.contextmanager
    def _gathered(self, module: Module) -> Iterator[Module]:
        def whole(shard: Tensor) -> Tensor:
            return _whole(shard).to(self.device)

        with contextlib.ExitStack() as stack:
            for base in bases_of([module]):
                if base.copy is not None:
                    stack.enter_context(self._filled(base.model, whole))
                    stack.enter_context(base.whole())
            yield stack.enter_context(self._filled(module, whole))


class ShardedTraining(TorchTraining):
    """The gradient is summed, and each rank's part of it kept, with each backward pass."""

    in_step = True

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        entry: Entry,
        device: torch.device,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(modules, entry, betas, weight_decay)
        self.on = device

    @property
    def device(self) -> torch.device:
        return self.on

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * ranks.world()).backward()  # torch averages over the ranks

    def clip(self, longest: float) -> dict[str, float]:
        norms = {name: nn.utils.clip_grad_norm_(module.parameters(), longest) for name, module in self.modules.items()}
        return {name: _whole(norm).item() for name, norm in norms.items()}

    def moments(self) -> Moments:
        state = self.optimiser.state
        return {
            name: {
                key: {moment: _whole(value).cpu() for moment, value in state[p].items()}
                for key, p in self.learnt(name).items()
                if p in state
            }
            for name in self.modules
        }

    def _placed(self, moment: Tensor, parameter: nn.Parameter) -> Tensor:
        return _like(parameter, moment)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(shard: Tensor, whole: Tensor) -> Tensor:
    """The whole tensor in shards as those of another."""
    if not isinstance(shard, DTensor):
        return whole.to(shard.device)
    return distribute_tensor(whole.to(shard.device), shard.device_mesh, shard.placements)
