"""Watching over MPS shares: servers that are well, workers that are their clients.

It owns the loop and its pace. What is wrong with a place, and how it is mended, is the
partitioner's. It starts no worker: the fleet does, as after any end. The invariant: a fatal fault
in one share ends with every worker of that place started anew, warm, and no other touched.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from daemon.control.errors import ControlError
from daemon.control.state.world import World
from partitioner.mps.mending import EndWorker, Mended
from partitioner.mps.sightings import Workers

CHECK_INTERVAL_S = 5.0

log = logging.getLogger(__name__)


class Mendable(Protocol):
    """The places under MPS."""

    def noted(self) -> tuple[object, ...]: ...
    async def mend(self, workers: Workers, end_worker: EndWorker) -> Mended: ...


class ShareWatch:
    """Looks every few seconds, and when a worker has ended; asks nobody where nothing is shared."""

    def __init__(self, world: World, sharing: Mendable, end_worker: EndWorker) -> None:
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
        found = await self._sharing.mend(self._pids, self._end)
        for name in found.places:
            self._warn(f"MPS of {name} was in fault; its workers were restarted")
        for problem in found.problems:
            self._warn(f"MPS: {problem}")

    def _pids(self) -> dict[str, int]:
        return {name: each.pid for name, each in self._world.processes.workers.items()}

    async def _end(self, partition: str) -> None:
        try:
            await self._end_worker(partition)
        except ControlError as error:
            # Its neighbours are to be served again all the same, by a new daemon if need be.
            log.error("the worker of %s cannot be ended: %s", partition, error)

    def _warn(self, text: str) -> None:
        """Say it among the node's warnings once: it may be found at each look."""
        log.warning("%s", text)
        if text not in self._world.warnings:
            self._world.warnings.append(text)
