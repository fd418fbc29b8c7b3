"""The wish that this process stops: said by a signal, heeded at the next boundary between two steps."""

import signal
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_asked: list[str] = []  # the signals that came, by name


class Stopped(BaseException):
    """Work ended on request at a step boundary, and everything is saved; the same command continues it.

    No `Exception`, as `KeyboardInterrupt` is none: what goes on after one failed run must not go on after a request.
    """


def listen() -> None:
    """From now on SIGUSR2 and SIGTERM no longer end this process; `requested` says that they came.

    Raises:
        ValueError: called outside of the main thread, which alone may handle signals.
    """
    for number in SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a rank is started with them held back until here


def ignore() -> None:
    """From now on they are not even noted: for the end of a process, where Python would let them kill it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> str | None:
    """What asked this process to stop (the first signal's name), or None."""
    return _asked[0] if _asked else None


def is_warning() -> bool:
    """Whether nothing but SIGUSR2 came: some time is left, and the work will go on elsewhere. SIGTERM is an end."""
    return bool(_asked) and signal.SIGTERM.name not in _asked


def forget() -> None:
    """Take every request back, in a process that goes on to other work."""
    _asked.clear()


def _note(number: int, frame: FrameType | None) -> None:
    _asked.append(signal.Signals(number).name)
