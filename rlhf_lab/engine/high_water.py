"""How much memory this process holds, and held at most: since it began, or since a mark."""

import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

MIB = 2**20
_KERNEL_FORGETS = Path("/proc/self/clear_refs")  # Linux; a 5 lowers the kernel's high-water mark to what is held now
_before = [(0.0, 0.0)]  # the highest marks that were forgotten


def _of_kernel() -> float:
    """MiB of main memory at most, as far as the kernel remembers."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def _of_devices() -> float:
    """MiB that torch held at most on its devices; 0 without any."""
    if not torch.cuda.is_initialized():
        return 0.0
    return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / MIB


def since_mark() -> tuple[float, float]:
    """(main memory, devices) in MiB, at most since `mark`; where the kernel cannot forget, since the process began."""
    return _of_kernel(), _of_devices()


def since_begin() -> tuple[float, float]:
    """(main memory, devices) in MiB, at most since the process began."""
    return highest([since_mark(), *_before])


def highest(marks: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The most main memory and the most of the devices among marks."""
    return max(main for main, _ in marks), max(devices for _, devices in marks)


def mark() -> None:
    """Begin to measure anew what `since_mark` says."""
    _before[:] = [since_begin()]
    with suppress(OSError):  # another system, or a sandbox
        _KERNEL_FORGETS.write_text("5")
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def held() -> str:
    """What is in use now, on the devices where there are any, in words."""
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        ours = sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))
        return f"{ours / 2**30:.1f} GiB of tensors ({(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB)"
    with suppress(OSError, IndexError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return f"{pages * resource.getpagesize() / 2**30:.1f} GiB"
    return f"at most {_of_kernel() / 1024:.1f} GiB"
