"""When memory runs out: in which phase of a run, for how much, and which setting would make it fit.

Microbatches are cut by settings that change memory and speed only, so that the same command with a smaller one goes on
with the same mathematics.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rlhf_lab.engine.high_water import held

# what an allocator says that has no type of its own for it: torch on CPU, CUDA's libraries, C++, the kernel; and
# Python, where no memory was left for the error itself
_SAID = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|not enough memory|bad_alloc|ALLOC_FAILED"
    r"|MemoryAllocation|error return without exception set",
    re.IGNORECASE,
)
_ASKED = re.compile(r"(?:tried to allocate|allocate|alloc)\s+([\d.]+)\s*(bytes|[KMGT]i?B)", re.IGNORECASE)
_BYTES = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_ELSE = "hardware.gradient_checkpointing=true or hardware=fsdp need less, and so does model.peft=lora, as another run"
BUDGET, IN_FLIGHT = "learner.tokens_at_once", "sampling.batch_size"


class OutOfMemory(RuntimeError):
    """Memory ran out; says in which phase, how much was asked for and in use, and what to change.

    Args:
        where: the phase; "" where it is not known, for the one around it to say.
        advice: what would fit.
        cause: what the allocator said.
    """

    def __init__(self, where: str, advice: str, cause: BaseException) -> None:
        self.where, self.advice, self.cause = where, advice, cause
        amount = asked(cause)
        wanted = f"{size(amount)} more were asked for, " if amount else ""
        super().__init__(f"out of memory{where and f' in the {where}'}: {wanted}{held()} in use; {advice}")


def size(amount: float) -> str:
    """Bytes as a person says them."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if amount >= _BYTES[unit[0].lower()]), "KiB")
    return f"{amount / _BYTES[unit[0].lower()]:.1f} {unit}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how running out of memory shows: by its type, or by what it says."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | SystemError) and bool(_SAID.search(str(error)))


def asked(error: BaseException) -> int:
    """How many bytes were asked for; 0 if it does not say."""
    found = _ASKED.search(str(error))
    return round(float(found[1]) * _BYTES[found[2][0].lower()]) if found else 0


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase of a run: running out of memory in it is said under its name, or under that of a phase within.

    Raises:
        OutOfMemory: it ran out.
    """
    try:
        yield
    except OutOfMemory as error:
        if error.where:
            raise
        raise OutOfMemory(name, error.advice, error.cause) from error.cause
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(name, f"no microbatch was at work, so a smaller one is no help: {_ELSE}", error) from error


@contextmanager
def reading(lengths: Tensor, tokens_at_once: int) -> Iterator[None]:
    """Work on a microbatch that was cut to a budget of tokens: if memory runs out, a budget is named that halves it.

    Args:
        lengths: (b,) real tokens of its rows.

    Raises:
        OutOfMemory: it ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        rows, longest = len(lengths), int(lengths.max())
        # where rows share a prompt, it counts once, and more rows fit a budget
        smaller = max(longest, min(rows * longest, tokens_at_once) // 2)
        found = f"{rows} sequences of up to {longest} tokens at once ({BUDGET}={tokens_at_once})"
        if rows == 1:
            advice = (
                f"one sequence of {longest} tokens alone does not fit: {_ELSE}, or shorten sampling.max_new_tokens or "
                "dataset.max_prompt_tokens"
            )
        else:
            advice = f"{found} are too many: the same command with {BUDGET}={smaller} continues"
        raise OutOfMemory("", advice, error) from error


@contextmanager
def sampling(prompts: int, samples: int, batch_size: int) -> Iterator[None]:
    """Responses in flight together: if memory runs out, a number of them is named that is half of it.

    Raises:
        OutOfMemory: it ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        smaller = max(1, prompts // 2) * samples
        found = f"{prompts * samples} responses at once ({IN_FLIGHT}={batch_size})"
        if prompts == 1:
            advice = (
                f"the {samples} responses to one prompt do not fit: {_ELSE}, or lower sampling.max_new_tokens or the "
                "number of samples"
            )
        else:
            advice = f"{found} are too many: the same command with {IN_FLIGHT}={smaller} continues"
        raise OutOfMemory("", advice, error) from error
