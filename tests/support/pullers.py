"""Pullers in this process, for a staged node: they write the files that a test says there are.

What they are asked is kept, and where a test says so they stand still, refuse or die. The real ones
are tested over a real HTTP server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from daemon.control.errors import ControlError
from engine.link.pull import Fetch, Fetched, RemoteFile, Resolve, Resolved

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Pullers:
    """Call it for a puller, as hotbayd does."""

    def __init__(self) -> None:
        self.files = {"config.json": b"{}", "model.safetensors": b"w" * 1000}
        self.commit = COMMIT
        self.running = 0
        self.fetching = 0
        self.most_fetching = 0
        self.resolves: list[Resolve] = []
        self.fetches: list[Fetch] = []
        self.pause: asyncio.Event | None = None
        self.refuse_resolve: ControlError | None = None
        self.refuse_fetch: ControlError | None = None

    @contextlib.asynccontextmanager
    async def __call__(self, repository: str) -> AsyncIterator[Pullers]:
        self.running += 1
        try:
            yield self
        finally:
            self.running -= 1

    async def resolve(self, request: Resolve, timeout_s: float) -> Resolved:
        self.resolves.append(request)
        if self.refuse_resolve is not None:
            raise self.refuse_resolve
        files = [RemoteFile(name, len(content)) for name, content in self.files.items()]
        return Resolved(0, self.commit, tuple(files))

    async def fetch(
        self, request: Fetch, timeout_s: float, on_progress: Callable[[int, int], None]
    ) -> Fetched:
        self.fetches.append(request)
        self.fetching += 1
        self.most_fetching = max(self.most_fetching, self.fetching)
        try:
            return await self._write(request, on_progress)
        finally:
            self.fetching -= 1

    async def _write(self, request: Fetch, on_progress: Callable[[int, int], None]) -> Fetched:
        total, received = sum(map(len, self.files.values())), 0
        for name, content in self.files.items():
            path = Path(request.directory) / name
            if not path.exists():
                path.write_bytes(content)
                received += len(content)
            on_progress(received, total)
            if self.pause is not None:
                await self.pause.wait()
        if self.refuse_fetch is not None:
            raise self.refuse_fetch
        return Fetched(0, received)
