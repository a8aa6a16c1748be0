"""hotbayd's side of a puller: one short-lived process for one checkpoint of a hub.

The puller speaks to the hub and writes files; this side decides what and where. A puller that hangs
or dies costs its pull and nothing else, and what it had fetched is gone on with by the next one.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

from daemon.control.errors import CallRefused, ProcessFailed
from daemon.control.processes.short_lived import short_lived
from engine.link import pull
from engine.link.build import Failed
from engine.link.errors import CallTimedOut, LinkClosed, LinkError
from engine.link.peer import Peer
from engine.link.pull import Fetch, Fetched, Resolve, Resolved


class Puller:
    """A running puller; see `start`."""

    def __init__(self, sock: socket.socket) -> None:
        self._on_progress: Callable[[int, int], None] = lambda done, total: None
        self._peer: Peer[Any] = Peer(
            sock,
            pull.FromPuller,
            name="puller",
            replies=(Resolved, Fetched, Failed),
            handler=self._handle,
            on_close=lambda error: None,
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, repository: str) -> AsyncIterator[Puller]:
        """A puller for the length of the block. Raises ProcessFailed if none can be started."""
        async with short_lived(
            f"a puller for {repository}", "engine.pull.process", "--for", repository
        ) as ours:
            puller = cls(ours)
            try:
                yield puller
            finally:
                await puller._peer.close()

    async def resolve(self, request: Resolve, timeout_s: float) -> Resolved:
        """Look at a repository. Raises CallRefused with the puller's reason, or ProcessFailed."""
        reply = await self._call(request, timeout_s)
        assert isinstance(reply, Resolved)
        return reply

    async def fetch(
        self, request: Fetch, timeout_s: float, on_progress: Callable[[int, int], None]
    ) -> Fetched:
        """Bring what was resolved to disk."""
        self._on_progress = on_progress
        reply = await self._call(request, timeout_s)
        assert isinstance(reply, Fetched)
        return reply

    async def _call(self, message: Any, timeout_s: float) -> Any:
        try:
            reply, received = await self._peer.call(message, timeout_s=timeout_s)
        except CallTimedOut as error:
            raise CallRefused(
                f"the hub did not let the puller finish {type(message).__name__} within "
                f"{timeout_s:g} s",
                reason="HUB_UNAVAILABLE",
            ) from error
        except LinkClosed as error:
            raise ProcessFailed(
                f"the puller ended while it worked: {error}. Was it out of memory?",
                reason="PULL_FAILED",
            ) from error
        except LinkError as error:
            raise ProcessFailed(f"the puller failed: {error}", reason="PULL_FAILED") from error
        assert not received
        if isinstance(reply, Failed):
            raise CallRefused(reply.message, reason=reply.reason, metadata=reply.metadata)
        return reply

    async def _handle(self, message: Any, descriptors: list[int]) -> None:
        if isinstance(message, pull.PullProgress):
            self._on_progress(message.bytes_done, message.bytes_total)
