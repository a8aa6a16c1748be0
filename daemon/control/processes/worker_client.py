"""hotbayd's side of a worker's control socket, as typed calls.

The client owns the link and the last state the worker reported; after a call that changes what the
worker holds, `state` is at least as new as the answer. It never retries and never decides: a link
that breaks surfaces as LinkClosed in every call that waits, and once through `on_closed`.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from daemon.control.errors import CallRefused
from daemon.control.processes.connect import connect
from engine.link import control
from engine.link.errors import LinkError
from engine.link.peer import Peer

CALL_TIMEOUT_S = 10.0
# A worker answers from its link thread, whatever its engines do; one that does not is stuck.
DESCRIBE_TIMEOUT_S = 5.0
ATTACH_TIMEOUT_S = 600.0
EXCHANGE_TIMEOUT_S = 3600.0
# A link so slow that six copies of 64 MiB take longer is broken.
MEASURE_TIMEOUT_S = 120.0
# What a call that waits for requests may take on top of the drain timeout it was given.
DRAIN_MARGIN_S = 30.0


class WorkerClient:
    """One connected worker. `state` is the newest WorkerState; `pid` is who listens there."""

    def __init__(
        self,
        sock: socket.socket,
        pid: int,
        partition: str,
        *,
        on_state: Callable[[control.WorkerState], Awaitable[None]],
        on_closed: Callable[[LinkError], None],
    ) -> None:
        self.partition = partition
        self.pid = pid
        self.state: control.WorkerState
        self._on_state = on_state
        self._on_stage: dict[str, Callable[[control.StageReached], None]] = {}
        self._peer: Peer[Any] = Peer(
            sock,
            control.FromWorker,
            name=f"worker {partition}",
            replies=(
                control.WorkerState,
                control.Exchanged,
                control.LinkMeasured,
                control.Done,
                control.Failed,
            ),
            handler=self._handle,
            on_close=on_closed,
        )

    @classmethod
    async def connect(
        cls,
        path: Path,
        partition: str,
        *,
        on_state: Callable[[control.WorkerState], Awaitable[None]],
        on_closed: Callable[[LinkError], None],
    ) -> WorkerClient:
        """Connect and ask the worker's state. Raises OSError or LinkError when nobody answers."""
        sock, pid = await connect(path)
        client = cls(sock, pid, partition, on_state=on_state, on_closed=on_closed)
        try:
            await client.describe()
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def closed(self) -> bool:
        return self._peer.closed

    async def describe(self) -> control.WorkerState:
        """Ask who and what the worker is now."""
        reply = await self._call(control.Describe(), timeout_s=DESCRIBE_TIMEOUT_S)
        assert isinstance(reply, control.WorkerState)
        self.state = reply
        return reply

    async def attach(self, digest: str, descriptor: int) -> None:
        """Have the worker map and register an image's segment."""
        await self._call(
            control.AttachImage(digest=digest), (descriptor,), timeout_s=ATTACH_TIMEOUT_S
        )

    async def detach(self, digest: str) -> None:
        """Have the worker forget an image."""
        await self._call(control.DetachImage(digest=digest))

    async def exchange(
        self, exchange: control.Exchange, on_stage: Callable[[control.StageReached], None]
    ) -> control.ExchangeResult:
        """Run an exchange to its end, committed or rolled back.

        Raises CallRefused when it was refused before anything changed, LinkClosed when the worker
        died meanwhile.
        """
        self._on_stage[exchange.operation] = on_stage
        try:
            reply = await self._call(exchange, timeout_s=EXCHANGE_TIMEOUT_S)
        finally:
            self._on_stage.pop(exchange.operation, None)
        assert isinstance(reply, control.Exchanged)
        await self.describe()
        return reply.result

    async def stage(
        self, request: control.StageWeights, on_stage: Callable[[control.StageReached], None]
    ) -> control.ExchangeResult:
        """Put a model's weights into spare pages; for as long as that takes.

        Raises CallRefused when it was refused before anything changed, LinkClosed when the worker
        died meanwhile.
        """
        self._on_stage[request.operation] = on_stage
        try:
            reply = await self._call(request, timeout_s=EXCHANGE_TIMEOUT_S)
        finally:
            self._on_stage.pop(request.operation, None)
        assert isinstance(reply, control.Exchanged)
        await self.describe()
        return reply.result

    async def abandon(self, operation: str) -> None:
        """Ask the worker to roll the running exchange back."""
        await self._call(control.Abandon(operation=operation))

    async def drain(self, model: str, in_flight: control.InFlight, drain_timeout_s: float) -> None:
        """Stop a model's requests; returns when none runs."""
        await self._call(
            control.Drain(model=model, in_flight=in_flight, drain_timeout_s=drain_timeout_s),
            timeout_s=drain_timeout_s + DRAIN_MARGIN_S,
        )
        await self.describe()

    async def resume(self, model: str) -> None:
        """Let a drained model serve again."""
        await self._call(control.Resume(model=model))
        await self.describe()

    async def measure_link(self) -> tuple[float, float]:
        """Measure the rates to the partition's device and from it, in bytes a second."""
        reply = await self._call(control.MeasureLink(), timeout_s=MEASURE_TIMEOUT_S)
        assert isinstance(reply, control.LinkMeasured)
        await self.describe()
        return reply.link_bytes_per_s, reply.out_bytes_per_s

    async def shutdown(self, drain_timeout_s: float) -> None:
        """Have the worker finish its requests and end."""
        await self._call(
            control.Shutdown(drain_timeout_s=drain_timeout_s),
            timeout_s=drain_timeout_s + DRAIN_MARGIN_S,
        )

    async def close(self) -> None:
        """Close the link; the worker runs on."""
        await self._peer.close()

    async def _call(
        self, message: Any, descriptors: tuple[int, ...] = (), *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        reply, _ = await self._peer.call(message, descriptors, timeout_s=timeout_s)
        if isinstance(reply, control.Failed):
            raise CallRefused(reply.message, reason=reply.reason, metadata=reply.metadata)
        return reply

    async def _handle(self, message: Any, descriptors: list[int]) -> None:
        if isinstance(message, control.WorkerState):
            self.state = message
            await self._on_state(message)
        elif isinstance(message, control.StageReached):
            listener = self._on_stage.get(message.operation)
            if listener is not None:
                listener(message)
