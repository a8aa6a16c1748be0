"""hotbayd's side of the gateway's control socket, as typed calls.

The client owns the link and the state the gateway gave when it was connected. The gateway asks too:
for metrics, which `on_metrics` answers, and it reports demand, which goes to `on_demand`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from daemon.control.errors import CallRefused
from daemon.control.processes.connect import connect
from engine.link import routes
from engine.link.errors import LinkError
from engine.link.peer import Peer

CALL_TIMEOUT_S = 10.0
DRAIN_MARGIN_S = 10.0


class GatewayClient:
    """The connected gateway. `state` is what it said of itself; `pid` is who listens there."""

    def __init__(
        self,
        sock: socket.socket,
        pid: int,
        *,
        on_demand: Callable[[routes.Demand], Awaitable[None]],
        on_metrics: Callable[[], Awaitable[str]],
        on_closed: Callable[[LinkError], None],
    ) -> None:
        self.pid = pid
        self.state: routes.GatewayState
        self._on_demand = on_demand
        self._on_metrics = on_metrics
        self._answers: set[asyncio.Task[None]] = set()
        self._peer: Peer[Any] = Peer(
            sock,
            routes.FromGateway,
            name="gateway",
            replies=(routes.GatewayState, routes.Done, routes.Failed),
            handler=self._handle,
            on_close=on_closed,
        )

    @classmethod
    async def connect(
        cls,
        path: Path,
        *,
        on_demand: Callable[[routes.Demand], Awaitable[None]],
        on_metrics: Callable[[], Awaitable[str]],
        on_closed: Callable[[LinkError], None],
    ) -> GatewayClient:
        """Connect and ask who it is. Raises OSError or LinkError when nobody answers."""
        sock, pid = await connect(path)
        client = cls(sock, pid, on_demand=on_demand, on_metrics=on_metrics, on_closed=on_closed)
        try:
            await client.describe()
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def closed(self) -> bool:
        return self._peer.closed

    async def describe(self) -> routes.GatewayState:
        """Ask the gateway who it is, where it listens and which segments it keeps."""
        reply, _ = await self._call(routes.Describe())
        assert isinstance(reply, routes.GatewayState)
        self.state = reply
        return reply

    async def set_table(self, table: routes.SetTable) -> None:
        """Replace all routes; returns once they are in force."""
        await self._call(table)

    async def keep(self, digest: str, descriptor: int) -> None:
        """Have the gateway keep a segment's descriptor."""
        await self._call(routes.KeepSegment(digest=digest), (descriptor,))

    async def fetch(self, digest: str) -> int:
        """A descriptor of a kept segment, the caller's to close. Raises CallRefused."""
        _, descriptors = await self._call(routes.FetchSegment(digest=digest))
        descriptor, *surplus = descriptors
        for extra in surplus:
            os.close(extra)
        return descriptor

    async def drop(self, digest: str) -> None:
        """Have the gateway close a kept descriptor."""
        await self._call(routes.DropSegment(digest=digest))

    async def shutdown(self, drain_timeout_s: float) -> None:
        """Have the gateway take no new requests, let open ones end, and end itself."""
        await self._call(
            routes.Shutdown(drain_timeout_s=drain_timeout_s),
            timeout_s=drain_timeout_s + DRAIN_MARGIN_S,
        )

    async def close(self) -> None:
        """Close the link; the gateway runs on."""
        for task in self._answers:
            task.cancel()
        await self._peer.close()

    async def _call(
        self, message: Any, descriptors: tuple[int, ...] = (), *, timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[Any, list[int]]:
        reply, received = await self._peer.call(message, descriptors, timeout_s=timeout_s)
        if isinstance(reply, routes.Failed):
            raise CallRefused(reply.message, reason=reply.reason)
        return reply, received

    async def _handle(self, message: Any, descriptors: list[int]) -> None:
        if isinstance(message, routes.Demand):
            await self._on_demand(message)
        elif isinstance(message, routes.MetricsQuery):
            task = asyncio.create_task(self._answer_metrics(message.call))
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)

    async def _answer_metrics(self, call: int) -> None:
        text = await self._on_metrics()
        if not self._peer.closed:
            self._peer.post(routes.Metrics(call=call, text=text))
