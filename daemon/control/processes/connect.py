"""Connecting to a process of ours on its Unix socket, knowing whose it is.

SO_PEERCRED on a connected stream socket names the process that listens, as the kernel saw it, so
that an adopted process is identified by more than its own word.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

CONNECT_TIMEOUT_S = 2.0
_PEER_CREDENTIALS = struct.Struct("3i")


async def connect(path: Path) -> tuple[socket.socket, int]:
    """A connected socket and the pid of the process that listens there.

    Raises OSError (nobody listens) or TimeoutError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await asyncio.get_running_loop().sock_connect(sock, str(path))
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    except BaseException:
        sock.close()
        raise
    pid, _, _ = _PEER_CREDENTIALS.unpack(credentials)
    return sock, int(pid)
