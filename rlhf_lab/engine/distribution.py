"""Where a run's weights are among its processes: whole on each, or in shards; `hardware.distribution` says it.

`ddp` keeps all weights on every rank and sums gradients in float32, the same to the bit everywhere. torch's DDP is not
wrapped around it: it averages over ranks with equally many backward passes, where ours differ, and it wants its own
forward to be called, where trunks and heads are called apart. `fsdp` is torch's `fully_shard` (see `fsdp.py`), `zero1`
to `zero3` are DeepSpeed's through accelerate (see `zero.py`).

A sharded module has its weights only within its root: it, or a part of it, is called `through` that, by all ranks
equally often (`in_step`). To sample from it or to save it, its weights are gathered for a while (`whole`). Of adapters
and heads on a base only the base is cut, once for all that stand on it; they are whole on every rank, as under `ddp`.
"""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from rlhf_lab.engine import ranks
from rlhf_lab.engine.backbone import AdapterView
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.parameters import layers, parameters_of, restore_parameters
from rlhf_lab.interfaces import RolloutEngine
from rlhf_lab.types import PromptBatch, Rollout

Module = TypeVar("Module", bound=nn.Module)
Moments = dict[str, dict[str, dict[str, Tensor]]]  # module -> parameter -> step, exp_avg, exp_avg_sq
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
_ENTRY, _TRAINING, COPY = "_entry", "_training", "_copy"  # what a module that was distributed is given


class Root(nn.Module):
    """What is entered for the weights of its modules to be there; within its forward, any part of them is called."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(modules))

    def forward(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)


@dataclass(frozen=True)
class Entry:
    """How calls that compute with a module are made.

    Fields:
        root: within which they are, called as a `Root` is; None for a module that is whole.
        autocast: whether they compute in bfloat16.
    """

    root: Callable[..., Any] | None
    device: str
    autocast: bool

    def __call__(self, call: Callable[..., Any], *args: Any) -> Any:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            return call(*args) if self.root is None else self.root(call, *args)


@dataclass(frozen=True)
class Through:
    """A call that is made by an entry."""

    entry: Entry
    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.entry(self.call, *args)


def through(module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which computes with a module, as it is made whatever the module's distribution."""
    entry: Entry | None = vars(module).get(_ENTRY)
    return call if entry is None else Through(entry, call)


def is_in_step(call: Callable[..., Any]) -> bool:
    """Whether all ranks have to make this call equally often."""
    return isinstance(call, Through) and (call.entry.root is not None or is_in_step(call.call))


