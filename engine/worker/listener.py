"""The worker's two sockets: where they are, and who may listen there.

Owns the directory, its lock and the listening sockets; it never reads a byte. Invariant: one live
process at most listens in a directory, since whoever does holds the lock; and so a socket found
there belongs to a dead predecessor and may be replaced.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from engine.worker.errors import PartitionTaken

BACKLOG = 16
LOCK_NAME = "worker.lock"


class Listeners:
    """Binds sockets in `directory` and hands each connection to its function, in order.

    Raises PartitionTaken while another process listens there.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self._lock = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise PartitionTaken(
                f"another worker listens in {directory}: end it first, or name another partition"
            ) from error
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: list[tuple[Path, socket.socket]] = []

    def listen(self, path: Path, connected: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Accept connections at `path` from now on, on the running event loop."""
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.bind(str(path))
        sock.listen(BACKLOG)
        sock.setblocking(False)
        self._sockets.append((path, sock))
        self._tasks.append(asyncio.create_task(self._accept(sock, connected), name=str(path)))

    @staticmethod
    async def _accept(
        sock: socket.socket, connected: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(sock)
            await connected(connection)

    async def close(self) -> None:
        """Stop listening and remove the sockets. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for path, sock in self._sockets:
            sock.close()
            path.unlink(missing_ok=True)
        self._sockets.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
