"""Time for tests of the client."""

from __future__ import annotations

from collections.abc import Callable


class ManualClock:
    """Time that passes only by sleeping; `on_sleep` is called at each."""

    def __init__(self, on_sleep: Callable[[], None] = lambda: None) -> None:
        self.now = 100.0
        self.pauses: list[float] = []
        self.on_sleep = on_sleep

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        self.on_sleep()
