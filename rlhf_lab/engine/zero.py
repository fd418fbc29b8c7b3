"""DeepSpeed's ZeRO through accelerate: moments in shards (1), gradients too (2), weights too (3).

Imported where it is asked for, since DeepSpeed takes seconds to import.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from deepspeed.utils import (
    logger,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from torch import Tensor, distributed, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf_lab.engine import ranks
from rlhf_lab.engine.distribution import COPY, MOMENTS, Distribution, Entry, Moments, Root, Training, hollow, optimiser
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.parameters import matched, parameters_of

Module = TypeVar("Module", bound=nn.Module)
BUCKET = 50_000_000  # elements that travel together
KEPT_WHOLE = 1000  # elements: smaller weights, biases and those of norms, are not cut by ZeRO-3


class Zero(Distribution):
    """DeepSpeed cuts what its stage says; below stage 3 every rank has all weights, also of frozen modules.

    Raises:
        RuntimeError: accelerate set up something else than was asked for, which it does not say by itself.
    """

    # the other kind compares what is computed again with what was, and finds ZeRO-3's weights gone
    _reenters = True

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(hardware)
        self.stage = int(hardware.distribution[-1])
        logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # of what it calls
        # it would be compiled, by all ranks at once, and a rank that is killed meanwhile stops every later run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        AcceleratorState._reset_state(reset_partial_state=True)  # of other hardware in this process
        plugin = DeepSpeedPlugin(hf_ds_config=self._config(), gradient_accumulation_steps=1)
        by_gloo = [InitProcessGroupKwargs(backend="gloo")] if self.device.type == "cpu" else []
        self.accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=list(by_gloo))
        # else transformers would cut whatever is read from now on, also what samples and is never entered
        unset_hf_deepspeed_config()
        found = (self.accelerator.distributed_type, self.accelerator.num_processes, plugin.zero_stage)
        if found != (DistributedType.DEEPSPEED, ranks.world(), self.stage):
            raise RuntimeError(
                f"hardware.distribution={hardware.distribution} with {ranks.world()} processes became {found}"
            )

    def _config(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """DeepSpeed's own settings: no averages over microbatches, no clipping; the learner does that."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": KEPT_WHOLE,
        }
        if self.hardware.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            zero |= {"offload_param": {"device": "cpu"}} if self.stage == 3 else {}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "train_batch_size": ranks.world(),
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # its own AdamW has to be compiled
            "bf16": {"enabled": dtype == torch.bfloat16},
            "steps_per_print": 10**9,
        }

    @property
    def loads_on(self) -> torch.device:
        return torch.device("cpu") if self.stage == 3 else self.device

    def _cut_frozen(self, module: nn.Module) -> nn.Module | None:
        if self.stage < 3:
            return None
        dtype = next(module.parameters()).dtype
        engine, *_ = deepspeed.initialize(model=Root({"frozen": module}), config=self._config(dtype))
        return engine

    @torch.no_grad()
    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, tensor in parameters_of(module).items():  # one at a time
            with self._present([tensor]):
                whole |= {name: tensor.detach().to("cpu", copy=True)} if ranks.is_first() else {}
        return whole

    @torch.no_grad()
    def restore(self, module: nn.Module, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in matched(module, saved).items():
            with self._present([tensor], modifier_rank=0):
                if not hasattr(tensor, "ds_id") or ranks.is_first():
                    tensor.copy_(saved[name])
            # and what the optimiser keeps of it
            if hasattr(tensor, "ds_id") and tensor.requires_grad:
                safe_set_local_fp32_param(tensor, self._part(saved[name], tensor))
            elif hasattr(tensor, "_hp_mapping"):
                safe_set_full_fp32_param(tensor, saved[name].to(tensor.device))

    def _train(self, modules: Mapping[str, nn.Module], betas: tuple[float, float], weight_decay: float) -> Training:
        if self.stage == 3:
            for module in modules.values():
                vars(module)[COPY] = hollow(module, self.device)
        self.accelerator.free_memory()  # of the run before, whose output this one may need
        root = Root(modules)
        training = ZeroTraining(modules, self)
        training.engine, _ = cast(Any, self.accelerator.prepare(root, optimiser(training, betas, weight_decay)))
        training.entry = self._enter(training.engine, modules, self.hardware.bf16)
        return training

    @contextlib.contextmanager
    def _gathered(self, module: Module) -> Iterator[Module]:
        cut: list[Tensor] = [] if self.to_sample(module) is module else [*module.parameters()]
        with self._present(cut), self._filled(module, lambda present: present) as whole:
            yield whole

    def _present(self, tensors: list[Tensor], modifier_rank: int | None = None) -> Any:
        """A context in which weights are there, on every rank."""
        cut = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        return deepspeed.zero.GatheredParameters(cut, modifier_rank=modifier_rank, enabled=bool(cut))

    @staticmethod
    def _part(whole: Tensor, parameter: Tensor) -> Tensor:
        """This rank's part of a tensor, as ZeRO-3 cuts its parameter: in equal pieces, the last one filled up."""
        size = cast(Any, parameter).ds_tensor.numel()
        padded = nn.functional.pad(whole.reshape(-1), (0, size * ranks.world() - whole.numel()))
        return padded[size * ranks.rank() :][:size].to(parameter.device)


class ZeroTraining(Training):
    """One DeepSpeed engine over all modules, which sums and steps; each module's gradient is cut here."""

    in_step = True
    engine: Any
    entry: Entry

    def __init__(self, modules: Mapping[str, nn.Module], distribution: Zero) -> None:
        super().__init__(modules)
        self.distribution = distribution

    @property
    def device(self) -> torch.device:
        return self.distribution.device

    @property
    def _inner(self) -> torch.optim.AdamW:
        return self.engine.optimizer.optimizer

    def loss(self, call: Callable[[], Tensor]) -> Tensor:
        return self.entry(call)

    def backward(self, loss: Tensor, last: bool) -> None:
        stage1 = self.distribution.stage == 1
        # with offload DeepSpeed (0.19.8) steps on no gradients but of parameters that the pass at the boundary reaches,
        # which may be one loss of several; so it is told of the boundary after that pass, and hands over all gradients
        self.engine.set_gradient_accumulation_boundary(last and stage1)
        self.engine.backward(loss * ranks.world())  # it averages over the ranks
        if last and not stage1:
            self.engine.optimizer.finalize_gradient_accumulation_boundary()
            self.engine.set_gradient_accumulation_boundary(True)

    def clip(self, longest: float) -> dict[str, float]:
        norms = {}
        for name in self.modules:
            learnt = list(self.learnt(name).values())
            norms[name] = self._norm(learnt)
            factor = longest / (norms[name] + 1e-6)  # as torch's clip_grad_norm_
            if factor < 1:
                for p in learnt:
                    self._set(p, self._gradient(p) * factor)
        return norms

    def _norm(self, learnt: list[nn.Parameter]) -> float:
        squares = torch.stack([self._gradient(p).float().square().sum() for p in learnt]).sum()
        if self.distribution.stage == 3:
            distributed.all_reduce(squares)
        return math.sqrt(squares.item())

    def _gradient(self, p: nn.Parameter) -> Tensor:
        """This rank's part of it in stage 3, all of it below."""
        return cast(Tensor, safe_get_local_grad(p) if self.distribution.stage == 3 else safe_get_full_grad(p))

    def _set(self, p: nn.Parameter, gradient: Tensor) -> None:
        (safe_set_local_grad if self.distribution.stage == 3 else safe_set_full_grad)(p, gradient)

    def step(self, rates: Mapping[str, float]) -> None:
        for group, name in zip(self._inner.param_groups, self.modules, strict=True):
            group["lr"] = rates[name]
        self.engine.step()

    @property
    def _flat(self) -> list[Tensor]:
        """This rank's weights as AdamW moves them, one tensor or several for each group."""
        name = "fp32_partitioned_groups_flat" if self.distribution.stage == 3 else "single_partition_of_fp32_groups"
        return getattr(self.engine.optimizer, name)

    def clear(self) -> None:
        """Each step does it, but for buffers that DeepSpeed (0.19.8) keeps from step to step.

        A parameter that the first microbatch does not reach would have what is in them added to its gradient; one that
        none reaches would have it for a gradient.
        """
        zero, stage3 = self.engine.optimizer, self.distribution.stage == 3
        kept = [zero.grad_partitions_flat_buffer] if stage3 else []
        if self.distribution.hardware.offload:
            kept += [cast(Tensor, one.grad) for one in self._flat]
            kept += [] if stage3 else zero.accumulated_grads_in_cpu.values()
        for gradient in kept:
            gradient.zero_()

    def moments(self) -> Moments:
        if not self._inner.state:
            return {name: {} for name in self.modules}
        self._link()
        step = float(next(iter(self._inner.state.values()))["step"])
        whole: Moments = {}
        for name in self.modules:
            whole[name] = {}
            for key, p in self.learnt(name).items():
                found = {moment: cast(Tensor, safe_get_full_optimizer_state(p, moment)) for moment in MOMENTS}
                if ranks.is_first():
                    whole[name][key] = {"step": torch.tensor(step), **{k: v.cpu() for k, v in found.items()}}
        return whole

    def _link(self) -> None:
        """Have the moments be found by parameter: DeepSpeed does it when the first of several groups has them alone."""
        if self.distribution.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def restore(self, moments: Moments) -> None:
        saved = [parameter for parameters in moments.values() for parameter in parameters.values()]
        self._inner.state.clear()
        if not saved:
            return
        for one in self._flat:
            # a copy: the step is counted in place
            state = {"step": saved[0]["step"].clone(), **{moment: torch.zeros_like(one) for moment in MOMENTS}}
            self._inner.state[one] = state
        self._link()
        for name, parameters in moments.items():
            learnt = self.learnt(name)
            for key, values in parameters.items():
                for moment in MOMENTS:
                    p = learnt[key]
                    if self.distribution.stage == 3:
                        part = self.distribution._part(values[moment], p)
                        safe_set_local_optimizer_state(p, part, moment)
                    else:
                        safe_set_full_optimizer_state(p, values[moment].to(p.device), moment)
