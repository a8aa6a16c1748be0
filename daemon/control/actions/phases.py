"""How long each part of a change took, one after the other.

It owns the times since it was made. It decides nothing. The invariant: the parts add up to the
whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import msgspec

from daemon.control.state.running import Outcome


class Phases:
    """Ends one part after the other; the next one begins where the last one ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self.milliseconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """The part that has just ended was this one."""
        now_s = self._clock()
        self.milliseconds[name] = 1000 * (now_s - self._began_s)
        self._began_s = now_s


def timed(outcome: Outcome, phases: Phases) -> Outcome:
    """The outcome of a change of layout, with how long its parts took."""
    assert outcome.result.layout is not None
    layout = msgspec.structs.replace(outcome.result.layout, phases_ms=phases.milliseconds)
    return replace(outcome, result=msgspec.structs.replace(outcome.result, layout=layout))
