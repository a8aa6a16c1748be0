"""Taking what a gateway must have alone: its directory and its HTTP address.

Both are taken before anything else happens, so that a second gateway ends without having touched
the first. The lock lives as long as its descriptor, so that a killed gateway leaves none behind.
"""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from daemon.gateway.errors import AddressTaken, AlreadyRunning

LISTEN_BACKLOG = 1024


@dataclass(frozen=True)
class Address:
    """A host and a port; port 0 means any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def lock(directory: Path) -> int:
    """Make the directory private and lock it. Raises AlreadyRunning."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise AlreadyRunning(
            f"another gateway runs in {directory}; end it, or give another --runtime-dir"
        ) from None
    return descriptor


def listen(address: Address) -> socket.socket:
    """A listening socket. Raises AddressTaken."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address.host, address.port))
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        raise AddressTaken(
            f"cannot listen for HTTP on {address}: {error.strerror}; give another --http"
        ) from error
    return sock
