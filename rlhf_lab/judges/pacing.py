"""How fast an endpoint may be asked."""

import asyncio
from time import monotonic


class Pace:
    """No more than so many calls and tokens a minute, evenly: a burst is what endpoints refuse.

    Args:
        requests, tokens: a minute; None for no cap.
    """

    def __init__(self, requests: float | None, tokens: float | None) -> None:
        self._seconds_per = (60 / requests if requests else 0.0, 60 / tokens if tokens else 0.0)
        self._free = self._rests_until = 0.0

    async def turn(self, tokens: float) -> None:
        """Wait until a call of so many tokens, prompt and reply, may begin."""
        per_request, per_token = self._seconds_per
        begins = max(monotonic(), self._free)
        self._free = begins + max(per_request, per_token * tokens)
        while (wait := max(begins, self._rests_until) - monotonic()) > 0:
            await asyncio.sleep(wait)

    def hold(self, seconds: float) -> None:
        """The endpoint asked for a rest: no call begins before it is over."""
        self._rests_until = max(self._rests_until, monotonic() + seconds)
