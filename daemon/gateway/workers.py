"""Token links to the workers: one connection for each partition, kept up for as long as it exists.

The module connects, reconnects, submits, cancels and hands credit back; it never decides where a
stream goes or what becomes of it when a link breaks: that is its listener's business. Invariant: a
stream belongs to at most one link, and each link tells of each of its streams exactly once how it
left: by an output that ends it, by `cancel`, or among the streams of a broken link.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from typing import Any, Protocol

from daemon.gateway.streams import Stream
from engine.link.errors import LinkClosed, LinkCongested, LinkError
from engine.link.frames import Link
from engine.link.routes import WorkerAddress
from engine.link.tokens import (
    STEP_FRAMES_CREDIT,
    Cancel,
    FromWorker,
    Grant,
    Output,
    Submit,
)

GRANT_FRAMES = STEP_FRAMES_CREDIT // 8
RECONNECT_FIRST_S = 0.02
RECONNECT_LAST_S = 1.0

log = logging.getLogger(__name__)


class WorkerListener(Protocol):
    """Who is told what comes over the links."""

    def on_connected(self, partition: str) -> None:
        """A link is up; streams may be submitted to it."""

    def on_output(self, stream: Stream, output: Output) -> None:
        """A step brought this stream something."""

    def on_broken(self, partition: str, streams: list[Stream], reason: str) -> None:
        """A link is down, and with it these streams."""


class TokenLink:
    """The link to one worker, over all its connections; replaced when the generation changes."""

    def __init__(self, address: WorkerAddress, listener: WorkerListener) -> None:
        self.address = address
        self._listener = listener
        self._link: Link[Any] | None = None
        self._streams: dict[int, Stream] = {}
        self._request = 0
        self._task = asyncio.create_task(self._run(), name=f"token link {address.partition}")

    @property
    def connected(self) -> bool:
        return self._link is not None and not self._link.closed

    def submit(self, stream: Stream) -> bool:
        """Send a stream to the worker; False when the link is down or its queue is full."""
        if self._link is None:
            return False
        self._request += 1
        message = Submit(
            request=self._request,
            model=stream.model,
            prompt=stream.prompt,
            sampling=stream.sampling,
            priority=stream.priority,
            cache_salt=stream.cache_salt,
        )
        try:
            self._link.post(message)
        except (LinkClosed, LinkCongested):
            return False
        stream.link, stream.request = self, self._request
        self._streams[self._request] = stream
        return True

    def cancel(self, stream: Stream) -> None:
        """Make the worker forget a stream that was submitted here."""
        if self._streams.pop(stream.request, None) is None or self._link is None:
            return
        try:
            self._link.post(Cancel(request=stream.request))
        except LinkCongested:
            # A worker that has not read for so long is stuck; closing makes it forget everything.
            self._link.close()
        except LinkClosed:
            pass  # the reading task is about to report the streams of this link

    async def _run(self) -> None:
        delay_s = RECONNECT_FIRST_S
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(sock, self.address.tokens_socket)
            except OSError:
                sock.close()
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RECONNECT_LAST_S)
                continue
            except asyncio.CancelledError:
                sock.close()
                raise
            try:
                useful = await self._serve(sock)
            except Exception:  # a bug here must not leave the partition without a link for good
                log.exception("the link to worker %s failed", self.address.partition)
                useful = False
            if useful:
                delay_s = RECONNECT_FIRST_S
            else:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RECONNECT_LAST_S)

    async def _serve(self, sock: socket.socket) -> bool:
        """Read one connection to its end; whether anything came over it."""
        partition = self.address.partition
        link: Link[Any] = Link(sock, FromWorker, name=f"worker {partition}")
        self._link = link
        log.info("connected to worker %s", partition)
        steps = 0
        reason = "the link was closed here"
        try:
            self._listener.on_connected(partition)
            while True:
                step, _ = await link.receive()
                steps += 1
                if steps % GRANT_FRAMES == 0:
                    link.post(Grant(frames=GRANT_FRAMES))
                for output in step.outputs:
                    self._deliver(output)
        except LinkError as error:
            reason = str(error)
            log.warning("lost worker %s: %s", partition, reason)
        finally:
            link.close()
            self._link = None
            streams, self._streams = list(self._streams.values()), {}
            self._listener.on_broken(partition, streams, reason)
        return steps > 0

    def _deliver(self, output: Output) -> None:
        if output.finish is None:
            stream = self._streams.get(output.request)
        else:
            stream = self._streams.pop(output.request, None)
        if stream is not None:
            self._listener.on_output(stream, output)

    async def close(self) -> None:
        """Close the link for good; its streams are reported as broken."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Workers:
    """All token links, kept equal to the table's addresses."""

    def __init__(self, listener: WorkerListener) -> None:
        self._listener = listener
        self._links: dict[str, TokenLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def set_addresses(self, addresses: Iterable[WorkerAddress]) -> None:
        """Open links to new workers, close those to ended ones, keep the others as they are."""
        wanted = {address.partition: address for address in addresses}
        for partition, link in list(self._links.items()):
            if wanted.get(partition) != link.address:
                del self._links[partition]
                task = asyncio.create_task(link.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        for partition, address in wanted.items():
            if partition not in self._links:
                self._links[partition] = TokenLink(address, self._listener)

    def submit(self, partition: str, stream: Stream) -> bool:
        """Send a stream to a partition's worker; False when that is not possible now."""
        link = self._links.get(partition)
        return link is not None and link.submit(stream)

    def connected_to(self, partition: str) -> bool:
        """Whether the link to this partition's worker is up."""
        link = self._links.get(partition)
        return link is not None and link.connected

    def connected(self) -> int:
        """How many links are up."""
        return sum(link.connected for link in self._links.values())

    async def close(self) -> None:
        """Close all links."""
        self.set_addresses(())
        await asyncio.gather(*self._closing)
