"""Where a run computes: its device, precision and distribution."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from rlhf_lab.types import Count


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where a run computes, in which precision, and where its weights are; changes nothing else.

    Raises:
        ValueError: settings do not go together, or a package that they need is not installed.
    """

    device: str  # cpu, cuda, cuda:1, …
    dtype: Literal["float32", "bfloat16"]  # of the weights of reward and cost models
    threads: Count  # of torch, per process; more than the free cores is slower, by far
    distribution: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"  # ddp: each process holds all weights
    offload: bool = False  # of what is sharded into the CPU's memory
    bf16: bool = False  # policies, references and critics compute in bfloat16; their weights stay in float32
    gradient_checkpointing: bool = False  # layers are computed again in the backward pass: less memory, a third slower

    def __post_init__(self) -> None:
        if self.offload and self.distribution == "ddp":
            raise ValueError(
                "hardware.offload=true moves shards, but with hardware.distribution=ddp each process holds all "
                "weights; use hardware=fsdp or zero1 to zero3, or hardware.offload=false"
            )
        needed = ("accelerate", "deepspeed") if self.distribution.startswith("zero") else ()
        if missing := [name for name in needed if find_spec(name) is None]:
            raise ValueError(
                f"hardware.distribution={self.distribution} needs {' and '.join(missing)}: "
                "pip install -c constraints.txt -e '.[distributed]'"
            )

    def start(self) -> torch.device:
        """Apply the settings to this process.

        Raises:
            ValueError: the device is not there.
        """
        torch.set_num_threads(self.threads)
        if self.device == "cpu":  # DeepSpeed, which transformers imports whenever a model is saved, would warn of it
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"hardware.device={self.device}, but torch sees no GPU; use hardware=cpu")
        return torch.device(self.device)
