"""The worker's end of the token link: requests in, one frame of outputs per step out.

Owns the connected gateway and the numbering of links, by which outputs of a link that has ended are
told from those of the next. It never touches an engine: everything is handed to the step thread.
Invariant: whatever the end of a link, the step thread hears of it exactly once, and before it hears
of the next link.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from concurrent.futures import Future
from functools import partial
from typing import Any

from engine.link.errors import LinkError
from engine.link.frames import Link
from engine.link.tokens import Cancel, Grant, Step, Submit, ToWorker
from engine.worker.desk import Desk
from engine.worker.mailbox import Mailbox, promise
from engine.worker.residency import Residency

log = logging.getLogger(__name__)


class TokenSide:
    """The gateway's connection; a newer one replaces an older one.

    `mailbox` is the step thread's; `desk` and `residency` are only touched there.
    """

    def __init__(self, mailbox: Mailbox, desk: Desk, residency: Residency) -> None:
        self._mailbox = mailbox
        self._desk = desk
        self._residency = residency
        self._number = 0
        self._link: Link[Any] | None = None
        self._task: asyncio.Task[None] | None = None

    async def connected(self, sock: socket.socket) -> None:
        """Serve a new connection instead of the one before."""
        await self.close()
        self._number += 1
        self._link = Link(sock, ToWorker, name="gateway")
        self._mailbox.post(partial(self._desk.opened, self._number))
        self._task = asyncio.create_task(self._read(self._link), name="token link")

    async def close(self) -> None:
        """End the connection, if there is one."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def send(self, number: int, step: Step) -> None:
        """Send a frame, if its link is still the one; on the event loop."""
        if number == self._number and self._link is not None and not self._link.closed:
            try:
                self._link.post(step)
            except LinkError as error:
                log.error("a step's outputs could not be sent: %s", error)
                self._link.close()

    def drop(self, number: int) -> None:
        """End a link whose gateway does what it must not; on the event loop."""
        if number == self._number and self._link is not None:
            log.error("the gateway broke the token link's rules; the link is closed")
            self._link.close()

    async def _read(self, link: Link[Any]) -> None:
        try:
            while True:
                message, descriptors = await link.receive()
                if descriptors:
                    raise LinkError("descriptors have no place on a token link")
                if self._mailbox.crowded:
                    await self._mailbox_read()
                self._mailbox.post(partial(self._take, message))
        except LinkError as error:
            log.info("the token link ended: %s", error)
        finally:
            link.close()
            self._mailbox.post(self._residency.forget_requests)

    async def _mailbox_read(self) -> None:
        """Leave the link unread until the step thread has taken what waits for it."""
        read: Future[None] = promise()
        self._mailbox.post(partial(read.set_result, None))
        await asyncio.wrap_future(read)

    # On the step thread.

    def _take(self, message: Submit | Cancel | Grant) -> None:
        if isinstance(message, Submit):
            if self._desk.enter(message.request, message.model):
                self._residency.submit(message)
            else:
                self._desk.refuse()
        elif isinstance(message, Cancel):
            self._residency.cancel(message.request)
        else:
            self._desk.grant(message.frames)
