"""Processes that hotbayd starts for one job and ends with it: image builders and pullers.

It owns starting one with a socket of its own and making sure that it ends; what is spoken over the
socket is the caller's. The invariant: when the context is left, the process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator

from daemon.control.errors import ProcessFailed

EXIT_TIMEOUT_S = 5.0


@contextlib.asynccontextmanager
async def short_lived(name: str, module: str, *arguments: str) -> AsyncIterator[socket.socket]:
    """Our end of the socket to a new process that runs `module`; whoever gets it closes it.

    Raises ProcessFailed, calling it `name`, if it cannot be started.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                "--descriptor",
                str(theirs.fileno()),
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        except OSError as error:
            ours.close()
            raise ProcessFailed(f"cannot start {name}: {error}") from error
    try:
        yield ours
    finally:
        # Its socket, closed, ends a healthy process; one that does not listen is killed.
        ours.close()
        try:
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
