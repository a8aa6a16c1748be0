"""hotbayd's side of an image builder: one short-lived process for one checkpoint.

The builder reads and writes; this side decides and holds the memory. A builder that hangs or dies
costs its build and nothing else: its process is ended when the context is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from daemon.control.errors import CallRefused, ProcessFailed
from engine.link import build
from engine.link.build import Built, Restore
from engine.link.errors import LinkClosed, LinkError
from engine.link.peer import Peer

INSPECT_TIMEOUT_S = 30.0
BUILD_TIMEOUT_S = 3600.0
EXIT_TIMEOUT_S = 5.0


class Builder:
    """A running builder; see `start`."""

    def __init__(self, sock: socket.socket) -> None:
        self._on_progress: Callable[[int, int], None] = lambda done, total: None
        self._peer: Peer[Any] = Peer(
            sock,
            build.FromBuilder,
            name="image builder",
            replies=(build.Inspected, build.Built, build.Restored, build.Saved, build.Failed),
            handler=self._handle,
            on_close=lambda error: None,
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls) -> AsyncIterator[Builder]:
        """A builder for the length of the block. Raises ProcessFailed if none can be started."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "engine.builder",
                    "--descriptor",
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
            except OSError as error:
                ours.close()
                raise ProcessFailed(f"cannot start an image builder: {error}") from error
        builder = cls(ours)
        try:
            yield builder
        finally:
            await builder._peer.close()
            # Closing the socket ends a healthy builder; one that does not listen is killed.
            try:
                async with asyncio.timeout(EXIT_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    async def inspect(self, directory: Path, dtype: str) -> build.Inspected:
        """Read a checkpoint's configuration and headers.

        Raises CallRefused with the builder's reason, or ProcessFailed when it died.
        """
        request = build.Inspect(directory=str(directory), dtype=dtype)
        reply = await self._call(request, (), INSPECT_TIMEOUT_S)
        assert isinstance(reply, build.Inspected)
        return reply

    async def build(
        self, descriptor: int, threads: int, on_progress: Callable[[int, int], None]
    ) -> Built:
        """Build the inspected image into the segment behind `descriptor`."""
        self._on_progress = on_progress
        reply = await self._call(build.Build(threads=threads), (descriptor,), BUILD_TIMEOUT_S)
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
