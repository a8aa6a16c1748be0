"""The thread that hears XIDs, and the way of what it hears into the daemon's event loop.

It owns the thread's life and the queue between the two. It judges nothing. The invariants: what was
heard is handed on in order; a driver that reports without end takes bounded memory.
"""

from __future__ import annotations

import asyncio
import logging

from daemon.control.actions.health import Health
from partitioner.nvml_events import EventThread, XidEvent
from partitioner.nvml_gate import NvmlGate

EVENTS_WAITING_MAX = 1024

log = logging.getLogger(__name__)


class XidListener:
    """Run `run` as a task."""

    def __init__(self, health: Health, gate: NvmlGate) -> None:
        self._health = health
        self._gate = gate
        self._events: asyncio.Queue[XidEvent] = asyncio.Queue(EVENTS_WAITING_MAX)

    async def run(self) -> None:
        """Hear, for ever; ends the thread when it is cancelled."""
        loop = asyncio.get_running_loop()

        def heard(event: XidEvent) -> None:
            loop.call_soon_threadsafe(self._take, event)

        def lost() -> None:
            loop.call_soon_threadsafe(self._health.look_soon)

        thread = EventThread(heard, lost, gate=self._gate)
        thread.start()
        try:
            while True:
                await self._health.heard(await self._events.get())
        finally:
            # Bounded, and short: the thread looks several times a second whether it is to end.
            await asyncio.shield(loop.run_in_executor(None, thread.close))

    def _take(self, event: XidEvent) -> None:
        try:
            self._events.put_nowait(event)
        except asyncio.QueueFull:
            log.error("XID %d of %s is lost: too many come at once", event.xid, event.gpu)
