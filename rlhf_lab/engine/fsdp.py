"""Weights, gradients and moments in shards: torch's `fully_shard` (FSDP2), on GPUs and on CPUs.

Not through accelerate: its plugin becomes plain DDP on a CPU, and says nothing.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_lab.engine import ranks
from rlhf_lab.engine.distribution import COPY, Distribution, Entry, Moments, Root, TorchTraining, Training, hollow
from rlhf_lab.engine.models import Hardware, layers, matched, parameters_of

Module = TypeVar("Module", bound=nn.Module)


class Sharded(Distribution):
    """Each rank keeps one part of every weight; layers are gathered one at a time."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(hardware)
        self.mesh = init_device_mesh(self.device.type, (ranks.world(),))

    @property
    def loads_on(self) -> torch.device:
        return torch.device("cpu")

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: _whole(tensor.detach()).cpu() for name, tensor in parameters_of(module).items()}

    @torch.no_grad()
    def restore(self, module: nn.Module, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in matched(module, saved).items():
            tensor.copy_(_like(tensor, saved[name].detach()))

    def _train(self, modules: Mapping[str, nn.Module], betas: tuple[float, float], weight_decay: float) -> Training:
        for module in modules.values():
            vars(module)[COPY] = hollow(module, self.device)
        entry = self._enter(self._shard(modules), modules, self.hardware.bf16)
        return ShardedTraining(modules, entry, self.device, betas, weight_decay)

    def _cut_frozen(self, module: nn.Module) -> nn.Module | None:
        return self._shard({"frozen": module})

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
        with self._filled(module, lambda shard: _whole(shard).to(self.device)) as whole:
            yield whole


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
