"""Bringing an MPS server back after a fatal fault of one of its clients.

It owns the order: contexts are taken from every client, then the processes are ended, then the
server is waited for. It ends no process itself: `end_clients` does. The invariants: no client is
killed with work in flight while its server still answers, which would leave the others undefined;
it ends in bounded time with an active server, by a new daemon if need be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from partitioner.errors import MpsCommandError, MpsError
from partitioner.mps.control import Limits, MpsControl, ServerStatus
from partitioner.mps.lifetime import until

RECOVERY_TIMEOUT_S = 20.0


async def faulted(control: MpsControl) -> bool:
    """Whether a server of this daemon is in fault, or there is no daemon at all any more.

    Raises any other `MpsError`: a daemon that does not answer in time may well be sound.
    """
    try:
        servers = await control.servers()
    except MpsCommandError:
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
        answers = await control.answers()
        if answers:
            await until(well, "", RECOVERY_TIMEOUT_S)
    except MpsError:
        answers = False
    if not answers:
        await control.stop()  # It may be there all the same, stuck.
    return await control.share(limits)
