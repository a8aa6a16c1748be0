"""hotbayd's link: the socket the gateway listens on, and the answers to what comes over it.

hotbayd may be away at any time: nothing here makes the gateway wait for it, and a table once
received stays in force. A later connection replaces an earlier one. Invariant: at most one
connection is current, and only that one is answered and reported to.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from daemon.gateway.custody import Custody
from daemon.gateway.errors import SegmentRefused
from daemon.gateway.table import Table, build_table
from engine.link.errors import LinkError
from engine.link.peer import Peer
from engine.link.routes import (
    Demand,
    Describe,
    Done,
    DropSegment,
    Failed,
    FetchSegment,
    GatewayState,
    KeepSegment,
    Metrics,
    MetricsQuery,
    SetTable,
    Shutdown,
    ToGateway,
)

METRICS_TIMEOUT_S = 0.5
ACCEPT_BACKLOG = 8
ACCEPT_RETRY_S = 0.1

log = logging.getLogger(__name__)


class ControlListener:
    """Accepts hotbayd's connections on `path` and carries out what it asks.

    `describe` makes the state, `set_table` puts a table in force, `shutdown(drain_timeout_s)`
    begins the end, `connected` is called for each new connection.
    """

    def __init__(
        self,
        path: Path,
        custody: Custody,
        *,
        describe: Callable[[], GatewayState],
        set_table: Callable[[Table], None],
        shutdown: Callable[[float], None],
        connected: Callable[[], None],
    ) -> None:
        self._custody = custody
        self._describe = describe
        self._set_table = set_table
        self._shutdown = shutdown
        self._connected = connected
        self._table_version = -1
        self._peer: Peer[Any] | None = None
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(os.fspath(path))
        self._socket.listen(ACCEPT_BACKLOG)

    async def run(self) -> None:
        """Accept connections for as long as the task lives."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._socket)
            except OSError as error:  # out of descriptors, for instance: try again, do not end
                log.error("cannot accept hotbayd's connection: %s", error)
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            earlier, self._peer = self._peer, self._adopt(sock)
            if earlier is not None:
                log.info("a new connection of hotbayd replaces the earlier one")
                await earlier.close()
            self._connected()

    def _adopt(self, sock: socket.socket) -> Peer[Any]:
        peer: Peer[Any]

        async def handle(message: Any, descriptors: list[int]) -> None:
            if peer is self._peer:
                self._handle(peer, message, descriptors)
            else:
                for descriptor in descriptors:
                    os.close(descriptor)

        def closed(error: LinkError) -> None:
            log.warning("hotbayd is away: %s", error)
            if peer is self._peer:
                self._peer = None

        log.info("hotbayd connected")
        peer = Peer(
            sock, ToGateway, name="hotbayd", replies=(Metrics,), handler=handle, on_close=closed
        )
        return peer

    def _handle(self, peer: Peer[Any], message: Any, descriptors: list[int]) -> None:
        if descriptors and not isinstance(message, KeepSegment):
            for descriptor in descriptors:
                os.close(descriptor)
        answer: GatewayState | Done | Failed
        attached: tuple[int, ...] = ()
        try:
            match message:
                case Describe():
                    answer = msgspec.structs.replace(self._describe(), call=message.call)
                case SetTable():
                    self._replace_table(message)
                    answer = Done(message.call)
                case KeepSegment():
                    self._custody.keep(message.digest, descriptors)
                    answer = Done(message.call)
                case FetchSegment():
                    attached = (self._custody.fetch(message.digest),)
                    answer = Done(message.call)
                case DropSegment():
                    self._custody.drop(message.digest)
                    answer = Done(message.call)
                case Shutdown():
                    answer = Done(message.call)
                    self._shutdown(message.drain_timeout_s)
                case _:
                    return
        except SegmentRefused as error:
            answer = Failed(message.call, "SEGMENT_REFUSED", str(error))
        peer.post(answer, attached)

    def _replace_table(self, message: SetTable) -> None:
        if message.version < self._table_version:
            log.info("ignoring table %d: %d is in force", message.version, self._table_version)
            return
        self._table_version = message.version
        self._set_table(build_table(message))

    def post_demand(self, demand: Demand) -> bool:
        """Report demand; False when hotbayd is away, which loses nothing: it will be told again."""
        if self._peer is None:
            return False
        try:
            self._peer.post(demand)
        except LinkError:
            return False
        return True

    async def query_metrics(self) -> str | None:
        """hotbayd's metrics, or None when it is away or slower than METRICS_TIMEOUT_S."""
        if self._peer is None:
            return None
        try:
            answer, _ = await self._peer.call(MetricsQuery(), timeout_s=METRICS_TIMEOUT_S)
        except LinkError:
            return None
        return str(answer.text)

    async def close(self) -> None:
        """Stop listening and hang up."""
        self._socket.close()
        if self._peer is not None:
            await self._peer.close()
