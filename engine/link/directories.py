"""Where a worker's sockets are: a directory that both sides find by the partition's name alone.

It owns the rule. It makes no directory. The invariant: the kernel's address of a Unix socket holds
107 bytes, and a partition's name, nested as it may be, never makes its sockets' paths longer: where
the readable name does not fit, a short one that follows from it is used.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SOCKET_PATH_BYTES_MAX = 107
LONGEST_SOCKET = "control.sock"
SHORT_NAME_DIGITS = 8
RUNTIME_DIR_BYTES_MAX = (
    SOCKET_PATH_BYTES_MAX - len("/workers/") - SHORT_NAME_DIGITS - len("/" + LONGEST_SOCKET)
)
"""Of the runtime directory, so that every partition's sockets fit."""


def runtime_dir_problem(runtime_dir: Path) -> str:
    """Why sockets do not fit below a runtime directory; empty when they do."""
    length = len(os.fsencode(runtime_dir.absolute()))
    if length <= RUNTIME_DIR_BYTES_MAX:
        return ""
    return (
        f"the runtime directory {runtime_dir} has {length} bytes; sockets in it allow "
        f"{RUNTIME_DIR_BYTES_MAX}: give a shorter one with --runtime-dir"
    )


def worker_directory(runtime_dir: Path, partition: str) -> Path:
    """`RUNTIME_DIR/workers/gpu0/3g.71gb@4`, or a short name where that would be too long."""
    workers = runtime_dir / "workers"
    readable = workers / partition
    if len(os.fsencode(readable / LONGEST_SOCKET)) <= SOCKET_PATH_BYTES_MAX:
        return readable
    return workers / hashlib.sha256(partition.encode()).hexdigest()[:SHORT_NAME_DIGITS]