def in_step(pieces: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
    """This rank's pieces of work, as many as the rank with most has, and whether each counts.

    Those that do not repeat the first one, or are row 0 on a rank that has none.
    """
    short = max(ranks.gather(len(pieces))) - len(pieces)
    filler = pieces[0] if pieces else torch.tensor([0])
    return [*((piece, True) for piece in pieces), *[(filler, False)] * short]


class Training(ABC):
    """Modules with their AdamW, as a learner uses them."""

    in_step = False  # whether all ranks compute equally often

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where batches are to be."""

    @abstractmethod
    def loss(self, call: Callable[[], Tensor]) -> Tensor:
        """The scalar that `call` computes with the modules."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add to this rank's part of the gradients; `last` before they are summed."""

    @abstractmethod
    def clip(self, longest: float) -> dict[str, float]:
        """Sum the gradients over the ranks and cut each module's to a norm; returns the norms before."""

    @abstractmethod
    def step(self, rates: Mapping[str, float]) -> None:
        """Move each module's weights at its rate."""

    @abstractmethod
    def clear(self) -> None:
        """Forget the gradients."""

    @abstractmethod
    def moments(self) -> Moments:
        """Of the parameters that have moved; whole, on the first rank at least."""

    @abstractmethod
    def restore(self, moments: Moments) -> None:
        """Set them; of a parameter that is not among them, as if it had never moved."""

    def learnt(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of a module that learn."""
        return {key: p for key, p in self.modules[name].named_parameters() if p.requires_grad}


class Distribution(ABC):
    """Where the weights are, under one `hardware`."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware, self.device = hardware, torch.device(hardware.device)

    @staticmethod
    @cache
    def of(hardware: Hardware) -> "Distribution":
        """The one of this process."""
        if hardware.distribution == "ddp":
            return Replicated(hardware)
        if not distributed.is_initialized():  # alone
            distributed.init_process_group("gloo", store=cast(Any, distributed).HashStore(), rank=0, world_size=1)
        if hardware.distribution == "fsdp":
            from rlhf_lab.engine.fsdp import Sharded

            return Sharded(hardware)
        from rlhf_lab.engine.zero import Zero

        return Zero(hardware)

    @property
    def loads_on(self) -> torch.device:
        """Where a module that will be sharded is read to: a GPU might not hold it."""
        return self.device

    def frozen(self, module: Module, is_scorer: bool = False) -> Module:
        """The module, which does not learn, in this process's share of the memory; to be called `through` itself.

        Args:
            is_scorer: whether it computes in the precision of its weights, whatever `hardware.bf16` says.
        """
        self._enter(self._cut_frozen(module), {"frozen": module}, autocast=self.hardware.bf16 and not is_scorer)
        return module

    def _cut_frozen(self, module: nn.Module) -> Callable[..., Any] | None:
        """Its root, if it was cut."""
        return None

    def learning(self, modules: Mapping[str, nn.Module], betas: tuple[float, float], weight_decay: float) -> Training:
        """The modules as they learn, to be called `through` themselves; given again, they have a fresh optimiser."""
        before = {id(one): one for one in (vars(module).get(_TRAINING) for module in modules.values())}
        if len(before) == 1 and (training := next(iter(before.values()))) is not None:
            training.restore({})
            return training
        if self.hardware.gradient_checkpointing:
            for module in modules.values():
                self._recompute(module)
        training = self._train(modules, betas, weight_decay)
        for module in modules.values():
            vars(module)[_TRAINING] = training
        return training

    def to_sample(self, policy: Module) -> Module:
        """What an engine samples from: it has the policy's weights within `whole`."""
        return vars(policy).get(COPY, policy)

    def engine(self, policy: Module, make: Callable[[Module], RolloutEngine]) -> RolloutEngine:
        """A rollout engine that samples from the policy as it is by then."""
        engine = make(self.to_sample(policy))
        return Gathering(engine, policy, self) if _ENTRY in vars(policy) else engine

    @contextlib.contextmanager
    def whole(self, module: Module) -> Iterator[Module]:
        """The module with all its weights, on every rank; it is called by itself, as often as a rank likes."""
        entry = vars(module).get(_ENTRY)
        with (
            self._gathered(module) as whole,
            torch.autocast(self.device.type, torch.bfloat16, enabled=entry is not None and entry.autocast),
        ):
            yield whole

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """As `parameters_of`: whole tensors, on the first rank at least."""
        return parameters_of(module)

    def restore(self, module: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """As `restore_parameters`, from whole tensors on every rank."""
        restore_parameters(module, saved)

    def _enter(self, root: Callable[..., Any] | None, modules: Mapping[str, nn.Module], autocast: bool) -> Entry:
        entry = Entry(root, self.device.type, autocast)
        if root is not None or entry.autocast:
            for module in modules.values():
                vars(module)[_ENTRY] = entry  # past nn.Module, which would make the root a part of its part
        return entry

    @contextlib.contextmanager
    def _gathered(self, module: Module) -> Iterator[Module]:
        yield module

    @contextlib.contextmanager
    def _filled(self, module: Module, whole: Callable[[Tensor], Tensor]) -> Iterator[Module]:
        """The hollow copy of a module that was cut, with `whole` of each of its weights; else the module."""
        sampled = self.to_sample(module)
        pairs = [] if sampled is module else list(zip(module.parameters(), sampled.parameters(), strict=True))
        try:
            for shard, empty in pairs:
                empty.data = whole(shard.detach())
            yield sampled
        finally:
            for _, filled in pairs:
                filled.data = filled.new_empty(0)

    def _recompute(self, module: nn.Module) -> None:
        """Have each layer keep its input alone, and compute the rest again in the backward pass."""
        if views := [part for part in module.modules() if isinstance(part, AdapterView)]:
            views[0].recompute_layers()
        for layer in layers(module):
            cast(Any, layer).forward = _Recomputed(layer.forward, self._reenters)

    _reenters = False  # which of torch's two kinds of checkpoint is used

    @abstractmethod
    def _train(self, modules: Mapping[str, nn.Module], betas: tuple[float, float], weight_decay: float) -> Training: ...


@dataclass(frozen=True)
class _Recomputed:
    forward: Callable[..., Any]
    reenters: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if not self.reenters:
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        if not any(isinstance(x, Tensor) and x.requires_grad for x in args):  # after frozen ones it would not learn
            return self.forward(*args, **kwargs)
        return checkpoint(lambda *inputs: self.forward(*inputs, **kwargs), *args, use_reentrant=True)


def optimiser(training: Training, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """One group of parameters for each module; the rates come with each step."""
    groups = [{"params": list(training.learnt(name).values()), "lr": 0.0} for name in training.modules]
    return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay)


class Replicated(Distribution):
    """All weights on every rank."""

    def _train(self, modules: Mapping[str, nn.Module], betas: tuple[float, float], weight_decay: float) -> Training:
        entry = self._enter(None, modules, self.hardware.bf16)
        return Whole(modules, entry, betas, weight_decay)


class TorchTraining(Training):
    """With torch's own AdamW."""

    def __init__(
        self, modules: Mapping[str, nn.Module], entry: Entry, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(modules)
        self.entry = entry
        self.optimiser = optimiser(self, betas, weight_decay)

    def loss(self, call: Callable[[], Tensor]) -> Tensor:
        return self.entry(call)

    def step(self, rates: Mapping[str, float]) -> None:
        for group, name in zip(self.optimiser.param_groups, self.modules, strict=True):
            group["lr"] = rates[name]
        self.optimiser.step()

    def clear(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)

    def restore(self, moments: Moments) -> None:
        self.optimiser.state.clear()
        for name, parameters in moments.items():
            learnt = self.learnt(name)
            for key, saved in parameters.items():
                moved = {moment: self._placed(saved[moment], learnt[key]) for moment in MOMENTS}
                self.optimiser.state[learnt[key]] = {"step": saved["step"].clone(), **moved}

    @abstractmethod
    def _placed(self, moment: Tensor, parameter: nn.Parameter) -> Tensor:
        """A copy of a whole moment, where and as the parameter is."""


class Whole(TorchTraining):
    """Gradients are this rank's until they are clipped, and then the same to the bit on every rank.

    What they are computed through may be in shards, such as the base of adapters; then all ranks compute equally often.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], entry: Entry, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(modules, entry, betas, weight_decay)
        self.in_step = entry.root is not None

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.modules.values())).parameters()).device

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def clip(self, longest: float) -> dict[str, float]:
        norms = {}
        for name, module in self.modules.items():
            ranks.sum_gradients(module.parameters())
            norms[name] = nn.utils.clip_grad_norm_(module.parameters(), longest).item()
        return norms

    def moments(self) -> Moments:
        """The ranks make sure first that they have the same weights.

        Raises:
            RuntimeError: they have not; a checkpoint of this would be a mixture.
        """
        for name, module in self.modules.items():
            ranks.check_equal(f"weights of {name}", module.parameters())
        state = self.optimiser.state
        return {
            name: {key: dict(state[p]) for key, p in self.learnt(name).items() if p in state} for name in self.modules
        }

    def _placed(self, moment: Tensor, parameter: nn.Parameter) -> Tensor:
        return moment.to(parameter.device, copy=True)


@dataclass(frozen=True)
class Gathering:
    """A rollout engine that has the whole weights of a policy while it generates."""

    engine: RolloutEngine
    policy: nn.Module
    distribution: Distribution

    def sync(self) -> None:
        with self.distribution.whole(self.policy):
            self.engine.sync()

    def generate(self, prompts: PromptBatch, samples: int, seed: int) -> Rollout:
        with self.distribution.whole(self.policy):
            return self.engine.generate(prompts, samples, seed)


def hollow(module: Module, device: torch.device, common: Sequence[Any] = ()) -> Module:
    """A copy of a module without its weights, in evaluation mode; a weight that is shared stays so.

    Args:
        common: objects that the copy has in common with the module.
    """
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(0, dtype=p.dtype, device=device), requires_grad=False)
        for p in module.parameters()
    }
    empty |= {id(one): one for one in common}
    given = {key: vars(module).pop(key) for key in (_ENTRY, _TRAINING, COPY) if key in vars(module)}
    copied = copy.deepcopy(module, empty).to(device)
    vars(module).update(given)
    return copied.eval()
