"""What the GPUs measure of themselves, read now and then and kept for whoever asks.

It owns the last readings and their age. It never changes a GPU, and asking it never calls the
driver: a monitoring system that asks often, or a driver that is slow, costs nobody else anything.
The invariant: readings older than STALE_S are none at all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from partitioner.errors import PartitionerError
from partitioner.readings import GpuReadings

POLL_S = 10.0
STALE_S = 30.0

log = logging.getLogger(__name__)


class GpuMonitor:
    """`read` reads every GPU, with a deadline of its own."""

    def __init__(
        self,
        read: Callable[[], Awaitable[tuple[GpuReadings, ...]]],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._read = read
        self._clock = clock
        self._sleep = sleep
        self._last: tuple[GpuReadings, ...] = ()
        self._read_s: float | None = None
        self._failing = False

    def latest(self) -> tuple[GpuReadings, ...]:
        """The last readings; none when they are stale."""
        if self._read_s is None or self._clock() - self._read_s > STALE_S:
            return ()
        return self._last

    async def run(self) -> None:
        """Read for ever. A failure is said once, until it works again."""
        while True:
            try:
                self._last = await self._read()
                self._read_s = self._clock()
                self._failing = False
            except PartitionerError as error:
                if not self._failing:
                    log.warning("GPUs cannot be read for monitoring: %s", error)
                self._failing = True
            await self._sleep(POLL_S)
