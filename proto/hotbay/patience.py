"""Waiting for a daemon that is away for a moment: a clock, and how long and how often to retry.

An upgrade or a crash of hotbayd takes seconds and leaves its operations running, so whoever waits
for one, or watches, goes on when it is back. It never retries a daemon that has not answered yet:
that one is not away, it is not there, and the caller wants to know at once.
"""

from __future__ import annotations

import time
from typing import Protocol

from hotbay.errors import HotbayError

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


class Clock(Protocol):
    """Time, as the client needs it."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment."""

    def sleep(self, seconds: float) -> None:
        """Return that much later."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Outage:
    """One wait's tolerance: pauses between attempts that double, up to `limit_s` in one piece."""

    def __init__(self, clock: Clock, limit_s: float, *, answered: bool) -> None:
        self._clock = clock
        self._limit_s = limit_s
        self._answered = answered
        self._since: float | None = None
        self._pause_s = FIRST_PAUSE_S

    def over(self) -> None:
        """The daemon answered."""
        self._answered = True
        self._since = None
        self._pause_s = FIRST_PAUSE_S

    def pause(self, error: HotbayError, *, until: float | None = None) -> None:
        """Sleep before the next attempt, or raise `error` when there is to be none.

        `until` is a moment of the clock after which nobody waits any more.
        """
        now = self._clock.monotonic()
        self._since = now if self._since is None else self._since
        if not self._answered or now - self._since >= self._limit_s:
            raise error
        pause_s = self._pause_s if until is None else min(self._pause_s, max(0.0, until - now))
        self._clock.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
