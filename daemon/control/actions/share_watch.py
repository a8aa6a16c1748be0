"""Watching over MPS shares: servers that are well, workers that are their clients.

It owns the loop and its pace. What is wrong with a place, and how it is mended, is the
partitioner's. It starts no worker: the fleet does, as after any end. The invariant: a fatal fault
in one share ends with every worker of that place started anew, warm, and no other touched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from daemon.control.state.world import World
from partitioner.errors import PartitionerError

CHECK_INTERVAL_S = 5.0

log = logging.getLogger(__name__)


class Mendable(Protocol):
    """The places under MPS."""

    def noted(self) -> tuple[object, ...]: ...
    async def mend(
        self, workers: Mapping[str, int], end_worker: Callable[[str], Awaitable[None]]
    ) -> tuple[str, ...]: ...


class ShareWatch:
    """Looks every few seconds, and when a worker has ended; asks nobody where nothing is shared."""

    def __init__(
        self, world: World, sharing: Mendable, end_worker: Callable[[str], Awaitable[None]]
    ) -> None:
        self._world = world
        self._sharing = sharing
        self._end_worker = end_worker
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look soon: something has ended."""
        self._wake.set()

    async def run(self) -> None:
        """Look and mend for ever."""
        while True:
            try:
                async with asyncio.timeout(CHECK_INTERVAL_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if self._sharing.noted():
                await self.look()

    async def look(self) -> None:
        """Look once."""
        workers = {name: each.pid for name, each in self._world.processes.workers.items()}
        try:
            mended = await self._sharing.mend(workers, self._end_worker)
        except PartitionerError as error:
            log.error("an MPS server cannot be brought back: %s", error)
            self._world.warnings.append(f"an MPS server cannot be brought back: {error}")
            return
        for name in mended:
            log.warning("MPS of %s was in fault; its workers are started again", name)
            self._world.warnings.append(f"MPS of {name} was in fault; its workers were restarted")
