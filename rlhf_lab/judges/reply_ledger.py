"""Every reply that was paid for, on disk under a digest of what was sent: asked once, read ever after.

One file of JSON lines for one model and its decoding, which is only ever appended to:

    {"covers": {...}}                             the first line: what the digests cover beside the messages
    {"asked": key, "dollars": 0.01}               before a call: it may cost this much
    {"lost": key, "why": …, "dollars": 0.01}      no reply, or not a whole one: what may have been paid for it
    {"key": key, "text": …, "finish": …, …}       what came

A half line that a crash left is cut off by the next who writes. A call that was asked and has no reply was in flight
when its process died: its reply is not known to be paid, so it is asked again, and its price is counted as spent.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import IO, Any

FLUSHED_EVERY = 0.2  # seconds: what a power cut may cost; the death of a process costs nothing that was written


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back for one call.

    Fields:
        text: what the model wrote; "" if it refused.
        finish: why it ended, in the endpoint's word; or why the endpoint would not answer, see `was_refused`.
        dollars: at the prices that were declared when it was asked.
        model: who answered, as the endpoint says.
    """

    text: str
    finish: str
    prompt_tokens: int
    reply_tokens: int
    dollars: float
    model: str
    was_refused: bool = False


class SpendCap(ValueError):
    """The next call could cost more than may be spent; what was answered is kept, and a higher cap goes on from it."""


def digest(*parts: Any) -> str:
    """128 bits, in hexadecimal, of plain data; equal data in any process give equal digests."""
    return sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


class ReplyLedger:
    """The replies of one model, by key. Where each stands is kept in memory, not what it says.

    Args:
        covers: what the keys cover beside the messages; stands in the first line, for people.
        cap: dollars that the file may hold in all; None for no cap.
    """

    def __init__(self, path: Path, covers: Mapping[str, Any], cap: float | None) -> None:
        self.path, self.covers, self.cap = path, covers, cap
        self.spent = (
            0.0  # dollars; of calls in flight, and of lost replies that may have been paid, their highest price
        )
        self._places: dict[str, tuple[int, int]] = {}
        self._in_flight: dict[str, float] = {}
        self._read_to = 0
        self._file: IO[bytes] | None = None
        self._flushed = 0.0
        if path.exists():
            self._refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def in_flight(self) -> frozenset[str]:
        """Keys of calls that were asked and of which nothing is known."""
        return frozenset(self._in_flight)

    def __getitem__(self, key: str) -> Reply:
        start, size = self._places[key]
        with self.path.open("rb") as file:
            file.seek(start)
            said = json.loads(file.read(size))
        return Reply(**{name: value for name, value in said.items() if name != "key"})

    @contextmanager
    def held(self) -> Iterator[None]:
        """Alone with the file: whoever else asks this model waits, and then finds the replies here."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._refresh()
            os.ftruncate(file.fileno(), self._read_to)  # a half line, of a process that is dead
            self._file = file
            try:
                if not self._read_to:
                    self._write({"covers": self.covers})
                yield
            finally:
                self._file = None
                os.fsync(file.fileno())

    def asked(self, key: str, dollars: float) -> None:
        """A call is about to be made that may cost this much, set aside so that calls side by side cannot overspend.

        Raises:
            SpendCap: it does not fit under the cap.
        """
        if self.cap is not None and self.spent + dollars > self.cap:
            raise SpendCap(
                f"judge.spend_cap={self.cap:g} dollars, of which {self.spent:.4f} are spent or set aside in "
                f"{self.path}, and the next call may cost {dollars:.4f}; every reply so far is kept: raise the cap and "
                "give the same command again"
            )
        self._write({"asked": key, "dollars": dollars})

    def lost(self, key: str, why: str, was_paid: bool) -> None:
        """There is no reply, or not a whole one; `was_paid` if it may have been paid for all the same."""
        self._write({"lost": key, "why": why, "dollars": self._in_flight[key] if was_paid else 0.0})

    def answered(self, key: str, reply: Reply) -> None:
        """A reply came. Once this returns, no death of this process loses it."""
        self._write({"key": key} | asdict(reply))

    def _write(self, said: Mapping[str, Any]) -> None:
        assert self._file is not None, "the ledger is written to while it is held"
        line = (json.dumps(said) + "\n").encode()
        waiting = memoryview(line)
        while waiting:
            waiting = waiting[os.write(self._file.fileno(), waiting) :]
        self._enter(said, self._read_to, len(line))
        self._read_to += len(line)
        if monotonic() - self._flushed > FLUSHED_EVERY:
            os.fsync(self._file.fileno())
            self._flushed = monotonic()

    def _refresh(self) -> None:
        """Read what was appended since; a last line without its end is not read."""
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    self._enter(json.loads(line), self._read_to, len(line))
                except (ValueError, KeyError, AttributeError) as error:
                    raise ValueError(
                        f"{self.path}, the line at byte {self._read_to}: {error}; it is damaged. Restore the file, or "
                        "delete the line: what it holds will be asked again"
                    ) from error
                self._read_to += len(line)

    def _enter(self, said: Mapping[str, Any], start: int, size: int) -> None:
        if key := said.get("key"):
            self._places[key] = (start, size)
            self.spent += said["dollars"] - self._in_flight.pop(key, 0.0)
        elif key := said.get("asked"):
            # asked again after its reply was lost with a process: the former price stays counted
            self._in_flight[key] = said["dollars"]
            self.spent += said["dollars"]
        elif key := said.get("lost"):
            self.spent += said["dollars"] - self._in_flight.pop(key, 0.0)
        elif "covers" not in said:
            raise ValueError(f"expected one of key, asked, lost, covers, found {sorted(said)}")
