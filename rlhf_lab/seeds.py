"""Every random number of a run comes from a seed derived from the run's seed, a purpose and a position.

Nothing about randomness has to be saved: step 17 of a resumed run derives what step 17 of any run derives.
"""

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that is a function of its arguments only, e.g. `derive(0, "sampling", step)`."""
    spelled = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(spelled.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator at `derive(seed, *purpose)`."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
