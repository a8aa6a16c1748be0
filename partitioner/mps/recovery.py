"""Bringing an MPS server back after a fatal fault of one of its clients.

It owns the order: contexts are taken from every client, then the processes are ended, then the
server is waited for. It ends no process itself: `end_clients` does. The invariants: no client is
killed with work in flight while its server still answers, which would leave the others undefined;
it ends in bounded time with an active server, by a new daemon if need be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from partitioner.errors import MpsError, MpsTimeoutError
from partitioner.mps.control import Limits, MpsControl, ServerStatus
from partitioner.mps.lifetime import until

RECOVERY_TIMEOUT_S = 20.0


async def faulted(control: MpsControl) -> bool:
    """Whether a server of this daemon is in fault, or there is no daemon at all any more."""
    try:
        servers = await control.servers()
    except MpsError:
        return True
    return any(each.status is ServerStatus.FAULT for each in servers)


async def recover(
    control: MpsControl, limits: tuple[Limits, ...], end_clients: Callable[[], Awaitable[None]]
) -> tuple[str, ...]:
    """End every client, and have an active server with these limits again. Raises `MpsError`.

    What comes back is that of `MpsControl.share`.
    """
    with contextlib.suppress(MpsError):
        for pid in await control.clients():
            with contextlib.suppress(MpsError):
                await control.terminate(pid)
    await end_clients()

    async def well() -> bool:
        return not await faulted(control)

    try:
        # Without a daemon there is nothing to wait for.
        if await control.answers():
            await until(well, "", RECOVERY_TIMEOUT_S)
    except MpsTimeoutError:
        await control.stop()
    return await control.share(limits)
