"""hotbayd's side of an image builder: one short-lived process for one checkpoint.

The builder reads and writes; this side decides and holds the memory. A builder that hangs or dies
costs its build and nothing else: its process is ended when the context is left.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from daemon.control.errors import CallRefused, ProcessFailed
from daemon.control.processes.short_lived import short_lived
from engine.link import build
from engine.link.build import Build, Built, Restore, Touch
from engine.link.errors import LinkClosed, LinkError
from engine.link.peer import Peer

INSPECT_TIMEOUT_S = 30.0
BUILD_TIMEOUT_S = 3600.0


class Builder:
    """A running builder; see `start`."""

    def __init__(self, sock: socket.socket) -> None:
        self._on_progress: Callable[[int, int], None] = lambda done, total: None
        self._peer: Peer[Any] = Peer(
            sock,
            build.FromBuilder,
            name="image builder",
            replies=(
                build.Inspected,
                build.Built,
                build.Restored,
                build.Saved,
                build.Touched,
                build.Tokenized,
                build.Failed,
            ),
            handler=self._handle,
            on_close=lambda error: None,
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls) -> AsyncIterator[Builder]:
        """A builder for the length of the block. Raises ProcessFailed if none can be started."""
        async with short_lived("an image builder", "engine.builder") as ours:
            builder = cls(ours)
            try:
                yield builder
            finally:
                await builder._peer.close()

    async def inspect(self, directory: Path, dtype: str) -> build.Inspected:
        """Read a checkpoint's configuration and headers.

        Raises CallRefused with the builder's reason, or ProcessFailed when it died.
        """
        request = build.Inspect(directory=str(directory), dtype=dtype)
        reply = await self._call(request, (), INSPECT_TIMEOUT_S)
        assert isinstance(reply, build.Inspected)
        return reply

    async def build(
        self, request: Build, descriptor: int, on_progress: Callable[[int, int], None]
    ) -> Built:
        """Build the inspected image into the segment behind `descriptor`."""
        self._on_progress = on_progress
        reply = await self._call(request, (descriptor,), BUILD_TIMEOUT_S)
        assert isinstance(reply, build.Built)
        return reply

    async def restore(
        self, request: Restore, descriptor: int, on_progress: Callable[[int, int], None]
    ) -> None:
        """Read the inspected checkpoint's image from disk into the segment behind `descriptor`."""
        self._on_progress = on_progress
        reply = await self._call(request, (descriptor,), BUILD_TIMEOUT_S)
        assert isinstance(reply, build.Restored)

    async def save(self, descriptor: int, path: Path) -> None:
        """Write the image in the sealed segment behind `descriptor` to a file."""
        reply = await self._call(build.Save(str(path)), (descriptor,), BUILD_TIMEOUT_S)
        assert isinstance(reply, build.Saved)

    async def touch(self, request: Touch, descriptor: int) -> None:
        """Make the memory of the segment behind `descriptor` present."""
        reply = await self._call(request, (descriptor,), BUILD_TIMEOUT_S)
        assert isinstance(reply, build.Touched)

    async def tokenize(self, directory: Path, text: str) -> tuple[int, ...]:
        """A text's tokens by a checkpoint's tokenizer."""
        reply = await self._call(build.Tokenize(str(directory), text), (), INSPECT_TIMEOUT_S)
        assert isinstance(reply, build.Tokenized)
        return reply.tokens

    async def _call(self, message: Any, descriptors: tuple[int, ...], timeout_s: float) -> Any:
        try:
            reply, received = await self._peer.call(message, descriptors, timeout_s=timeout_s)
        except LinkClosed as error:
            raise ProcessFailed(
                f"the image builder ended while it worked: {error}. Was it out of memory?"
            ) from error
        except LinkError as error:
            raise ProcessFailed(f"the image builder failed: {error}") from error
        assert not received
        if isinstance(reply, build.Failed):
            raise CallRefused(reply.message, reason=reply.reason, metadata=reply.metadata)
        return reply

    async def _handle(self, message: Any, descriptors: list[int]) -> None:
        if isinstance(message, build.BuildProgress):
            self._on_progress(message.bytes_done, message.bytes_total)
