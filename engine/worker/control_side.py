"""The worker's end of the control link: hotbayd's calls and their answers, and the worker's state.

Owns the connected hotbayd and the calls under way. It never carries a call out itself. Invariants:
every call is answered once, by its reply or by Failed; what a call does goes on when its caller is
gone; a caller that does not read is dropped rather than waited for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Any

from engine.errors import EngineError
from engine.link import control
from engine.link.errors import LinkError
from engine.link.peer import Peer
from engine.worker.calls import Calls
from engine.worker.errors import WorkerError, message_of, metadata_of, reason_of
from swap.errors import SwapError

CALLS_MAX = 64
"""Calls under way at once; one more is refused."""
STATE_INTERVAL_S = 1.0
STATE_SPACING_S = 0.05
"""Least time between two states told unasked, however much changes."""

log = logging.getLogger(__name__)


class ControlSide:
    """hotbayd's connection; a newer one replaces an older one. On the event loop."""

    def __init__(self) -> None:
        self.calls: Calls
        """Set before the first connection; calls tell their progress through this object."""
        self._peer: Peer[Any] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None

    async def connected(self, sock: socket.socket) -> None:
        """Serve a new connection instead of the one before."""
        if self._peer is not None:
            await self._peer.close()
        peer: Peer[Any] = Peer(
            sock,
            control.ToWorker,
            name="hotbayd",
            replies=(),
            handler=lambda message, descriptors: self._handle(peer, message, descriptors),
            on_close=lambda error: log.info("the control link ended: %s", error),
        )
        self._peer = peer
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell_states(), name="states")

    def changed(self) -> None:
        """A status or an exchange changed."""
        self._changed.set()

    def tell(self, message: Any) -> None:
        """Send an event to whoever is connected."""
        if self._peer is not None and not self._peer.closed:
            self._post(self._peer, message)

    async def close(self) -> None:
        """End the connection; calls under way are answered no more."""
        tasks = [*self._tasks, *([self._telling] if self._telling else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._peer is not None:
            await self._peer.close()

    async def _handle(self, peer: Peer[Any], message: Any, descriptors: list[int]) -> None:
        if len(self._tasks) >= CALLS_MAX:
            for descriptor in descriptors:
                os.close(descriptor)
            text = f"{CALLS_MAX} calls are under way: wait for one of them"
            self._post(peer, control.Failed(message.call, "QUEUE_FULL", text))
            return
        task = asyncio.create_task(self._serve(peer, message, descriptors))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer: Peer[Any], message: Any, descriptors: list[int]) -> None:
        try:
            reply = await self.calls.serve(message, descriptors)
        except (WorkerError, EngineError, SwapError) as error:
            log.info("%s was refused: %s", type(message).__name__, error)
            reply = _failed(message.call, error)
        except Exception as error:
            log.exception("%s failed", type(message).__name__)
            reply = _failed(message.call, error)
        self._post(peer, reply)

    def _post(self, peer: Peer[Any], message: Any) -> None:
        try:
            peer.post(message)
        except LinkError as error:
            log.info("a %s was not sent: %s", type(message).__name__, error)
            peer.link.close()

    async def _tell_states(self) -> None:
        while True:
            try:
                async with asyncio.timeout(STATE_INTERVAL_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            self.tell(self.calls.state())
            await asyncio.sleep(STATE_SPACING_S)


def _failed(call: int, error: Exception) -> control.Failed:
    return control.Failed(call, reason_of(error), message_of(error), metadata_of(error))
