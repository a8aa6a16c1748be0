"""Calls and replies on top of a link.

A message with a `call` number other than 0 is a call or the reply to one: `Peer.call` numbers it,
sends it and waits for the reply of the same number; every other message goes to the handler, in
the order of arrival. The module owns that pairing and the reading task; it never retries: a caller
that times out must ask the peer's state, since the call may have taken effect.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec

from engine.link.errors import CallTimedOut, LinkClosed, LinkError
from engine.link.frames import Link

Incoming = TypeVar("Incoming")

Handler = Callable[[Any, list[int]], Awaitable[None]]


class Peer(Generic[Incoming]):
    """A link whose calls are answered by number.

    `handler(message, descriptors)` is awaited for each message that is not a reply; while it runs
    nothing further is read, so it must be quick or hand work to a task. `on_close(error)` is called
    once, when the peer is gone or sent nonsense. `replies` names the structs that answer calls.
    """

    def __init__(
        self,
        sock: socket.socket,
        incoming: Any,
        *,
        name: str,
        replies: tuple[type, ...],
        handler: Handler,
        on_close: Callable[[LinkError], None],
    ) -> None:
        self.link: Link[Any] = Link(sock, incoming, name=name)
        self._replies = replies
        self._handler = handler
        self._on_close = on_close
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[Any, list[int]]]] = {}
        self._task = asyncio.create_task(self._read(), name=f"link {name}")

    @property
    def name(self) -> str:
        return self.link.name

    @property
    def closed(self) -> bool:
        return self.link.closed

    def post(self, message: Any, descriptors: tuple[int, ...] = ()) -> None:
        """Send without waiting; see `Link.post`."""
        self.link.post(message, descriptors)

    async def call(
        self, message: Any, descriptors: tuple[int, ...] = (), *, timeout_s: float
    ) -> tuple[Any, list[int]]:
        """Send a call and wait for its reply and the reply's descriptors (the caller's to close).

        Raises LinkClosed when the peer goes first, CallTimedOut after `timeout_s`.
        """
        number = next(self._numbers)
        future: asyncio.Future[tuple[Any, list[int]]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            # The deadline covers sending too: a peer that has stopped reading never lets it end.
            async with asyncio.timeout(timeout_s):
                await self.link.send(msgspec.structs.replace(message, call=number), descriptors)
                return await future
        except TimeoutError as error:
            raise CallTimedOut(
                f"{self.name} did not answer {type(message).__name__} within {timeout_s:g} s"
            ) from error
        finally:
            self._waiting.pop(number, None)

    async def _read(self) -> None:
        try:
            while True:
                received: tuple[Any, list[int]] = await self.link.receive()
                message, descriptors = received
                call: int = getattr(message, "call", 0)
                if call and isinstance(message, self._replies):
                    future = self._waiting.get(call)
                    if future is not None and not future.done():
                        future.set_result((message, descriptors))
                    else:
                        # The caller gave up; its reply's descriptors would leak otherwise.
                        for descriptor in descriptors:
                            os.close(descriptor)
                else:
                    await self._handler(message, descriptors)
        except LinkError as error:
            self._ended(error)
        except Exception as error:  # a handler's bug must end the link loudly, not hang its peer
            self._ended(LinkError(f"handling a message from {self.name} failed: {error!r}"))
            raise

    def _ended(self, error: LinkError) -> None:
        self.link.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LinkClosed(str(error)))
        self._on_close(error)

    async def close(self) -> None:
        """Close the link and stop reading; calls still waiting raise LinkClosed. Idempotent."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.link.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LinkClosed(f"link to {self.name} was closed here"))
