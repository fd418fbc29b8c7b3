"""Where the runs of a sweep run: here, one after the other; in the background of this machine; or on a cluster."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Here:
    """One run after the other, in the process that was started."""

    kind: ClassVar[str] = "here"
